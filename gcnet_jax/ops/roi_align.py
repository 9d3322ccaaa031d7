"""RoIAlign over a feature pyramid (He et al., arXiv 1703.06870), as mmdetection 2 and later use it.

Each bin of a box averages bilinear samples: `ceil(bin size)` of them along each axis (mmcv's
`sampling_ratio=0`), at positions shifted by half a pixel (`aligned=True`). Interpolation and mean
both factor by axis, so a box is two small matrix products with a window of its level's map. Windows
come in a few static shapes; boxes are sorted by the shape that they need and computed in chunks.

It is linear in the maps, and its transpose is written out: left to JAX, the gradient would be a sum
over the chunks of gradients that are each as large as all maps.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import linear_call
from jaxtyping import Array, Float, Int

from gcnet_jax.context.common import float32_or_wider
from gcnet_jax.ops.boxes import box_area

# A box of this size (the square root of its area, in pixels) is the smallest of the second level.
FINEST_SCALE = 56
# Height and width of the windows, tried in this order. Below the last level a box has fewer than
# 28 x 28 pixels of its map, so that only elongated ones do not fit into the first shapes.
WINDOWS = ((16, 16), (16, 32), (32, 16), (32, 32), (16, 64), (64, 16))
# Boxes that are computed together: many, because a step of a loop costs an accelerator more than
# what it computes; and as few as a CPU's cache holds the windows of.
CHUNK, CPU_CHUNK = 16, 4


def pyramid_level(boxes: Float[Array, 'n 4'], levels: int) -> Int[Array, ' n']:
    """Returns the level of the pyramid that each box belongs to; 0 is the finest."""
    scale = jnp.sqrt(box_area(boxes)) / FINEST_SCALE
    return jnp.clip(jnp.floor(jnp.log2(scale + 1e-6)), 0, levels - 1).astype(jnp.int32)


def roi_align(
    pyramid: Sequence[Float[Array, 'batch _ _ channel']],
    strides: Sequence[int],
    boxes: Float[Array, 'n 4'],
    images: Int[Array, ' n'],
    out: int,
) -> Float[Array, 'n {out} {out} channel']:
    """Samples a square of features for each box, from the level that fits its size.

    Args:
      pyramid: One map for each level, the finest first.
      strides: Pixels of the image to one pixel of each map.
      boxes: In pixels of the image, clipped to it. They get no gradient, as in mmcv.
      images: The index in the batch of the image that each box lies in.
      out: Height and width of the result.

    Returns:
      Features in the type of the maps; a box without area gives zeros.
    """
    boxes = lax.stop_gradient(boxes.astype(float32_or_wider(boxes.dtype)))
    shapes = np.array([features.shape[1:3] for features in pyramid])
    level = pyramid_level(boxes, len(pyramid))
    batch, channels = pyramid[0].shape[0], pyramid[0].shape[-1]
    flat = jnp.concatenate([features.reshape(-1, channels) for features in pyramid])
    first_row = np.concatenate([[0], np.cumsum(batch * shapes.prod(axis=1))[:-1]])

    lengths = jnp.asarray(shapes)[level]  # Height and width of each box's map.
    scale = jnp.asarray(strides, boxes.dtype)[level][:, None]
    start = boxes[:, 1::-1] / scale - 0.5  # Top and left in pixels of the map.
    size = boxes[:, 3:1:-1] / scale - boxes[:, 1::-1] / scale
    origin = jnp.asarray(first_row, jnp.int32)[level] + images * lengths.prod(axis=1)

    last = (lengths - 1).astype(boxes.dtype)
    low = jnp.clip(jnp.floor(start), 0, last).astype(jnp.int32)
    high = jnp.clip(jnp.floor(start + size) + 1, 0, last).astype(jnp.int32)
    windows = _window_shapes(shapes)
    fits = jnp.stack([(high - low < jnp.asarray(w)[None]).all(axis=1) for w in windows], axis=1)
    kind = jnp.argmax(fits, axis=1).astype(jnp.int32)

    boxes = (low, start, size, lengths, origin)
    chunks = partial(_by_platform, windows=windows, out=out)
    return linear_call(
        partial(chunks, _sample_by_kind),
        partial(chunks, partial(_spread_by_kind, positions=len(flat))),
        (kind, boxes),
        flat,
    )


def _by_platform(
    compute: Callable, boxes: tuple[Array, tuple[Array, ...]], values: Array, **options: Any
) -> Array:
    """Calls one of the two functions below with as many boxes in a chunk as the platform does best.

    Args:
      compute: Which of them.
      boxes: The window that each needs, and what `_axis_products` needs to know of each.
      values: Of the maps, or of the boxes.
      options: Their keywords.
    """
    kind, boxes = boxes
    return lax.platform_dependent(
        values,
        kind,
        boxes,
        cpu=partial(compute, together=CPU_CHUNK, **options),
        default=partial(compute, together=CHUNK, **options),
    )


def _sample_by_kind(
    flat: Float[Array, 'position channel'],
    kind: Int[Array, ' n'],
    boxes: tuple[Array, ...],
    *,
    windows: Sequence[tuple[int, int]],
    out: int,
    together: int,
) -> Float[Array, 'n {out} {out} channel']:
    """Samples boxes in chunks that need the same window.

    Args:
      flat: All positions of all maps of all images.
      kind: The window that each box needs.
      boxes: What `_sample_window` needs to know of each.
      windows: Height and width of each.
      out: Height and width of the result.
      together: Boxes of a chunk.
    """
    slots, place, chunk_kinds, _ = _by_kind(kind, len(windows), together)
    parts = jax.tree.map(
        lambda values: values[slots].reshape(-1, together, *values.shape[1:]), boxes
    )
    branches = [partial(_sample_window, flat, window, out) for window in windows]
    result = lax.map(lambda part: lax.switch(part[0], branches, part[1]), (chunk_kinds, parts))
    return result.reshape(-1, *result.shape[2:])[place]


def _spread_by_kind(
    values: Float[Array, 'n {out} {out} channel'],
    kind: Int[Array, ' n'],
    boxes: tuple[Array, ...],
    *,
    windows: Sequence[tuple[int, int]],
    out: int,
    together: int,
    positions: int,
) -> Float[Array, 'position channel']:
    """The transpose of `_sample_by_kind`: adds what each box gives to the positions it sampled.

    The chunks of one kind of window after the other change one array in place.

    Args:
      values: Of every box.
      kind, boxes, windows, out, together: As there.
      positions: Of all maps of all images.
    """
    slots, place, _, ends = _by_kind(kind, len(windows), together)
    # Slots that repeat a box to fill a chunk give nothing.
    values = jnp.zeros((len(slots), *values.shape[1:]), values.dtype).at[place].set(values)
    widest = max(width for _, width in windows)
    flat = jnp.zeros((positions + widest, values.shape[-1]), values.dtype)

    def add_chunk(window: tuple[int, int], index: Array, flat: Array) -> Array:
        chosen = lax.dynamic_slice_in_dim(slots, index * together, together)
        given = lax.dynamic_slice_in_dim(values, index * together, together)
        part = jax.tree.map(lambda of_boxes: of_boxes[chosen], boxes)
        first, rows, columns = _axis_products(window, out, part)
        given = jnp.einsum('nxw,nyxc->nywc', columns.astype(flat.dtype), given)
        given = jnp.einsum('nyh,nywc->nhwc', rows.astype(flat.dtype), given)
        # The positions of a window's row are neighbours: row by row.
        numbers = lax.ScatterDimensionNumbers((2, 3), (), (0,))
        return lax.scatter_add(flat, first[..., None], given, numbers)

    start = jnp.zeros((), ends.dtype)
    for window, end in zip(windows, ends, strict=True):
        flat = lax.fori_loop(start, end, partial(add_chunk, window), flat)
        start = end
    return flat[:positions]


def _sample_window(
    flat: Float[Array, 'position channel'],
    window: tuple[int, int],
    out: int,
    boxes: tuple[Array, ...],
) -> Float[Array, 'chunk {out} {out} channel']:
    """Samples boxes that fit into a window of fixed height and width.

    Args:
      flat: All positions of all maps of all images.
      window: Height and width.
      out: Height and width of the result.
      boxes: For each box: its first row and column, and in pixels of its map its start, its size,
        the map's height and width, and where the map begins in `flat`.
    """
    first, rows, columns = _axis_products(window, out, boxes)
    index = first[..., None] + jnp.arange(window[1])[None, None]
    features = flat.at[index].get(mode='clip')
    features = jnp.einsum('nyh,nhwc->nywc', rows.astype(flat.dtype), features)
    return jnp.einsum('nxw,nywc->nyxc', columns.astype(flat.dtype), features)


def _axis_products(
    window: tuple[int, int], out: int, boxes: tuple[Array, ...]
) -> tuple[Int[Array, 'n rows'], Float[Array, 'n {out} rows'], Float[Array, 'n {out} columns']]:
    """Returns where each row of a window begins, and its rows' and its columns' weights.

    Beyond the right edge of a map the next row begins, beyond the map the next level: weight 0.
    """
    low, start, size, lengths, origin = boxes
    corner = jnp.clip(low, 0, jnp.maximum(lengths - jnp.asarray(window)[None], 0))
    rows, columns = (
        _axis_weights(start[:, a], size[:, a], lengths[:, a], corner[:, a], window[a], out)
        for a in (0, 1)
    )
    y = corner[:, :1] + jnp.arange(window[0])[None]
    return origin[:, None] + y * lengths[:, 1:] + corner[:, 1:], rows, columns


def _window_shapes(shapes: np.ndarray) -> list[tuple[int, int]]:
    """Every window, no larger than the maps; the last three have room for whatever is left."""
    (tallest, widest), last = shapes.max(axis=0).tolist(), tuple(shapes[-1].tolist())
    rest = (last, (32, widest), (tallest, 32))
    windows = ((min(height, tallest), min(width, widest)) for height, width in (*WINDOWS, *rest))
    return list(dict.fromkeys(windows))  # On small maps some are the same.


def _by_kind(kind: Int[Array, ' n'], kinds: int, together: int) -> tuple[Array, ...]:
    """Lays boxes out in chunks of one kind of window each.

    Returns:
      The box in each slot (the first box where a kind does not fill its last chunk), the slot of
      each box, the kind of each chunk, and the end of each kind's chunks; chunks that are left over
      get the smallest window.
    """
    count = kind.shape[0]
    chunks = -(-count // together) + kinds
    counts = jnp.bincount(kind, length=kinds)
    needed = -(-counts // together)
    ends = jnp.cumsum(needed)
    order = jnp.argsort(kind, stable=True).astype(jnp.int32)
    rank = jnp.arange(count) - (jnp.cumsum(counts) - counts)[kind[order]]
    filled = ((ends - needed)[kind[order]] * together + rank).astype(jnp.int32)
    slots = jnp.zeros(chunks * together, jnp.int32).at[filled].set(order)
    place = jnp.zeros(count, jnp.int32).at[order].set(filled)
    chunk_kinds = jnp.searchsorted(ends, jnp.arange(chunks), side='right')
    return slots, place, jnp.where(chunk_kinds < kinds, chunk_kinds, 0), ends


def _axis_weights(
    start: Float[Array, ' n'],
    size: Float[Array, ' n'],
    length: Int[Array, ' n'],
    corner: Int[Array, ' n'],
    window: int,
    out: int,
) -> Float[Array, 'n {out} {window}']:
    """The weight of every pixel of a window, along one axis, in every bin."""
    step = size / out
    samples = jnp.ceil(step)  # In each bin.
    pixels = (corner[:, None] + jnp.arange(window)[None]).astype(start.dtype)
    last = (length - 1).astype(start.dtype)[:, None]

    def add_sample(index: Array, weights: Array) -> Array:
        index, bins = index.astype(start.dtype), jnp.arange(out, dtype=start.dtype)[None]
        place = (index + 0.5) / jnp.maximum(samples, 1)
        x = start[:, None] + (bins + place[:, None]) * step[:, None]
        counts = (index < samples)[:, None] & (x >= -1) & (x <= last + 1)
        x = jnp.clip(x, 0, last)
        near = jnp.maximum(1 - jnp.abs(x[..., None] - pixels[:, None, :]), 0)
        return weights + jnp.where(counts[..., None], near, 0)

    weights = jnp.zeros((start.shape[0], out, window), start.dtype)
    most = jnp.max(samples, initial=0).astype(jnp.int32)
    weights = lax.fori_loop(0, most, add_sample, weights)
    return weights / jnp.maximum(samples, 1)[:, None, None]
