"""EXIF orientations of every format that carries one, and of damaged metadata."""

import numpy as np
import pytest
from PIL import Image, ImageOps

from gcnet_jax.data.decode import decode_upright
from gcnet_jax.data.orientation import ORIENTATION_TAG, jpeg_orientation
from tests.data import crafted_images as crafted

# Four fields of plain colours, which a JPEG keeps well.
FIELDS = np.zeros((32, 48, 3), np.uint8)
FIELDS[:16, 24:] = (200, 30, 30)
FIELDS[16:, :24] = (30, 200, 30)
FIELDS[16:, 24:] = (220, 220, 220)


def marked(orientation, image_format, **options):
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    exif[0x010E] = 'a caption'
    return crafted.encode(Image.fromarray(FIELDS), image_format, exif=exif, **options)


@pytest.mark.parametrize('image_format', ['JPEG', 'PNG', 'WEBP', 'TIFF'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_images_come_out_as_pillow_turns_them(image_format, orientation, tmp_path):
    data = marked(orientation, image_format)
    (tmp_path / 'image').write_bytes(data)
    with Image.open(tmp_path / 'image') as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert('RGB'))
    np.testing.assert_array_equal(decode_upright(data), expected)


def test_numbers_that_stand_for_nothing_turn_nothing():
    for orientation in (0, 9, 60_000):
        assert decode_upright(marked(orientation, 'JPEG')).shape == FIELDS.shape


def test_metadata_may_be_large_damaged_or_absent():
    plain = crafted.encode(Image.fromarray(FIELDS), 'JPEG')
    assert jpeg_orientation(plain) == 1
    assert jpeg_orientation(crafted.with_exif(plain, 60_000, 500_000)) == 1
    data = marked(6, 'JPEG')
    assert jpeg_orientation(data) == 6
    place = data.index(b'Exif')
    rng = np.random.default_rng(0)
    for _ in range(300):
        changed = bytearray(data)
        for at in rng.integers(place - 4, place + 60, 3):
            changed[at] = rng.integers(0, 256)
        found = jpeg_orientation(bytes(changed))
        assert isinstance(found, int)
    for end in range(2, place + 40):
        assert jpeg_orientation(data[:end]) in (1, 6)
