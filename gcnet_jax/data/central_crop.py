"""Where the central crop of evaluation lies, as timm's evaluation transform has it.

The image keeps its proportions and becomes the smallest that covers the size wanted over
`crop_fraction`; the crop is the middle of it. For a square that is timm's and torchvision's Resize
of the shorter side, which rounds the longer one down; for another size it is timm's
ResizeKeepRatio, which rounds to the nearest.
"""

import math

from gcnet_jax.data.image_limits import MAX_PIXELS
from gcnet_jax.data.sizes import Size, height_and_width
from gcnet_jax.errors import DataError


def resized_size(width: int, height: int, size: Size, crop_fraction: float) -> tuple[int, int]:
    """Returns width and height of the image that the crop is the middle of.

    Args:
      width, height: Size of the image in pixels.
      size: Size of the crop in pixels.
      crop_fraction: The size of the crop over the size that is covered, in (0, 1].

    Raises:
      DataError: The image is so elongated that it would have more than `MAX_PIXELS`.
    """
    rows, columns = (math.floor(side / crop_fraction) for side in height_and_width(size))
    # The side that the image covers only just, the image's own, and the image's other one.
    side, own, other = (
        (rows, height, width) if rows * width >= columns * height else (columns, width, height)
    )
    # A line of 65,535 pixels is a small file, and would take gigabytes here.
    if side * side * other > MAX_PIXELS * own:
        raise too_elongated(width, height)
    if rows != columns:
        # timm.data.transforms.ResizeKeepRatio, operation by operation.
        ratio = min(height / rows, width / columns)
        return round(width / ratio), round(height / ratio)
    # torchvision.transforms.Resize: the longer side is rounded down.
    if width <= height:
        return side, int(side * height / width)
    return int(side * width / height), side


def too_elongated(width: int, height: int) -> DataError:
    """Returns the error for an image that cannot be resized."""
    return DataError(f'image of {width}x{height} pixels is too elongated to be resized')


def middle(width: int, height: int, size: Size) -> tuple[int, int, int, int]:
    """Returns left, top, right and bottom of the central crop of an image of some size."""
    wanted_height, wanted_width = height_and_width(size)
    # torchvision.transforms.CenterCrop rounds the margin half to even, as `round` does.
    left, top = round((width - wanted_width) / 2), round((height - wanted_height) / 2)
    return left, top, left + wanted_width, top + wanted_height
