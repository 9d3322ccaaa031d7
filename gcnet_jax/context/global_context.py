"""The global context block (Cao et al., GCNet, arXiv 1904.11492, section 3.3).

    context = sum over positions of softmax(features . w) * features     AttentionPool
    update  = W2 relu(layer_norm(W1 context))                            ContextTransform
    output  = features + update                                         ContextFusion

The computation is that of the official code and of mmcv's `ContextBlock`; timm's `GlobalContext`
is reached through `rounding='nearest'` and `norm_epsilon=1e-6`. The 1x1 convolutions are dense
layers over the channel dimension, so that one set of parameters serves a sequence, an image or a
video.

Behind a 1x1 convolution and its norm the pooling can come first (see Expanded): all three are
linear in the positions, and the convolution's input is narrower than its output.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float

from gcnet_jax.context.common import (
    check_choice,
    check_features,
    flatten_positions,
    float32_or_wider,
    hidden_size,
    masked_softmax,
)
from gcnet_jax.errors import ConfigError

POOLINGS = ('attention', 'average')
FUSIONS = ('add', 'scale', 'scale_add')


@dataclasses.dataclass(frozen=True)
class Expanded:
    """Features `(inner @ kernel - mean) * scale + shift` that need not be computed to be pooled.

    With `w` the attention's weights, the logits are `inner . (kernel @ (scale * w))` up to a
    constant that the softmax removes, and the context is that map of the pooled `inner`, as the
    attention sums to one. In exact arithmetic the result is that of the plain order.

    Attributes:
      inner: `[batch, *spatial, inner_channel]`.
      kernel: `[inner_channel, channel]`.
      product: `inner @ kernel`, which is not read: the gradient of what is pooled goes this way.
      mean, scale, shift: `[channel]`, in float32.
    """

    inner: Float[Array, 'batch *spatial inner_channel']
    kernel: Float[Array, 'inner_channel channel']
    product: Float[Array, 'batch *spatial channel']
    mean: Float[Array, ' channel']
    scale: Float[Array, ' channel']
    shift: Float[Array, ' channel']


class AttentionPool(nn.Module):
    """Pools all positions into one vector, weighted by a softmax over one logit a position.

    The attention of a call is sown as `attention`, `[batch, *spatial]` in float32, into the
    collection `intermediates`. The bias cancels in the softmax; it is a parameter because published
    checkpoints hold it.
    """

    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        features: Float[Array, 'batch *spatial channel'] | Expanded,
        mask: Bool[Array, 'batch *spatial'] | None = None,
    ) -> Float[Array, 'batch channel']:
        """Returns the context; a masked position (False) has exactly zero weight."""
        if isinstance(features, Expanded):
            return self._pool_expanded(features, mask)
        check_features(features, mask, 'AttentionPool')
        positions, valid = flatten_positions(features, mask)
        logits = self._logits(features.dtype)(positions)
        attention = masked_softmax(logits[..., 0], valid)
        self.sow('intermediates', 'attention', attention.reshape(features.shape[:-1]))
        return weighted_sum(positions, attention)

    def _logits(self, dtype: Dtype) -> nn.Dense:
        return nn.Dense(
            1,
            dtype=self.dtype or dtype,
            param_dtype=self.param_dtype,
            kernel_init=nn.initializers.he_normal(),
            name='logits',
        )

    def _pool_expanded(
        self, features: Expanded, mask: Bool[Array, 'batch *spatial'] | None
    ) -> Float[Array, 'batch channel']:
        """Pools before the expansion; the parameters exist, or there is nothing to expand with."""
        inner, kernel = features.inner, features.kernel
        check_features(inner, mask, 'AttentionPool')
        batch, *spatial, _ = inner.shape
        if mask is not None:
            inner = jnp.where(mask[..., None], inner, 0)
            mask = mask.reshape(batch, -1)
        wide = float32_or_wider(inner.dtype)
        kernel = kernel.astype(inner.dtype)
        weights = self._logits(inner.dtype).get_variable('params', 'kernel')[:, 0]
        direction = kernel @ (features.scale * weights).astype(inner.dtype)
        logits = jnp.dot(inner, direction, preferred_element_type=wide)
        attention = masked_softmax(logits.reshape(batch, -1), mask).reshape(batch, *spatial)
        self.sow('intermediates', 'attention', attention)
        expanded = pooled_product(features.product, inner, kernel, attention)
        mean, scale, shift = (x[None] for x in (features.mean, features.scale, features.shift))
        context = (expanded.astype(mean.dtype) - mean) * scale + shift
        return context.astype(inner.dtype)


@jax.custom_vjp
def pooled_product(
    product: Float[Array, 'batch *spatial channel'],
    inner: Float[Array, 'batch *spatial inner_channel'],
    kernel: Float[Array, 'inner_channel channel'],
    attention: Float[Array, 'batch *spatial'],
) -> Float[Array, 'batch channel']:
    """Sums `product = inner @ kernel` by weight, and reads only `inner`, in the inner type.

    Its gradient goes to `product` and `attention`: on to `inner` and `kernel` it then takes the way
    of the product's own, in the same passes and, for the kernel, in the same sum over devices.
    """
    axes = tuple(range(1, inner.ndim - 1))
    # Not a product of matrices: the TPU would lay every map out anew for it.
    pooled = jnp.sum(inner.astype(attention.dtype) * attention[..., None], axis=axes)
    return pooled.astype(inner.dtype) @ kernel


def _pooled_product_forward(product, inner, kernel, attention):
    return pooled_product(product, inner, kernel, attention), (inner, kernel, attention)


def _pooled_product_backward(residuals, gradient):
    inner, kernel, attention = residuals
    of_pooled = over_positions(gradient @ kernel.T, inner.ndim).astype(attention.dtype)
    of_attention = jnp.sum(inner.astype(attention.dtype) * of_pooled, axis=-1)
    of_product = attention[..., None] * over_positions(gradient.astype(attention.dtype), inner.ndim)
    zeros = jnp.zeros_like(inner), jnp.zeros_like(kernel)
    return of_product.astype(gradient.dtype), *zeros, of_attention


pooled_product.defvjp(_pooled_product_forward, _pooled_product_backward)


class ContextTransform(nn.Module):
    """The bottleneck from context to update: 1x1 -> LayerNorm -> activation -> 1x1.

    Attributes:
      features: Width of the output.
      hidden_channels: Width of the bottleneck.
      norm_epsilon: 1e-5 in the paper's code, 1e-6 in timm.
      activation: Between the normalisation and the last convolution.
      zero_init: Start the last convolution at zero, weight and bias: adding is then the identity.
    """

    features: int
    hidden_channels: int
    norm_epsilon: float = 1e-5
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    zero_init: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, context: Float[Array, 'batch channel']) -> Float[Array, 'batch features']:
        options = {'dtype': self.dtype or context.dtype, 'param_dtype': self.param_dtype}
        hidden = nn.Dense(
            self.hidden_channels, kernel_init=nn.initializers.he_normal(), name='reduce', **options
        )(context)
        # All of it in float32, as flax computes it in any case.
        norm = nn.LayerNorm(self.norm_epsilon, param_dtype=self.param_dtype, name='norm')
        hidden = norm(hidden.astype(float32_or_wider(hidden.dtype))).astype(hidden.dtype)
        kernel_init = nn.initializers.zeros if self.zero_init else nn.initializers.he_normal()
        return nn.Dense(self.features, kernel_init=kernel_init, name='expand', **options)(
            self.activation(hidden)
        )


class ContextFusion(nn.Module):
    """Gives every position the same update: `features * sigmoid(scale)`, then `+ add`.

    Without parameters. Either update may be absent; scale comes first, as in the paper's code.
    """

    @nn.compact
    def __call__(
        self,
        features: Float[Array, 'batch *spatial channel'],
        *,
        scale: Float[Array, 'batch channel'] | None = None,
        add: Float[Array, 'batch channel'] | None = None,
    ) -> Float[Array, 'batch *spatial channel']:
        """Returns the fused features, in the type of `features`."""
        check_features(features, None, 'ContextFusion')
        if scale is not None:
            gate = nn.sigmoid(scale.astype(jnp.float32)).astype(features.dtype)
            features = features * over_positions(gate, features.ndim)
        if add is not None:
            features = features + over_positions(add.astype(features.dtype), features.ndim)
        return features


class GlobalContext(nn.Module):
    """The global context block: one context for all positions, transformed, and fused into each.

    With `zero_init`, `fusion='add'` starts as the exact identity, `'scale'` at half the input.

    Attributes:
      ratio: Bottleneck width over input width, in (0, 1].
      hidden_channels: The bottleneck's width itself; takes the place of `ratio` where given.
      rounding: 'floor' (mmcv) or 'nearest' (timm) for `ratio * channels`; at least 1 in both.
      pooling: 'attention' (the paper's) or 'average' (the plain mean, as in squeeze-excitation).
      fusion: 'add' (the paper's choice), 'scale', or 'scale_add': both, with a transform each.
      norm_epsilon, activation, zero_init: See ContextTransform.
      dtype: Type of the computation; None takes the input's. The softmax runs in float32 always.
      param_dtype: Type of the parameters.
    """

    ratio: float = 1 / 16
    hidden_channels: int | None = None
    rounding: str = 'floor'
    pooling: str = 'attention'
    fusion: str = 'add'
    norm_epsilon: float = 1e-5
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    zero_init: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @property
    def can_pool_first(self) -> bool:
        """Whether it takes Expanded features."""
        return self.pooling == 'attention' and self.fusion == 'add'

    @nn.compact
    def __call__(
        self,
        features: Float[Array, 'batch *spatial channel'] | Expanded,
        mask: Bool[Array, 'batch *spatial'] | None = None,
    ) -> Float[Array, 'batch *spatial channel'] | Float[Array, 'batch channel']:
        """Returns features of the same shape; for Expanded ones only the update to be added.

        Args:
          features: Floating point, with any number of spatial dimensions. Expanded features are
            for `pooling='attention'` and `fusion='add'`.
          mask: True where a position is valid. The others get no attention, so that padding never
            changes an image's context.

        Raises:
          TypeError: `features` is not floating point or `mask` is not boolean.
          ValueError: A wrong rank or shape, or an option out of range.
        """
        check_choice('pooling', self.pooling, POOLINGS)
        check_choice('fusion', self.fusion, FUSIONS)
        expanded = isinstance(features, Expanded)
        if not expanded:
            check_features(features, mask, 'GlobalContext')
        elif not self.can_pool_first:
            raise ConfigError(
                f"GlobalContext: features that are not computed yet are for pooling='attention' "
                f"and fusion='add', got {self.pooling!r} and {self.fusion!r}"
            )
        channels = features.kernel.shape[-1] if expanded else features.shape[-1]
        hidden = hidden_size(channels, self.ratio, self.hidden_channels, self.rounding)
        options = {'dtype': self.dtype, 'param_dtype': self.param_dtype}

        if self.pooling == 'attention':
            context = AttentionPool(name='pool', **options)(features, mask)
        else:
            context = average_pool(features, mask)

        def transform(name: str) -> Float[Array, 'batch channel']:
            return ContextTransform(
                channels,
                hidden,
                norm_epsilon=self.norm_epsilon,
                activation=self.activation,
                zero_init=self.zero_init,
                name=name,
                **options,
            )(context)

        if expanded:
            return transform('add')
        return ContextFusion(name='fusion')(
            features,
            scale=transform('scale') if 'scale' in self.fusion else None,
            add=transform('add') if 'add' in self.fusion else None,
        )


def weighted_sum(
    positions: Float[Array, 'batch position channel'], weights: Float[Array, 'batch position']
) -> Float[Array, 'batch channel']:
    """Sums the positions by weight, accumulating in float32; the result has the positions' type."""
    total = jnp.einsum(
        'bp,bpc->bc', weights.astype(positions.dtype), positions, preferred_element_type=jnp.float32
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
