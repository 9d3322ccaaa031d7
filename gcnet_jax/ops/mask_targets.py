"""What a mask head is trained towards: the object's mask inside a proposal, on a small grid.

Masks come as crops of fixed size around their objects, so that memory does not grow with the image.
The rule is RoIAlign's, with as many samples as pixels (`sampling_ratio=0`, `aligned=True`), on a
map of zeros and ones, rounded: where a crop has the image's resolution, the result is that of
mmdetection, which samples the whole mask (`mask_target`, `BitmapMasks.crop_and_resize`).
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt8

MASK_TARGET_SIZE = 28


def mask_targets(
    masks: UInt8[Array, 'm cells cells'],
    regions: Float[Array, 'm 4'],
    boxes: Float[Array, 'n 4'],
    objects: Int[Array, ' n'],
    image_shape: tuple[int, int],
    out: int = MASK_TARGET_SIZE,
) -> Bool[Array, 'n {out} {out}']:
    """Returns which cells of each box belong to its object: those that are covered by half.

    Args:
      masks: 1 where a cell belongs to the object; it has no pixel outside its crop.
      regions: The part of the image that each crop covers, in pixels of the image: corners (left,
        top, right, bottom), which may lie outside of the image.
      boxes: In pixels of the image, clipped to it; one without area gives an empty mask. Up to
        twice as wide and as high as the crop, which holds for all that overlap the object by half;
        for larger ones there are fewer samples than pixels.
      objects: The mask that belongs to each box.
      image_shape: Height and width of the images with their padding. Samples in the outer half of
        a pixel at their border count as in its centre.
      out: Height and width of the result.
    """
    cells = masks.shape[1]
    regions = regions[objects].astype(boxes.dtype)
    (columns, across), (rows, down) = (
        _axis_weights(boxes[:, axis::2], regions[:, axis::2], side, cells, out)
        for axis, side in ((0, image_shape[1]), (1, image_shape[0]))
    )
    chosen = masks[objects].astype(boxes.dtype)
    sums = jnp.einsum('nyh,nhw->nyw', rows, chosen, precision=lax.Precision.HIGHEST)
    sums = jnp.einsum('nxw,nyw->nyx', columns, sums, precision=lax.Precision.HIGHEST)
    # Compared with the number of samples and not divided by it: a half stays exactly a half.
    return sums >= 0.5 * jnp.maximum(across * down, 1)[:, None, None]


def _axis_weights(
    boxes: Float[Array, 'n 2'],
    regions: Float[Array, 'n 2'],
    side: int,
    cells: int,
    out: int,
) -> tuple[Float[Array, 'n {out} {cells}'], Float[Array, ' n']]:
    """The weight of every cell of the crop, along one axis, in every bin, and samples of a bin.

    Args:
      boxes: Where each box begins and ends.
      regions: Where each crop does.
      side: Length of the image.
      cells: Number of cells of a crop.
      out: Number of bins of a box.
    """
    (low, high), (origin, end) = boxes.T, regions.T
    length = end - origin
    scale = jnp.where(length > 0, cells / jnp.where(length > 0, length, 1), 0)  # Of no object: 0.

    def in_cells(place: Float[Array, ' n']) -> Float[Array, ' n']:
        # Cell 0 has its centre at 0.
        return (place - origin) * scale - 0.5

    start, step = in_cells(low), (high - low) * scale / out
    first, last = in_cells(jnp.full_like(low, 0.5)), in_cells(jnp.full_like(low, side - 0.5))
    most = -(-2 * cells // out)
    samples = jnp.minimum(jnp.ceil(step), most)
    centres = jnp.arange(cells, dtype=boxes.dtype)[None, None]

    def add_sample(index: Array, weights: Array) -> Array:
        index, bins = index.astype(boxes.dtype), jnp.arange(out, dtype=boxes.dtype)[None]
        place = (index + 0.5) / jnp.maximum(samples, 1)
        x = start[:, None] + (bins + place[:, None]) * step[:, None]
        x = jnp.clip(x, first[:, None], last[:, None])
        near = jnp.maximum(1 - jnp.abs(x[..., None] - centres), 0)
        return weights + jnp.where((index < samples)[:, None, None], near, 0)

    weights = jnp.zeros((low.shape[0], out, cells), boxes.dtype)
    return lax.fori_loop(0, most, add_sample, weights), samples
