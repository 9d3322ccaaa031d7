"""Images in their own ratio, for detectors: resized as mmdetection does, and padded."""

import numpy as np

from gcnet_jax.data import jpeg
from gcnet_jax.data.decode import RGB
from gcnet_jax.data.preprocessing import KeepRatio
from gcnet_jax.errors import DataError


def resized_shape(height: int, width: int, preprocessing: KeepRatio) -> tuple[int, int]:
    """Returns height and width of an image once a side has reached its limit.

    Raises:
      DataError: The image is so elongated that nothing is left of its short side.
    """
    scale = min(
        preprocessing.long_side / max(height, width), preprocessing.short_side / min(height, width)
    )
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


def pad(image: RGB, size: tuple[int, int]) -> RGB:
    """Pads with zeros on the right and at the bottom."""
    padded = np.zeros((*size, 3), np.uint8)
    padded[: image.shape[0], : image.shape[1]] = image
    return padded
