"""What every context block checks and computes alike: inputs, masks, widths and sums."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gcnet_jax.errors import ConfigError, unknown_name

ROUNDINGS = ('floor', 'nearest')


def check_choice(option: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises ConfigError unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(unknown_name(option, value, choices))


def check_features(features: Any, mask: Any, block: str) -> None:
    """Raises unless `features` is `[batch, *spatial, channel]` floating and `mask` fits it.

    Raises:
      TypeError: `features` is not a floating-point array, or `mask` is not boolean.
      ValueError: `features` has fewer than three dimensions, an empty spatial or channel dimension,
        or `mask` is not `[batch, *spatial]`.
    """
    if not hasattr(features, 'dtype') or not jnp.issubdtype(features.dtype, jnp.floating):
        found = getattr(features, 'dtype', type(features).__name__)
        raise TypeError(
            f'{block}: features must be a floating-point array, got {found}; '
            'convert the input with .astype(jnp.float32) or jnp.bfloat16'
        )
    if features.ndim < 3 or 0 in features.shape[1:]:
        raise ValueError(
            f'{block}: features must be [batch, *spatial, channel] with one or more spatial '
            f'dimensions, none of them empty, got shape {features.shape}; '
            'for one image add a batch dimension with features[None]'
        )
    if mask is None:
        return
    if not hasattr(mask, 'dtype') or mask.dtype != jnp.bool_:
        found = getattr(mask, 'dtype', type(mask).__name__)
        raise TypeError(f'{block}: mask must be a boolean array (True is valid), got {found}')
    if mask.shape != features.shape[:-1]:
        raise ValueError(
            f'{block}: mask must be [batch, *spatial] = {features.shape[:-1]}, '
            f'got shape {mask.shape}'
        )


def hidden_size(channels: int, ratio: float, hidden_channels: int | None, rounding: str) -> int:
    """Returns the width of a block's bottleneck; at least 1.

    Args:
      channels: Width of the block's input.
      ratio: Bottleneck width as a fraction of `channels`, in (0, 1]; the paper's r16 is 1/16.
      hidden_channels: The width itself; `ratio` and `rounding` are not used where it is given.
      rounding: 'floor' as in mmcv and the official code, 'nearest' as in timm.
    """
    if hidden_channels is not None:
        if hidden_channels < 1:
            raise ConfigError(f'hidden_channels must be 1 or more, got {hidden_channels}')
        return int(hidden_channels)
    check_choice('rounding', rounding, ROUNDINGS)
    if not 0 < ratio <= 1:
        hint = f'; did you mean 1/{ratio:g}?' if ratio > 1 else ''
        raise ConfigError(f'ratio must be in (0, 1], got {ratio:g}{hint}')
    return max(1, int(channels * ratio + (0.5 if rounding == 'nearest' else 0.0)))


def float32_or_wider(dtype: Any) -> Any:
    """Returns the type for statistics and sums; `jnp.promote_types` raises in strict promotion."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32


def flatten_positions(
    features: Float[Array, 'batch *spatial channel'], mask: Bool[Array, 'batch *spatial'] | None
) -> tuple[Float[Array, 'batch position channel'], Bool[Array, 'batch position'] | None]:
    """Joins the spatial dimensions into one, and zeroes what the mask hides.

    Zeroed, because zero attention alone would not keep a NaN in the padding out of a weighted sum.
    """
    batch, *spatial, channels = features.shape
    count = math.prod(spatial)  # Not -1, which an empty batch leaves open.
    positions = features.reshape(batch, count, channels)
    if mask is None:
        return positions, None
    mask = mask.reshape(batch, count)
    return jnp.where(mask[..., None], positions, 0), mask


def masked_softmax(
    logits: Float[Array, '*any position'], mask: Bool[Array, '*#any position'] | None
) -> Float[Array, '*any position']:
    """Softmax over the last dimension in float32 or wider; exactly zero at positions not valid.

    A row without a valid position gets zeros everywhere, with zero gradients.
    """
    logits = logits.astype(float32_or_wider(logits.dtype))
    if mask is None:
        return jax.nn.softmax(logits, axis=-1)
    logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
    highest = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    unnormalised = jnp.where(mask, jnp.exp(logits - highest), 0.0)
    total = unnormalised.sum(axis=-1, keepdims=True)
    return unnormalised / jnp.where(total == 0, 1.0, total)


def weighted_sum(
    positions: Float[Array, 'batch position channel'], weights: Float[Array, 'batch position']
) -> Float[Array, 'batch channel']:
    """Sums the positions by weight, in float32 or wider; the result has the positions' type."""
    total = jnp.einsum(
        'bp,bpc->bc',
        weights.astype(positions.dtype),
        positions,
        preferred_element_type=float32_or_wider(positions.dtype),
    )
    return total.astype(positions.dtype)


def average_pool(
    features: Float[Array, 'batch *spatial channel'],
    mask: Bool[Array, 'batch *spatial'] | None = None,
) -> Float[Array, 'batch channel']:
    """The mean over all valid positions, in float32; the result has the features' type."""
    positions, valid = flatten_positions(features, mask)
    if valid is None:
        return positions.mean(axis=1, dtype=jnp.float32).astype(features.dtype)
    count = jnp.maximum(valid.sum(axis=1, keepdims=True, dtype=jnp.float32), 1.0)
    return weighted_sum(positions, valid.astype(jnp.float32) / count)


def over_positions(
    values: Float[Array, 'batch channel'], rank: int
) -> Float[Array, 'batch *spatial channel']:
    """Adds one dimension of size 1 for each spatial dimension, to broadcast over the positions."""
    batch, channels = values.shape
    return values.reshape(batch, *(1,) * (rank - 2), channels)
