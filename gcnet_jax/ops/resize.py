"""Bilinear resizing by the rules of PyTorch's `interpolate`, without antialiasing."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def resize_bilinear(
    values: Float[Array, 'batch height width channel'],
    size: tuple[int, int],
    *,
    align_corners: bool = False,
) -> Float[Array, 'batch new_height new_width channel']:
    """Resizes maps, one product with a matrix of weights per axis.

    Args:
      values: Of any height and width.
      size: Height and width of the result.
      align_corners: Whether the centres of the outermost positions agree, instead of their edges.
    """
    for axis, new in ((1, size[0]), (2, size[1])):
        old = values.shape[axis]
        if old == new:
            continue
        weights = jnp.asarray(resize_weights(old, new, align_corners), values.dtype)
        values = jnp.moveaxis(
            jnp.tensordot(weights, values, axes=(1, axis), precision=jax.lax.Precision.HIGHEST),
            0,
            axis,
        )
    return values


def resize_weights(old: int, new: int, align_corners: bool) -> Float[np.ndarray, 'new old']:
    """Returns the weight of each old position in each new one; every row adds up to 1.

    Places are rounded to float32 where PyTorch rounds them: with exact ones, far from the origin,
    a weight would differ by up to 1e-4.
    """
    places = np.arange(new, dtype=np.float64)
    if align_corners:
        step = np.float32(old - 1) / np.float32(max(new - 1, 1))
        centres = (places * step).astype(np.float32)
    else:
        step = np.float32(old) / np.float32(new)
        centres = np.maximum(((places + 0.5) * step - 0.5).astype(np.float32), 0)
    low = np.minimum(np.floor(centres).astype(int), old - 1)
    high = np.minimum(low + 1, old - 1)
    share = centres - low.astype(np.float32)
    weights = np.zeros((new, old), np.float32)
    np.add.at(weights, (np.arange(new), low), 1 - share)
    np.add.at(weights, (np.arange(new), high), share)
    return weights
