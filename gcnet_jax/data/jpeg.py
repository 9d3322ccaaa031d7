"""A part of a JPEG, decoded and resized at the least cost: what training needs of most images.

libjpeg-turbo decodes (simplejpeg) and OpenCV resizes. Anything but an ordinary, intact JPEG gives
None here: it is Pillow's, whose word on what is damaged counts.
"""

import functools
import math
import threading
from types import ModuleType
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from gcnet_jax.data.image_limits import JPEG_START_OF_SCAN, count_scans
from gcnet_jax.data.sizes import Size, height_and_width

RGB = UInt8[np.ndarray, 'height width 3']
Box = tuple[int, int, int, int]

# Shares of the resolution at which libjpeg-turbo decodes fast.
SHRINKS = (8, 4, 2)
# The byte that begins every segment, and the segments that this module looks for.
MARKER = 0xFF
BASELINE = (0xC0, 0xC1)
OTHER_FRAMES = (0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
# Rows below a part that its last row depends on, where the colours are stored at a quarter of the
# resolution and interpolated; more than that are decoded.
CONTEXT_ROWS = 8
# Bytes that a thread keeps for the pixels of an image; larger images get new memory.
ROOM = 2**22
# Largest share of a neighbour in one smoothing; the middle pixel's would be far below zero.
LARGEST_SIDE = 0.6
# Bytes that are searched for the size; profiles and previews stand in front of it.
LONGEST_HEADER = 2**20


class Frame(NamedTuple):
    """What the header says.

    Attributes:
      height: Height of the image in pixels.
      width: Width of the image in pixels.
      height_place: Offset in the data of the height, which is two bytes.
    """

    height: int
    width: int
    height_place: int


def read_frame(data: bytes) -> Frame | None:
    """Returns the size of an intact baseline JPEG in grey or three colours, None for anything else.

    A JPEG that does not end in its end marker may have lost its end. Progressive and CMYK images
    and those of several scans are rare.

    Raises:
      DataError: If it has more scans than are read.
    """
    if not (data.startswith(b'\xff\xd8\xff') and data.endswith(b'\xff\xd9')):
        return None
    place = 2
    end = min(len(data), LONGEST_HEADER)
    while place + 10 <= end and data[place] == MARKER:
        kind, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4])
        if kind in BASELINE:
            height = int.from_bytes(data[place + 5 : place + 7])
            width = int.from_bytes(data[place + 7 : place + 9])
            usual = data[place + 4] == 8 and data[place + 9] in (1, 3) and height and width
            if usual and data.count(JPEG_START_OF_SCAN) > 1:  # Previews have scans of their own.
                usual = count_scans(data, (width, height)) == 1
            return Frame(height, width, place + 5) if usual else None
        if kind in OTHER_FRAMES or not 0xC0 <= kind <= 0xFE or 0xD0 <= kind <= 0xDA:
            return None
        place += 2 + length
    return None


def decode_crop(data: bytes, frame: Frame, box: Box, size: Size) -> RGB | None:
    """Decodes a JPEG no further than a crop needs, and resizes the crop.

    Args:
      data: An image of which `read_frame` made `frame`.
      frame: Its header.
      box: Left, top, right and bottom of the crop, in pixels.
      size: Height and width wanted; one number for a square. A crop at least twice as large on both
        sides is decoded at a half, a quarter or an eighth of its resolution, whichever is the least
        that is not below this.

    Returns:
      A copy of the crop, or None if libjpeg-turbo cannot read the image.
    """
    height, width = height_and_width(size)
    ratio = min((box[2] - box[0]) / width, (box[3] - box[1]) / height)
    shrink = next((shrink for shrink in SHRINKS if shrink <= ratio), 1)
    image = decode_rows(
        data, frame, box[3], shrink, plain_colours=ratio > 1, buffer=_scratch.decoded
    )
    if image is None:
        return None
    # A pixel of the smaller image stands for `shrink` pixels a side, so edges may lie within one.
    return resize_part(image, tuple(edge / shrink for edge in box), size)


def decode_rows(
    data: bytes,
    frame: Frame,
    bottom: int,
    shrink: int = 1,
    *,
    plain_colours: bool = False,
    buffer: np.ndarray | None = None,
) -> RGB | None:
    """Decodes the rows above `bottom`, and some below it, at a share of the resolution.

    Args:
      data: An image of which `read_frame` made `frame`.
      frame: Its header.
      bottom: The first row that is not needed, in pixels of the full image.
      shrink: 1, 2, 4 or 8: decode at one over this of the resolution.
      plain_colours: Repeat colours that are stored at a lower resolution than the brightness, and
        do not interpolate them, which is faster; for an image that is made smaller anyway.
      buffer: Bytes to put the pixels into, if they have room there.

    Returns:
      The pixels that Pillow would have in these rows, bit for bit without `plain_colours`, or None
      if libjpeg-turbo cannot read them.
    """
    import simplejpeg

    height = min(frame.height, bottom + CONTEXT_ROWS * shrink)
    if height < frame.height:
        # libjpeg-turbo stops where the header says that the image ends.
        place = frame.height_place
        data = b''.join((data[:place], height.to_bytes(2), data[place + 2 :]))
    small_height, small_width = -(-height // shrink), -(-frame.width // shrink)
    if buffer is not None and buffer.size < 3 * small_height * small_width:
        buffer = None
    try:
        return simplejpeg.decode_jpeg(
            data,
            min_height=small_height,
            min_width=small_width,
            min_factor=shrink,
            fastupsample=plain_colours,
            buffer=buffer,
            strict=False,  # The rows that are left over would be an error.
        )
    except ValueError:
        return None


def resize_part(image: RGB, box: tuple[float, float, float, float], size: Size) -> RGB:
    """Resizes a part of an image, bilinearly and antialiased.

    Pillow widens its triangle with the scale. Here the part is smoothed first, by a kernel of three
    pixels (of more beyond a scale of 2.8) that has the variance which the wider triangle has more;
    that is several times faster, and close up to a scale of about two. Larger scales are the
    decoder's.

    Args:
      image: `[height, width, 3]`.
      box: Left, top, right and bottom of the part; may lie between pixels.
      size: Height and width of the result; one number for a square.
    """
    cv2 = opencv()
    left, top = math.floor(box[0]), math.floor(box[1])
    part = image[top : math.ceil(box[3]), left : math.ceil(box[2])]
    height, width = height_and_width(size)
    scale_x, scale_y = (box[2] - box[0]) / width, (box[3] - box[1]) / height
    if max(scale_x, scale_y) > 1:
        smooth = _scratch.smoothed[: part.size].reshape(part.shape) if part.size <= ROOM else None
        border = cv2.BORDER_REPLICATE | cv2.BORDER_ISOLATED
        part = cv2.sepFilter2D(
            part, -1, _kernel(scale_x), _kernel(scale_y), dst=smooth, borderType=border
        )
    if part.shape[:2] == (box[3] - box[1], box[2] - box[0]):
        return cv2.resize(part, (width, height), interpolation=cv2.INTER_LINEAR)
    # Where the middle of the first pixel of the result lies in the part.
    x, y = box[0] - left + scale_x / 2 - 0.5, box[1] - top + scale_y / 2 - 0.5
    return cv2.warpAffine(
        part,
        np.array([[scale_x, 0, x], [0, scale_y, y]]),
        (width, height),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )


class _Scratch(threading.local):
    """Memory of each thread for what does not outlive a call; new memory would be cleared first."""

    def __init__(self) -> None:
        self.decoded = np.empty(ROOM, np.uint8)
        self.smoothed = np.empty(ROOM, np.uint8)


_scratch = _Scratch()


def _kernel(scale: float) -> np.ndarray:
    # A triangle of half-width s has the variance s^2 / 6, and [side, 1 - 2 side, side] has 2 side.
    side = max(scale * scale - 1, 0) / 12
    # A crop that is squeezed along one side only has a larger scale there: several in a row.
    times = max(math.ceil(side / LARGEST_SIDE), 1)
    kernel = np.array([side / times, 1 - 2 * side / times, side / times])
    return functools.reduce(np.convolve, [kernel] * times).astype(np.float32)


@functools.cache
def opencv() -> ModuleType:
    """Returns OpenCV, imported when it is needed first, because that takes a while."""
    import cv2

    # Images are made in parallel already; more threads for each would only disturb the others.
    cv2.setNumThreads(1)
    return cv2
