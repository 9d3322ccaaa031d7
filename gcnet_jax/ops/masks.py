"""Masks of instances on the host: a network's small mask, laid into its box in the image.

The rule is mmdetection's (`_do_paste_mask` of `fcn_mask_head.py`): the centre of each pixel is
mapped into the box, the small mask is interpolated there bilinearly, with zeros around it, and the
pixel belongs to the instance where the value is at least a half. The interpolation is separable, so
rows are blended first, then columns. Pixels that this leaves in doubt are computed as PyTorch's
`grid_sample` computes them on a CPU, in float32 with fused multiply-adds, so that masks agree to
the last pixel.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

THRESHOLD = 0.5
# Rows and columns of zeros around the small mask: one that takes part in the interpolation, and one
# more for pixels farther away.
BORDER = 2
# Many times the rounding errors of blending along one axis after the other.
DOUBT = 1e-5


class PastedMask(NamedTuple):
    """The part of an image that an instance can cover; all other pixels are outside of it.

    Attributes:
      top, left: Where the part begins, in pixels of the image.
      inside: Which of its pixels belong to the instance.
    """

    top: int
    left: int
    inside: Bool[np.ndarray, 'rows columns']


def paste_mask(
    probabilities: Float[np.ndarray, 'mask_height mask_width'],
    box: Float[np.ndarray, '4'],
    size: tuple[int, int],
) -> PastedMask:
    """Lays a small mask into its box.

    A box without area gives an empty mask. (mmdetection fills a strip around it, whose extent
    depends on the device.)

    Args:
      probabilities: How likely each cell of the box belongs to the instance, float32.
      box: Left, top, right and bottom in pixels of the image, float32.
      size: Height and width of the image.
    """
    left, top, right, bottom = np.asarray(box, np.float32)
    if not (np.isfinite(box).all() and right > left and bottom > top):
        return PastedMask(0, 0, np.zeros((0, 0), bool))
    # One pixel more on each side, as in mmdetection: beyond, less than half of the interpolation's
    # weight is inside the mask.
    first_row, rows, down = _places(top, bottom, size[0], probabilities.shape[0])
    first_column, columns, across = _places(left, right, size[1], probabilities.shape[1])
    cells = np.pad(np.asarray(probabilities, np.float32), BORDER)
    # Not as matrix products: on a busy machine numpy's threads wait for each other.
    blended = cells[rows] * (1 - down)[:, None] + cells[rows + 1] * down[:, None]
    values = np.take(blended, columns, axis=1)
    values *= 1 - across
    values += np.take(blended, columns + 1, axis=1) * across
    y, x = np.nonzero(np.abs(values - THRESHOLD) < DOUBT)
    values[y, x] = _interpolate(cells, rows[y], columns[x], down[y], across[x])
    return PastedMask(first_row, first_column, values >= THRESHOLD)


def _places(
    low: np.float32, high: np.float32, length: int, cells: int
) -> tuple[int, Int[np.ndarray, ' pixels'], Float[np.ndarray, ' pixels']]:
    """Returns where a box's pixels lie in the small mask, along one axis.

    Returns:
      The first pixel, then for each pixel the cell at or before its centre, counted from the border
      of zeros, and the weight of the cell after it.
    """
    start = int(max(np.floor(low) - 1, 0))
    stop = max(int(min(np.ceil(high) + 1, length)), start)
    centres = np.arange(start, stop, dtype=np.float32) + np.float32(0.5)
    # From -1 to 1 in the box first, as `grid_sample` takes it.
    place = (centres - low) / (high - low) * 2 - 1
    place = _multiply_add(place + 1, np.float32(cells / 2), np.float32(-0.5))
    before = np.floor(place)
    index = np.clip(before, -BORDER, cells).astype(np.int64) + BORDER
    return start, index, place - before


def _interpolate(
    cells: Float[np.ndarray, 'rows columns'],
    row: Int[np.ndarray, ' pixels'],
    column: Int[np.ndarray, ' pixels'],
    down: Float[np.ndarray, ' pixels'],
    across: Float[np.ndarray, ' pixels'],
) -> Float[np.ndarray, ' pixels']:
    """Interpolates at single pixels, rounding where `grid_sample` rounds."""
    up, back = 1 - down, 1 - across
    value = cells[row, column] * (back * up)
    value = _multiply_add(cells[row, column + 1], across * up, value)
    value = _multiply_add(cells[row + 1, column], back * down, value)
    return _multiply_add(cells[row + 1, column + 1], across * down, value)


def _multiply_add(
    factor: Float[np.ndarray, ' n'], other: Float[np.ndarray, ' n'] | np.float32, term: object
) -> Float[np.ndarray, ' n']:
    """Returns `factor * other + term` in float32, rounded once."""
    # The product of two float32 is exact in float64.
    return (factor.astype(np.float64) * np.float64(other) + term).astype(np.float32)


def run_lengths(mask: PastedMask, size: tuple[int, int]) -> list[int]:
    """Returns COCO's uncompressed run lengths of a mask in an image of `(height, width)`.

    They go down the columns, from left to right: first the number of pixels outside, then inside,
    and so on. Neither the whole mask nor the whole image is made.
    """
    height, width = size
    rows = mask.inside.shape[0]
    edges = np.diff(np.pad(mask.inside, ((1, 1), (0, 0))).astype(np.int8), axis=0)
    # Each run begins at an edge of +1 and ends at one of -1, which come in turns down a column.
    column, row = np.nonzero(edges.T)
    places = (mask.left + column) * height + mask.top + row
    if rows == height:
        # A run that reaches the bottom goes on at the top of the next column.
        joined = np.flatnonzero(np.diff(places) == 0)
        places = np.delete(places, np.concatenate([joined, joined + 1]))
    counts = np.diff(places, prepend=0, append=height * width).tolist()
    return counts if counts[-1] or len(counts) == 1 else counts[:-1]
