"""Deformable convolution (Dai et al., arXiv 1703.06211), version 1, as mmcv computes it."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gcnet_jax.context.common import float32_or_wider


def deformable_convolution(
    features: Float[Array, 'batch height width channel'],
    kernel: Float[Array, 'rows columns group_channel out'],
    offsets: Float[Array, 'batch out_height out_width taps_2'],
    *,
    stride: int = 1,
    groups: int = 1,
) -> Float[Array, 'batch out_height out_width out']:
    """Convolves at places that each tap of the kernel moves by an offset of its own.

    Tap `(r, c)` of the output at `(y, x)` reads `features` at `(y * stride - rows // 2 + r + dy,
    x * stride - columns // 2 + c + dx)` by bilinear interpolation; outside the map everything is
    0. All channels share the offsets.

    Args:
      features: The input.
      kernel: Odd height and width; padded by half of them on each side.
      offsets: `dy, dx` for each tap, taps row by row, in pixels of `features`.
      stride: Step in both directions.
      groups: Number of groups that input and output channels are split into.
    """
    return _convolution(features, kernel, offsets, stride, groups)


# What is sampled is nine times as large as the output: as in mmcv the gradient samples again.
@functools.partial(jax.checkpoint, static_argnums=(3, 4))
def _convolution(features: Array, kernel: Array, offsets: Array, stride: int, groups: int) -> Array:
    rows, columns, group_channels, out = kernel.shape
    batch, out_height, out_width, _ = offsets.shape
    taps = rows * columns
    offsets = offsets.reshape(batch, out_height, out_width, taps, 2)
    # Never in bfloat16, whatever the compute type: it has eight bits, and maps are wider than 256.
    dtype = float32_or_wider(offsets.dtype)
    tap_y, tap_x = jnp.divmod(jnp.arange(taps, dtype=jnp.int32), columns)
    y = jnp.arange(out_height)[:, None, None] * stride - rows // 2 + tap_y[None, None]
    x = jnp.arange(out_width)[None, :, None] * stride - columns // 2 + tap_x[None, None]
    y = y.astype(dtype)[None] + offsets[..., 0].astype(dtype)
    x = x.astype(dtype)[None] + offsets[..., 1].astype(dtype)
    sampled = _sample(features, y, x).reshape(
        batch, out_height, out_width, taps, groups, group_channels
    )
    kernel = kernel.reshape(taps, group_channels, groups, out // groups)
    output = jnp.einsum('byxtgc,tcgo->byxgo', sampled, kernel)
    return output.reshape(batch, out_height, out_width, out)


def _sample(
    features: Float[Array, 'batch height width channel'],
    y: Float[Array, 'batch *places'],
    x: Float[Array, 'batch *places'],
) -> Float[Array, 'batch *places channel']:
    """Interpolates bilinearly; a neighbour outside the map counts as 0."""
    batch, height, width, channels = features.shape
    flat = features.reshape(batch, height * width, channels)
    top, left = jnp.floor(y), jnp.floor(x)
    output = jnp.zeros((), features.dtype)
    for row, weight_y in ((top, top + 1 - y), (top + 1, y - top)):
        for column, weight_x in ((left, left + 1 - x), (left + 1, x - left)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            weight = jnp.where(inside, weight_y * weight_x, 0).astype(features.dtype)
            index = jnp.where(inside, row * width + column, 0).astype(jnp.int32)
            rows = jnp.take_along_axis(flat, index.reshape(batch, -1, 1), axis=1)
            output += weight[..., None] * rows.reshape(*index.shape, channels)
    return output
