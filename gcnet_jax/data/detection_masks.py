"""Masks of objects as crops of a fixed size, so that memory does not grow with the image.

A polygon or run lengths are drawn at the size of the original image, and that bitmap is resized by
the nearest neighbour, as in mmdetection. Of the resized bitmap only the part around the object's
box is made: pixel by pixel where the box fits into the crop, at a lower resolution where not.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int, UInt8

from gcnet_jax.data import jpeg
from gcnet_jax.data.coco_masks import decode_counts, segmentation_error
from gcnet_jax.errors import DataError


class ResizedGrid(NamedTuple):
    """Where the pixels of a resized and possibly mirrored image come from in the original one.

    Attributes:
      rows: Row of the original for each row of the result.
      columns: Likewise.
    """

    rows: Int[np.ndarray, ' height']
    columns: Int[np.ndarray, ' width']


def resized_grid(size: tuple[int, int], resized: tuple[int, int], mirrored: bool) -> ResizedGrid:
    """Returns the grid of OpenCV's resize by the nearest neighbour.

    Args:
      size: Height and width of the original image.
      resized: Those of the result.
      mirrored: Whether left and right are exchanged after resizing.
    """
    rows, columns = map(_nearest, size, resized)
    return ResizedGrid(rows, columns[::-1] if mirrored else columns)


def _nearest(length: int, resized: int) -> Int[np.ndarray, ' resized']:
    # OpenCV is asked, so that its rounding is followed whatever its version.
    cv2 = jpeg.opencv()
    places = np.arange(length, dtype=np.float32)[None]
    return cv2.resize(places, (resized, 1), interpolation=cv2.INTER_NEAREST)[0].astype(np.int64)


def draw_mask(segmentation: Any, size: tuple[int, int]) -> UInt8[np.ndarray, 'height width']:
    """Draws a segmentation as pycocotools does: 1 inside, else 0.

    Args:
      segmentation: Polygons or run lengths, as in COCO.
      size: Height and width of the image.

    Raises:
      DataError: It is none, or not of this size.
    """
    from pycocotools import mask as coco_masks

    # Of a stored set, but pycocotools trusts its input, see `coco_masks`.
    problem = segmentation_error(segmentation, size)
    if problem:
        raise DataError(f'a segmentation {problem}')
    if isinstance(segmentation, list):
        merged = coco_masks.merge(coco_masks.frPyObjects(segmentation, *size))
        counts = decode_counts(merged['counts'].decode('ascii'))
    elif isinstance(segmentation['counts'], list):
        counts = segmentation['counts']
    else:
        counts = decode_counts(segmentation['counts'])
    # Down the columns, outside and inside in turns.
    values = (np.arange(len(counts)) % 2).astype(np.uint8)
    return np.repeat(values, counts).reshape(size[::-1]).T


def crop_mask(
    mask: UInt8[np.ndarray, 'height width'],
    box: Float[np.ndarray, '4'],
    grid: ResizedGrid,
    canvas: tuple[int, int],
    cells: int,
) -> tuple[UInt8[np.ndarray, 'cells cells'], Float32[np.ndarray, '4']]:
    """Crops the resized mask to the surroundings of a box.

    Along an axis on which the box, rounded outward to pixels, is at most `cells` long, a cell is a
    pixel of the resized mask; the crop is centred at the box and stays on the canvas if it can.
    Along the other the crop covers the box, and a cell is 1 where half of it is inside or more.

    Args:
      mask: Of the original image, 1 inside.
      box: Left, top, right and bottom in pixels of the resized image.
      grid: Of the resized image.
      canvas: Height and width of the padded image.
      cells: Height and width of the crop.

    Returns:
      The crop, 0 where there is no image, and left, top, right and bottom of what it covers, in
      pixels of the resized image.
    """
    left, right = _window(box[0], box[2], canvas[1], cells)
    top, bottom = _window(box[1], box[3], canvas[0], cells)
    part = mask[grid.rows[top:bottom, None], grid.columns[left:right]]
    crop = np.zeros((bottom - top, right - left), np.uint8)
    crop[: part.shape[0], : part.shape[1]] = part
    if crop.shape != (cells, cells):
        cv2 = jpeg.opencv()
        shares = cv2.resize(255 * crop, (cells, cells), interpolation=cv2.INTER_AREA)
        crop = (shares >= 128).astype(np.uint8)
    return crop, np.array((left, top, right, bottom), np.float32)


def _window(low: float, high: float, limit: int, cells: int) -> tuple[int, int]:
    """Returns the first pixel that a crop covers along an axis, and the one after the last."""
    first, last = math.floor(low), math.ceil(high)
    if last - first > cells:
        return first, last
    start = max(min((first + last - cells) // 2, limit - cells), 0)
    return start, start + cells
