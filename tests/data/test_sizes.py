"""Images that are not square: one number or height and width, from the decoder to the batch."""

import numpy as np
import pytest
from PIL import Image

from gcnet_jax.data import preprocess
from gcnet_jax.data.loader import evaluation_batches, train_batches
from gcnet_jax.data.sizes import height_and_width
from gcnet_jax.errors import ConfigError, DataError


def test_one_number_is_a_square():
    assert height_and_width(7) == (7, 7)
    assert height_and_width((3, 5)) == (3, 5)


@pytest.mark.parametrize(
    ('height', 'width', 'size', 'fraction', 'resized', 'left', 'top'),
    [
        (375, 500, (96, 160), 1.0, (160, 120), 0, 12),  # The width decides.
        (500, 375, (96, 160), 0.875, (182, 243), 11, 74),  # 109 x 182 are covered; 73.5 to even.
        (40, 300, (160, 96), 1.0, (1200, 160), 552, 0),  # The height decides; enlarged.
        (90, 123, (64, 32), 1.0, (87, 64), 28, 0),  # 87.47 is rounded; 27.5 to even.
        (90, 124, (64, 32), 1.0, (88, 64), 28, 0),  # 88.18
        (96, 160, (96, 160), 1.0, (160, 96), 0, 0),  # Not touched.
    ],
)
def test_evaluation_covers_the_size_and_crops_the_middle(
    make, height, width, size, fraction, resized, left, top
):
    image = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(image).resize(resized, Image.Resampling.BICUBIC))
    expected = expected[top : top + size[0], left : left + size[1]]
    result = preprocess.resize_and_crop(image, size, fraction, 'bicubic')
    np.testing.assert_array_equal(result, expected)
    decoded = preprocess.decode_and_crop(make.encode(image), size, fraction, 'bicubic')
    np.testing.assert_array_equal(decoded, expected)
    assert result.shape == (*size, 3)


def test_a_line_is_refused_before_it_takes_gigabytes():
    for shape in ((1, 65_535, 3), (65_535, 1, 3)):
        with pytest.raises(DataError, match='too elongated'):
            preprocess.resize_and_crop(np.zeros(shape, np.uint8), (200, 150))


def test_resized_crop_takes_the_same_part_and_stretches_it(make, noise):
    box = preprocess.sample_crop(40, 60, np.random.default_rng(3))
    expected = Image.fromarray(noise).crop(box).resize((24, 10), Image.Resampling.BILINEAR)
    plain = preprocess.random_resized_crop(noise, (10, 24), np.random.default_rng(3))
    np.testing.assert_array_equal(plain, expected)
    fused = preprocess.decode_resized_crop(make.encode(noise), (10, 24), np.random.default_rng(3))
    np.testing.assert_array_equal(fused, expected)


@pytest.mark.parametrize('progressive', [False, True])  # OpenCV's way, and Pillow's draft.
@pytest.mark.parametrize('size', [(24, 60), (60, 24), (90, 70)])
def test_the_fast_crop_of_a_jpeg_shows_the_same(make, scene, size, progressive):
    data = make.encode(scene, 'JPEG', quality=95, progressive=progressive)
    for seed in range(10):
        fast, plain = (
            preprocess.decode_resized_crop(data, size, np.random.default_rng(seed), fast=way)
            for way in (True, False)
        )
        assert fast.shape == plain.shape == (*size, 3)
        assert np.abs(fast.astype(int) - plain)[2:-2, 2:-2].mean() < 3


@pytest.mark.parametrize('augmentation', preprocess.AUGMENTATIONS)
def test_training_batches_have_the_size(make, augmentation):
    options = {'global_batch_size': 2, 'seed': 0, 'augmentation': augmentation}
    with train_batches(make.numbered_source(5), image_size=(6, 10), **options) as batches:
        assert next(batches)['image'].shape == (2, 6, 10, 3)


def test_evaluation_batches_have_the_size_where_they_are_filled_up_too(make):
    source = make.numbered_source(3, damaged=[1])
    options = {'global_batch_size': 2, 'skip_damaged': True}
    with evaluation_batches(source, image_size=(6, 10), **options) as batches:
        batches = list(batches)
    assert [batch['image'].shape for batch in batches] == [(2, 6, 10, 3)] * 2
    assert make.number_of(batches[0]['image'][:1]) == [0]
    with pytest.raises(ConfigError, match=r'image_size \(6, 0\)'):
        evaluation_batches(source, image_size=(6, 0), **options)
