"""Label maps against their classes and against their images."""

import numpy as np
import pytest
from PIL import Image

from gcnet_jax.data.segmentation_pairs import decode_labels, decode_picture, reduce_labels
from gcnet_jax.errors import DataError
from tests.data import crafted_images as crafted
from tests.data.segmentation_folders import image_of, labels_of, png


def test_labels_are_classes_or_255():
    labels = labels_of(0)
    np.testing.assert_array_equal(decode_labels(png(labels), 3), labels)
    with pytest.raises(
        DataError,
        match=r'^label map: \d+ pixels have a label.* up to 2; labels are 0 to 1, and 255',
    ):
        decode_labels(png(labels), 2)
    labels[3, 3] = 254
    with pytest.raises(
        DataError, match=r'^a\.png: 1 pixel has a label that is no class, 254; labels are 0 to 2'
    ):
        decode_labels(png(labels), 3, name='a.png')


def test_the_zero_label_is_reduced_as_ade20k_needs_it():
    stored = np.array([[0, 1, 2], [150, 254, 255]], np.uint8)
    expected = np.array([[255, 0, 1], [149, 253, 255]], np.uint8)
    assert reduce_labels(stored).dtype == np.uint8
    np.testing.assert_array_equal(reduce_labels(stored), expected)
    np.testing.assert_array_equal(stored[0], [0, 1, 2])
    np.testing.assert_array_equal(decode_labels(png(stored), 254, reduce_zero_label=True), expected)
    with pytest.raises(DataError, match=r'up to 254; labels are 1 to 149, and 0 and 255 for'):
        decode_labels(png(stored), 149, reduce_zero_label=True)


def test_an_image_has_the_size_of_its_labels():
    np.testing.assert_array_equal(decode_picture(png(image_of(3)), (6, 8)), image_of(3))
    with pytest.raises(DataError, match=r'image has 8 x 6 pixels and its label map 6 x 8; they'):
        decode_picture(png(image_of(3)), (8, 6))


def test_a_png_whose_pixels_are_damaged_is_seen():
    """Looking for its orientation Pillow decodes a PNG; decoded again, it is grey and no error."""
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    data = bytearray(png(picture))
    data[len(data) // 2] ^= 255
    with pytest.raises(DataError, match='damaged PNG'):
        decode_picture(bytes(data), (40, 60))


def test_no_less_is_decoded_than_is_wanted():
    for orientation, shape in ((1, (64, 96)), (6, (96, 64))):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = crafted.encode(Image.new('RGB', (96, 64)), 'JPEG', exif=exif)
        for wanted, share in (((64, 96), 1), ((33, 49), 1), ((32, 48), 2), ((1, 1), 8)):
            wanted = wanted if orientation == 1 else wanted[::-1]
            result = decode_picture(data, shape, wanted)
            assert result.shape == (shape[0] // share, shape[1] // share, 3)
