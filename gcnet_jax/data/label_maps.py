"""Label maps of semantic segmentation: PNG files whose pixels are numbers of classes."""

import numpy as np
from jaxtyping import UInt8

from gcnet_jax.data import image_limits
from gcnet_jax.data.decode import decoding_error, opened
from gcnet_jax.errors import DataError, one_line

# The label of pixels that do not count, in training and in evaluation.
IGNORED = 255
# Labels 0 to 254: as many classes as an 8-bit label map can tell apart.
MAX_CLASSES = IGNORED

GREY, PALETTE = 0, 3
COLOUR_TYPES = {
    GREY: 'grey',
    2: 'RGB',
    PALETTE: 'palette',
    4: 'grey with alpha',
    6: 'RGB with alpha',
}
# Where bits per value and colour type stand in the header of a PNG.
DEPTH_PLACE, COLOUR_PLACE = 24, 25
ANIMATION = b'acTL'
ADVICE = 'a label map is a PNG in 8-bit grey or with a palette, whose values are the labels'

LabelMap = UInt8[np.ndarray, 'height width']


def decode_label_map(data: bytes, name: object) -> LabelMap:
    """Decodes a label map; the values are the stored ones, never colours or scaled grey.

    A palette is only how viewers show the map, its transparent entries included; its indices are
    the labels. An EXIF orientation is not applied: no annotation tool writes one.

    Args:
      data: The PNG file.
      name: File or record, for errors.

    Raises:
      DataError: If it is no PNG, one of colours, with alpha, of another depth or animated, if it is
        damaged, or exceeds the limits for images (`image_limits`).
    """
    try:
        _check_kind(data)
        with opened(data) as image:
            try:
                image.load()
                if image.mode not in ('L', 'P'):
                    raise DataError(f'its pixels are of type {image.mode!r}; {ADVICE}')
                return np.array(image, np.uint8)
            except (DataError, MemoryError):
                raise
            except Exception as error:  # Damaged data makes Pillow raise errors of any kind.
                raise DataError(f'damaged PNG image: {decoding_error(error)}') from error
    except DataError as error:
        raise DataError(f'{one_line(name)}: {error}') from error


def _check_kind(data: bytes) -> None:
    kind = image_limits.image_format(data[: image_limits.PREFIX_BYTES])
    if kind != 'PNG':
        found = f'is a {kind} image' if kind else 'is no image'
        raise DataError(f'{found}; {ADVICE}')
    if len(data) <= COLOUR_PLACE:
        raise DataError('damaged PNG image: it ends within its header')
    depth, colour = data[DEPTH_PLACE], data[COLOUR_PLACE]
    if colour == PALETTE or (colour == GREY and depth == 8):
        if _is_animated(data):
            raise DataError(f'is an animated PNG; {ADVICE}')
        return
    # Pillow and OpenCV scale grey of fewer bits up to 255; the labels would not be the stored ones.
    name = COLOUR_TYPES.get(colour, f'colour type {colour}')
    raise DataError(f'is a PNG in {name} of {depth} bits per value; {ADVICE}')


def _is_animated(data: bytes) -> bool:
    """Whether an animation's header stands among the chunks before the pixels."""
    place = 8
    while place + 8 <= len(data):
        kind = data[place + 4 : place + 8]
        if kind in (ANIMATION, b'IDAT'):
            return kind == ANIMATION
        place += 12 + int.from_bytes(data[place : place + 4])
    return False
