"""From encoded bytes to the RGB pixels of the whole image, within the limits of `image_limits`."""

import contextlib
import io
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from gcnet_jax.data import image_limits
from gcnet_jax.data.image_limits import DECODING_MEMORY, MAX_PIXELS, check_size
from gcnet_jax.data.orientation import ORIENTATIONS, SWAPPED, orientation, turn
from gcnet_jax.errors import DataError, one_line

# Only these decoders ever see the data. Others of Pillow start programs (EPS runs Ghostscript).
FORMATS = ('JPEG', 'PNG', 'GIF', 'BMP', 'WEBP', 'TIFF', 'PPM')
# Pixels that are copied at once from an image into an array.
BAND_PIXELS = 4_000_000

RGB = UInt8[np.ndarray, 'height width 3']

Image.init()  # Registers the decoders; Pillow would do it at the first call of Image.open.


def open_within_limits(data: bytes, max_pixels: int) -> tuple[Image.Image, int]:
    """Reads the header of an encoded image; the pixels are not decoded yet.

    `Image.open` would do the same, but warns about large images by Pillow's own limit, and a
    warning cannot be silenced in one thread alone.

    Returns:
      The image, and the estimated memory in bytes for decoding it.

    Raises:
      DataError: If the format is not one of `FORMATS`, the header is damaged, or the image exceeds
        `max_pixels` or a limit of `gcnet_jax.data.image_limits`.
    """
    name = image_limits.image_format(data[: image_limits.PREFIX_BYTES])
    if name is None:
        raise DataError(f'not an image of a known format ({", ".join(FORMATS)})')
    if name not in FORMATS:
        raise DataError(f'{name} images are not read; convert it to JPEG or PNG')
    plan = image_limits.inspect(data, name, max_pixels)
    try:
        image = Image.OPEN[name][0](io.BytesIO(plan.data), '')
    except Exception as error:  # Damaged data makes Pillow raise errors of any kind.
        raise DataError(f'damaged {name} image: {decoding_error(error)}') from error
    check_size(*image.size, max_pixels)
    codec = image.tile[0].codec_name if image.tile else ''
    return image, image_limits.check_costs(plan, image.size, image.mode, codec)


@contextlib.contextmanager
def opened(data: bytes, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """Gives an opened image, with the memory for decoding it held until the block ends.

    Raises:
      DataError: As `open_within_limits`.
    """
    image, memory = open_within_limits(data, max_pixels)
    with DECODING_MEMORY.hold(memory):
        yield image


def to_rgb(image: Image.Image) -> Image.Image:
    """Decodes the pixels of an opened image as RGB. Alpha is dropped, as timm does.

    Raises:
      DataError: If the data is damaged or its pixels cannot be read as colours.
    """
    try:
        sixteen_bits = image.mode.startswith('I;16') or (image.format, image.mode) == ('PPM', 'I')
        if image.mode in ('I', 'F') and not sixteen_bits:
            raise DataError(f'pixels of type {image.mode!r} (32 bits) have no known range')
        # Only the first frame of an animation. A transparent colour is like alpha: dropped.
        image.load()
        image.info.pop('transparency', None)
        if sixteen_bits:
            # Pillow's own conversion cuts everything above 255 off.
            values = np.asarray(image).astype(np.uint32)
            return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert('RGB')
        return image if image.mode == 'RGB' else image.convert('RGB')
    except DataError:
        raise
    except MemoryError:
        raise
    except Exception as error:
        raise DataError(f'damaged {image.format} image: {decoding_error(error)}') from error


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> RGB:
    """Decodes a greyscale, palette, CMYK, RGB, 16-bit or transparent image to RGB.

    Raises:
      DataError: If the data is no image, damaged, or exceeds `max_pixels` or another limit.
    """
    with opened(data, max_pixels) as image:
        return to_array(to_rgb(image))


def decode_upright(data: bytes, max_pixels: int = MAX_PIXELS) -> RGB:
    """Decodes as `decode` does, and turns the image as its EXIF orientation says.

    OpenCV does so, and mmdetection with it: boxes are in pixels of what a viewer shows.

    Raises:
      DataError: As `decode`.
    """
    with opened(data, max_pixels) as image:
        pixels = to_rgb(image)
        return to_array(upright(pixels, image, data))


def upright(pixels: Image.Image, image: Image.Image, data: bytes = b'') -> Image.Image:
    """Turns decoded pixels as the EXIF orientation of their image says.

    Args:
      pixels: The decoded image.
      image: As Pillow has opened it.
      data: The file; without it a JPEG that `opened` gives counts as upright.
    """
    found = orientation(image, data)
    if found not in ORIENTATIONS:
        return pixels
    with DECODING_MEMORY.hold(4 * pixels.width * pixels.height):
        return turn(pixels, found)


def upright_size(image: Image.Image, data: bytes = b'') -> tuple[int, int]:
    """Returns height and width of an opened image once it is turned upright.

    Args:
      image: As Pillow has opened it. JPEGs stay as they are, others are decoded.
      data: The file, as for `upright`.

    Raises:
      DataError: As `to_rgb`.
    """
    if image.format != 'JPEG':
        to_rgb(image)
    width, height = image.size
    return (width, height) if orientation(image, data) in SWAPPED else (height, width)


def to_array(image: Image.Image) -> RGB:
    """Returns the pixels of an RGB image; `np.asarray` would take twice their memory meanwhile."""
    if image.width * image.height <= BAND_PIXELS:
        return np.asarray(image)
    array = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(BAND_PIXELS // image.width, 1)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        array[top:bottom] = np.asarray(image.crop((0, top, image.width, bottom)))
    return array


def verify(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Makes sure that an image can be decoded, at the least cost that shows a truncated file.

    Returns:
      Height and width in pixels, turned as its EXIF orientation says.

    Raises:
      DataError: As `decode`.
    """
    with opened(data, max_pixels) as image:
        size = upright_size(image, data)
        image.draft(
            'RGB', (1, 1)
        )  # A JPEG is read to its end, but decoded at an eighth of its size.
        to_rgb(image)
        return size


def decoding_error(error: Exception) -> str:
    return one_line(str(error).splitlines()[0] if str(error) else type(error).__name__)
