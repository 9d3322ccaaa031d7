"""Sizes of images in their own ratio, against mmdetection's figures, and what is refused."""

import numpy as np
import pytest

from gcnet_jax.data.keep_ratio import pad, resize, resize_labels, resized_shape
from gcnet_jax.data.preprocessing import KeepRatio
from gcnet_jax.errors import ConfigError, DataError

COCO = KeepRatio()


@pytest.mark.parametrize(
    ('size', 'resized', 'padded'),
    [
        ((480, 640), (800, 1067), (800, 1088)),
        ((640, 480), (1067, 800), (1088, 800)),
        ((427, 640), (800, 1199), (800, 1216)),
        ((300, 1000), (400, 1333), (416, 1344)),  # The long side reaches its limit first.
        ((2, 1), (1333, 667), (1344, 672)),
    ],
)
def test_sizes_are_mmdetections(size, resized, padded):
    assert resized_shape(*size, COCO) == resized
    assert COCO.padded(*resized) == padded


def test_an_image_of_which_nothing_would_be_left_is_refused():
    with pytest.raises(DataError, match=r'5000 x 1 pixels is too elongated.* 1333 x 0'):
        resized_shape(1, 5000, COCO)


def test_padding_is_on_the_right_and_at_the_bottom():
    image = np.random.default_rng(0).integers(1, 256, (5, 7, 3), np.uint8)
    padded = pad(image, (8, 9))
    np.testing.assert_array_equal(padded[:5, :7], image)
    assert padded.sum() == image.sum()
    assert resize(image, (5, 7)) is image
    assert resize(image, (10, 14)).shape == (10, 14, 3)


@pytest.mark.parametrize('size', [0, 400.0, (400,), (400, 666, 1), '400', 5000])
def test_a_size_that_cannot_be_is_refused(size):
    with pytest.raises(ConfigError, match='size must be a whole number from 1 to 4096'):
        COCO.with_size(size)


def test_one_number_is_the_short_side():
    assert COCO.with_size(400) == KeepRatio(short_side=400, long_side=666)
    assert COCO.with_size(3000).long_side == 4096
    assert COCO.with_size((320, 500)) == KeepRatio(short_side=320, long_side=500)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'short_side': 900, 'long_side': 800}, 'cannot be the longer one'),
        ({'multiple_of': 0}, 'multiple_of must be a whole number'),
        ({'mean': (123.7,) * 3}, 'mean must be three numbers'),
        ({'std': (0.0,) * 3}, 'std must be three positive numbers'),
    ],
)
def test_preprocessing_that_cannot_be_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        KeepRatio(**options)


def test_padding_may_be_a_colour_or_a_label():
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    padded = pad(image, (6, 9), (1, 2, 3))
    np.testing.assert_array_equal(padded[:5, :7], image)
    assert (padded[5:] == (1, 2, 3)).all()
    labels = pad(image[..., 0], (6, 9), 255)
    assert labels.shape == (6, 9)
    assert (labels[:, 7:] == 255).all()
    assert pad(image, (5, 7)) is image


def test_label_maps_are_never_interpolated():
    labels = np.random.default_rng(0).choice([0, 7, 255], (9, 11)).astype(np.uint8)
    assert resize_labels(labels, (9, 11)) is labels
    larger = resize_labels(labels, (18, 33))
    np.testing.assert_array_equal(larger, np.repeat(np.repeat(labels, 2, 0), 3, 1))
    smaller = resize_labels(labels, (4, 5))
    np.testing.assert_array_equal(smaller, labels[[0, 2, 4, 6]][:, [0, 2, 4, 6, 8]])
