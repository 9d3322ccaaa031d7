"""Checks of COCO's segmentations before pycocotools sees them.

pycocotools is C that trusts its input: run lengths that end early are read past their end, and a
polygon with far corners takes memory for every point of its outline. What passes these checks is
safe to give to it.
"""

from typing import Any

import numpy as np
from jaxtyping import Int

from gcnet_jax.errors import one_line

# Corners of polygons, in pixels; far beyond every image.
MAX_COORDINATE = 1_000_000
# pycocotools walks along the outline in steps of a fifth of a pixel and keeps some 40 bytes a step.
MAX_OUTLINE = 2_000_000
# Characters of one compressed count: seven hold 34 bits.
MAX_CHARACTERS = 7
# Compressed counts are text of 64 characters; each holds five bits and whether more follow.
FIRST_CHARACTER, MORE, SIGN = 48, 0x20, 0x10


def segmentation_error(segmentation: Any, size: tuple[int, int]) -> str | None:
    """Returns what is wrong with a segmentation, in a few words; None if nothing is.

    Args:
      segmentation: As JSON has it: a list of polygons, each `[x1, y1, x2, y2, ...]`, or a
        dictionary with `size`, `[height, width]`, and `counts`, a list of numbers or compressed
        text.
      size: Height and width of the image.
    """
    if isinstance(segmentation, list):
        return next(filter(None, (_polygon_error(polygon) for polygon in segmentation)), None)
    if not isinstance(segmentation, dict) or not {'size', 'counts'} <= segmentation.keys():
        return 'is neither a list of polygons nor run lengths with size and counts'
    if segmentation['size'] != list(size):
        return (
            f'is of size {one_line(segmentation["size"], 40)} in an image of height {size[0]} '
            f'and width {size[1]}'
        )
    counts = segmentation['counts']
    if isinstance(counts, str):
        counts = decode_counts(counts)
        if counts is None:
            return 'has damaged compressed run lengths'
    elif not isinstance(counts, list) or not all(type(count) is int for count in counts):
        return 'has run lengths that are no whole numbers'
    # In Python's integers, which do not overflow: the counts may be anything up to here.
    total = sum(map(int, counts))
    if not len(counts) or min(counts) < 0 or total != size[0] * size[1]:
        return f'has run lengths that do not add up to {size[0]} x {size[1]} pixels'
    return None


def _polygon_error(polygon: Any) -> str | None:
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        return 'has a polygon that is no list of x and y of three or more corners'
    # Neither NaN nor an integer of a thousand digits gets through.
    if not all(
        type(number) in (int, float) and -MAX_COORDINATE <= number <= MAX_COORDINATE
        for number in polygon
    ):
        return f'has a polygon with a corner that is no number up to {MAX_COORDINATE:,} pixels'
    corners = np.array(polygon, np.float64).reshape(-1, 2)
    if np.abs(corners - np.roll(corners, -1, axis=0)).max(axis=1).sum() > MAX_OUTLINE:
        return f'has a polygon with an outline of more than {MAX_OUTLINE:,} pixels'
    return None


def decode_counts(text: str) -> Int[np.ndarray, ' runs'] | None:
    """Decodes COCO's compressed run lengths; None where they are damaged.

    Each number is written in groups of five bits, the lowest first; from the fourth number on it
    is the difference from the number two before (`rleFrString` in pycocotools' `maskApi.c`).
    """
    if not text or not text.isascii():
        return None
    characters = np.frombuffer(text.encode('ascii'), np.uint8).astype(np.int64) - FIRST_CHARACTER
    if characters.min() < 0 or characters.max() > 0x3F or characters[-1] & MORE:
        return None
    ends = np.flatnonzero(~characters & MORE)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > MAX_CHARACTERS:
        return None
    places = np.arange(len(characters)) - np.repeat(starts, lengths)
    counts = np.add.reduceat((characters & 0x1F) << (5 * places), starts)
    counts -= np.where(characters[ends] & SIGN, 1 << (5 * lengths), 0)
    counts[1::2] = np.cumsum(counts[1::2])
    counts[2::2] = np.cumsum(counts[2::2])
    return counts
