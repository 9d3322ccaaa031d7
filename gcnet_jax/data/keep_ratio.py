"""Images in their own ratio, resized and padded as mmdetection and mmsegmentation do."""

from typing import Any

import numpy as np

from gcnet_jax.data import jpeg
from gcnet_jax.data.decode import RGB
from gcnet_jax.data.label_maps import LabelMap
from gcnet_jax.data.preprocessing import KeepRatio
from gcnet_jax.errors import DataError


def resized_shape(height: int, width: int, preprocessing: KeepRatio) -> tuple[int, int]:
    """Returns height and width of an image once a side has reached its limit.

    Raises:
      DataError: The image is so elongated that nothing is left of its short side.
    """
    return shape_within(height, width, preprocessing.short_side, preprocessing.long_side)


def shape_within(height: int, width: int, short_side: int, long_side: int) -> tuple[int, int]:
    """Returns height and width of an image resized until a side reaches its limit.

    Raises:
      DataError: As `resized_shape`.
    """
    scale = min(long_side / max(height, width), short_side / min(height, width))
    resized = int(height * scale + 0.5), int(width * scale + 0.5)
    if min(resized) < 1:
        raise DataError(
            f'an image of {width} x {height} pixels is too elongated: it would be resized to '
            f'{resized[1]} x {resized[0]}'
        )
    return resized


def resize(image: RGB, size: tuple[int, int]) -> RGB:
    """Resizes bilinearly, without antialiasing, to the bits of OpenCV, which mmdetection uses."""
    if image.shape[:2] == size:
        return image
    return jpeg.opencv().resize(image, size[::-1])


def resize_labels(labels: LabelMap, size: tuple[int, int]) -> LabelMap:
    """Resizes a label map by the nearest neighbour, to OpenCV's bits; never between two labels."""
    if labels.shape == size:
        return labels
    cv2 = jpeg.opencv()
    return cv2.resize(labels, size[::-1], interpolation=cv2.INTER_NEAREST)


def pad(image: np.ndarray, size: tuple[int, int], value: Any = 0) -> np.ndarray:
    """Pads an image or a label map on the right and at the bottom.

    Args:
      image: `[height, width, ...]`.
      size: Height and width of the result.
      value: Of the padding; one number, or one per channel.
    """
    if image.shape[:2] == size:
        return image
    padded = np.full((*size, *image.shape[2:]), value, image.dtype)
    padded[: image.shape[0], : image.shape[1]] = image
    return padded
