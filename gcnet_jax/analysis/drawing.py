"""What pictures that are drawn with Pillow share: the image below, letters, and the file."""

import functools
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageFont

from gcnet_jax.errors import ConfigError, DataError, one_line
from gcnet_jax.files import as_path, write_whole

Picture = UInt8[np.ndarray, 'height width 3']

# Smaller images are enlarged until their longer side has so many pixels: text needs room.
MIN_SIDE = 1000
KINDS = {'.png': 'PNG', '.jpg': 'JPEG', '.jpeg': 'JPEG'}


def enlarged(image: Picture | Image.Image, size: tuple[int, int], what: str) -> tuple[Picture, int]:
    """Returns the pixels to draw on: those of the image, or of a multiple of a small one.

    Args:
      image: The original image.
      size: Its height and width.
      what: What is drawn and has that size, for errors.

    Returns:
      The pixels, which may be changed, and how much larger each side is.

    Raises:
      ConfigError: The image is of another size.
    """
    pixels = np.asarray(image.convert('RGB') if isinstance(image, Image.Image) else image)
    if pixels.shape != (*size, 3) or pixels.dtype != np.uint8:
        raise ConfigError(
            f'an image to draw on is uint8 [{size[0]}, {size[1]}, 3], as the {what} are; got '
            f'{pixels.dtype} {list(pixels.shape)}'
        )
    factor = max(1, math.ceil(MIN_SIDE / max(size)))
    large = Image.fromarray(pixels).resize(
        (size[1] * factor, size[0] * factor), Image.Resampling.LANCZOS
    )
    return np.array(large), factor


def write_picture(draw: Callable[[], Image.Image], path: str | os.PathLike) -> Path:
    """Writes what `draw` returns to a PNG or JPEG file, by the name's ending.

    Raises:
      ConfigError: What `draw` raises, or the name ends in something else.
      DataError: It cannot be written.
    """
    path = as_path(path, '--out')
    if path.suffix.lower() not in KINDS:
        raise ConfigError(f'{one_line(path)}: a picture is named .png or .jpg')
    picture = draw()
    with write_whole(path, DataError) as aside:
        picture.save(aside, KINDS[path.suffix.lower()], quality=92)
    return path


@functools.cache
def load_font(size: int) -> ImageFont.FreeTypeFont:
    """Returns the font that matplotlib brings, which has the letters of most alphabets."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / 'fonts/ttf/DejaVuSans.ttf', size)
