"""How an image must be turned to be upright, by its EXIF metadata."""

import struct

from PIL import Image

from gcnet_jax.data.image_limits import JPEG_SCAN, jpeg_segments
from gcnet_jax.data.tiff_tags import TiffTags
from gcnet_jax.errors import DataError

# EXIF's orientations and what undoes them.
ORIENTATION_TAG = 0x0112
ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Orientations whose height is the width of the stored pixels.
SWAPPED = (5, 6, 7, 8)
JPEG_APP1, EXIF_HEADER = 0xE1, b'Exif\0\0'
# Many more than any camera writes.
MAX_TAGS = 1_000


def orientation(image: Image.Image, data: bytes = b'') -> int:
    """Returns the EXIF orientation of an image, 1 for one that is upright or does not say.

    Args:
      image: As Pillow has opened it. If it is no JPEG, its pixels are decoded: for a PNG's metadata
        Pillow decodes them, and damage would go unseen here.
      data: The file, where it is a JPEG; `image_limits` hides the metadata of those from Pillow.
    """
    if image.format == 'TIFF':  # Pillow turns these itself while it decodes them.
        return 1
    if image.format == 'JPEG' and data:
        found = jpeg_orientation(data)
    else:
        try:
            found = image.getexif().get(ORIENTATION_TAG)
        except Exception:  # Damaged metadata: viewers show the intact pixels as they are.
            found = None
    return found if found in ORIENTATIONS else 1


def jpeg_orientation(data: bytes) -> int:
    """Returns the orientation in the EXIF metadata of a JPEG, 1 where there is none."""
    try:
        for kind, _, place, end in jpeg_segments(data):
            if kind == JPEG_SCAN:
                break
            if kind == JPEG_APP1 and data.startswith(EXIF_HEADER, place + 2):
                exif = data[place + 2 + len(EXIF_HEADER) : end]
                return TiffTags(exif, MAX_TAGS, len(exif)).first(ORIENTATION_TAG, 1)
    except (DataError, struct.error, ValueError):  # Damaged metadata.
        pass
    return 1


def turn(pixels: Image.Image, found: int) -> Image.Image:
    """Turns the stored pixels of an image of that orientation upright."""
    return pixels.transpose(ORIENTATIONS[found]) if found in ORIENTATIONS else pixels
