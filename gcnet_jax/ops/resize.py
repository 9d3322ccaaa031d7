"""Bilinear resizing by the rules of PyTorch's `interpolate`, without antialiasing."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


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
    """Returns the weight of each old position in each new one; every row adds up to 1."""
    low, high, share = resize_places(old, new, align_corners)
    weights = np.zeros((new, old), np.float32)
    np.add.at(weights, (np.arange(new), low), 1 - share)
    np.add.at(weights, (np.arange(new), high), share)
    return weights


def resize_places(
    old: int, new: int, align_corners: bool
) -> tuple[Int[np.ndarray, ' new'], Int[np.ndarray, ' new'], Float[np.ndarray, ' new']]:
    """Returns the two old positions that each new one lies between, and the share of the second.

    Places are rounded to float32 where PyTorch rounds them: with exact ones, far from the origin,
    a share would differ by up to 1e-4.
    """
    places = np.arange(new, dtype=np.float64)
    if align_corners:
        step = np.float32(old - 1) / np.float32(max(new - 1, 1))
        centres = (places * step).astype(np.float32)
    else:
        step = np.float32(old) / np.float32(new)
        centres = np.maximum(((places + 0.5) * step - 0.5).astype(np.float32), 0)
    low = np.minimum(np.floor(centres).astype(int), old - 1)
    return low, np.minimum(low + 1, old - 1), centres - low.astype(np.float32)


def map_resized(
    function: Callable[[Array], Array],
    values: Float[Array, 'batch height width channel'],
    size: tuple[int, int],
    *,
    align_corners: bool = False,
    max_values: int,
) -> Array:
    """Applies a function to resized maps without holding all of them in memory.

    Equal to `function(resize_bilinear(values, size))` up to rounding, one block of rows at a time:
    the resized maps of a large image with many classes take gigabytes, their maxima megabytes.
    Neighbours are gathered, because weight matrices of long sides are large.

    Args:
      function: Returns `[batch, rows, new_width, ...]` of any number of rows of the result.
      values: Of any height and width.
      size: Height and width of the result.
      align_corners: See `resize_bilinear`.
      max_values: Largest number of resized values in a block, which has at least one row.
    """
    if tuple(values.shape[1:3]) == size:
        return function(values)
    batch, old_height, old_width, channels = values.shape
    rows = resize_places(old_height, size[0], align_corners)
    columns = resize_places(old_width, size[1], align_corners)
    block = min(size[0], max(1, max_values // (batch * size[1] * channels)))
    count = -(-size[0] // block)
    # The last block is filled up with repetitions of the last row.
    last = np.minimum(np.arange(count * block), size[0] - 1).reshape(count, block)

    def compute(places: tuple[Array, Array, Array]) -> Array:
        return function(_between(_between(values, places, 1), columns, 2))

    if count == 1:
        return compute(rows)
    found = jax.lax.map(compute, tuple(jnp.asarray(each[last]) for each in rows))
    found = jnp.moveaxis(found, 0, 1)
    return found.reshape(batch, count * block, *found.shape[3:])[:, : size[0]]


def _between(values: Array, places: tuple[Array, Array, Array], axis: int) -> Array:
    low, high, share = places
    ones = (1,) * axis, (1,) * (values.ndim - axis - 1)
    share = jnp.asarray(share, values.dtype).reshape(*ones[0], -1, *ones[1])
    first, second = (jnp.take(values, jnp.asarray(index), axis=axis) for index in (low, high))
    return first * (1 - share) + second * share
