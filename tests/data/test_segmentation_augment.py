"""Augmentation of images with label maps, against mmsegmentation's own and a numpy restatement."""

import warnings

import numpy as np
import pytest
from PIL import Image

from gcnet_jax.data.preprocessing import KeepRatio
from gcnet_jax.data.segmentation_augment import (
    SegmentationOptions,
    augment_pair,
    distort,
    draw_limits,
    fit_pair,
    sample_crop,
)
from gcnet_jax.errors import ConfigError, DataError
from tests.data import crafted_images as crafted

LIMITS = KeepRatio(short_side=40, long_side=60, multiple_of=1)
PLAIN = {'scale_range': (1.0, 1.0), 'category_max_ratio': 1.0, 'flip': False, 'photometric': False}


def options(size=(24, 32), preprocessing=LIMITS, **changes):
    return SegmentationOptions(size, preprocessing, **(PLAIN | changes))


def blocks(height, width, seed=0):
    """A label map of blocks of classes 0 to 4 and of 255."""
    rng = np.random.default_rng(seed)
    small = rng.choice([0, 1, 2, 3, 4, 255], (height // 8 + 1, width // 8 + 1)).astype(np.uint8)
    return np.repeat(np.repeat(small, 8, 0), 8, 1)[:height, :width]


def picture(height, width, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(pixels):
    return crafted.encode(Image.fromarray(pixels), 'PNG')


@pytest.mark.mmsegmentation
@pytest.mark.parametrize('shape', [(40, 60), (60, 37), (90, 130), (20, 30)])
def test_everything_together_is_mmsegmentations(shape, monkeypatch):
    import tests.porting.mmsegmentation_peer  # noqa: F401

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        from mmcv.transforms import RandomFlip, RandomResize
        from mmseg.datasets.transforms import PhotoMetricDistortion, RandomCrop
    resize = RandomResize((60, 40), (0.5, 2.0), keep_ratio=True)
    pipeline = [resize, RandomCrop((24, 32), 0.75), RandomFlip(prob=0.5), PhotoMetricDistortion()]
    image, labels = picture(*shape), blocks(*shape)
    chosen = options(scale_range=(0.5, 2.0), category_max_ratio=0.75, flip=True, photometric=True)
    padded = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        ours = augment_pair(png(image), labels, rng, chosen)
        rng = np.random.default_rng(seed)
        draws = {
            'random_sample': rng.random,
            'randint': lambda *bounds, rng=rng: int(rng.integers(*bounds)),
            'uniform': rng.uniform,
            'choice': lambda values, p, rng=rng: values[int(rng.random() >= p[0])],
        }
        with monkeypatch.context() as patch:
            for name, draw in draws.items():
                patch.setattr(np.random, name, draw)
            results = {'img': image[..., ::-1].copy(), 'gt_seg_map': labels.copy()}
            results |= {'seg_fields': ['gt_seg_map'], 'img_shape': shape}
            for transform in pipeline:
                results = transform(results)
        theirs, their_labels = results['img'][..., ::-1], results['gt_seg_map']
        height, width = their_labels.shape
        np.testing.assert_array_equal(ours[0][:height, :width], theirs)
        np.testing.assert_array_equal(ours[1][:height, :width], their_labels)
        assert (ours[1][height:] == 255).all()
        assert (ours[1][:, width:] == 255).all()
        padded += (height, width) != (24, 32)
    assert 0 < padded < 40


def nearest(labels, height, width):
    """The nearest neighbour as OpenCV takes it: that of the pixel's upper left corner."""
    rows = np.minimum(np.arange(height) * labels.shape[0] // height, labels.shape[0] - 1)
    columns = np.minimum(np.arange(width) * labels.shape[1] // width, labels.shape[1] - 1)
    return labels[rows][:, columns]


@pytest.mark.parametrize('shape', [(40, 60), (60, 37), (90, 130), (20, 30)])
def test_label_maps_hold_no_value_that_was_not_there(shape):
    labels = blocks(*shape)
    image = np.stack([labels] * 3, axis=-1)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        limits = draw_limits(np.random.default_rng(seed), options(scale_range=(0.5, 2.0)))
        chosen = options((120, 120), scale_range=(0.5, 2.0))
        pixels, result = augment_pair(png(image), labels, rng, chosen)
        scale = min(limits[1] / max(shape), limits[0] / min(shape))
        height, width = (int(side * scale + 0.5) for side in shape)
        np.testing.assert_array_equal(result[:height, :width], nearest(labels, height, width))
        assert pixels.shape == (120, 120, 3)


def test_images_are_resized_bilinearly_and_stay_with_their_labels():
    steps = np.repeat(np.arange(0, 160, 40, dtype=np.uint8), 15)
    image = np.broadcast_to(steps[None, :, None], (40, 60, 3)).copy()
    labels = image[..., 0] // 40
    limits = KeepRatio(short_side=80, long_side=120, multiple_of=1)
    pixels, result = augment_pair(
        png(image), labels, np.random.default_rng(0), options((80, 120), limits)
    )
    # Away from the steps both say the same, and on them the image alone is in between.
    assert set(np.unique(result)) == {0, 1, 2, 3}
    in_between = pixels[..., 0] != 40 * result
    assert set(np.flatnonzero(in_between.any(0))) == {29, 30, 59, 60, 89, 90}
    assert len(np.unique(pixels)) > 4


def test_an_image_smaller_than_the_crop_is_padded_with_its_mean_colour_and_no_label():
    image, labels = picture(10, 15), blocks(10, 15)
    limits = KeepRatio(short_side=10, long_side=15, multiple_of=1)
    pixels, result = augment_pair(png(image), labels, np.random.default_rng(0), options(12, limits))
    assert any((result[:10] == labels[:, left : left + 12]).all() for left in range(4))
    assert pixels.shape == (12, 12, 3)
    assert result.shape == (12, 12)
    assert (result[10:] == 255).all()
    assert (pixels[10:] == (124, 116, 104)).all()
    normalised = (pixels[10:] / 255 - limits.mean) / limits.std
    assert np.abs(normalised).max() < 0.009


@pytest.mark.parametrize('flip', [False, True])
def test_mirroring_turns_image_and_labels_together_every_other_time(flip):
    image = np.zeros((40, 60, 3), np.uint8)
    image[:, 30:] = 200
    labels = image[..., 0] // 200
    mirrored = 0
    for seed in range(200):
        pixels, result = augment_pair(
            png(image), labels, np.random.default_rng(seed), options((40, 60), flip=flip)
        )
        np.testing.assert_array_equal(pixels[..., 0] // 200, result)
        mirrored += int(result[0, 0])
    assert 75 < mirrored < 125 if flip else mirrored == 0


def test_scales_are_uniform_and_cut_off_as_mmcv_does():
    rng = np.random.default_rng(0)
    limits = KeepRatio(short_side=1000, long_side=2000)
    drawn = np.array([draw_limits(rng, options(preprocessing=limits, scale_range=(0.5, 2.0)))
                      for _ in range(4000)])  # fmt: skip
    assert (abs(drawn[:, 1] - 2 * drawn[:, 0]) <= 1).all()
    counts, _ = np.histogram(drawn[:, 0], bins=15, range=(500, 2000))
    assert counts.min() > 200
    assert counts.max() < 340
    assert drawn[:, 0].min() < 510
    assert drawn[:, 0].max() > 1990


def test_crops_are_uniform_and_inside():
    labels = np.zeros((30, 50), np.uint8)
    rng = np.random.default_rng(0)
    boxes = np.array([sample_crop(labels, rng, (20, 40), 1.0) for _ in range(3000)])
    assert (boxes[:, 2:] - boxes[:, :2] == (40, 20)).all()
    for corner in (boxes[:, 0], boxes[:, 1]):
        counts = np.bincount(corner, minlength=11)
        assert len(counts) == 11
        assert counts.min() > 200
        assert counts.max() < 350


def share(labels, box):
    left, top, right, bottom = box
    crop = labels[top:bottom, left:right]
    counts = np.array([(crop == label).sum() for label in range(5)])
    return counts.max() / counts.sum() if counts.sum() else 1.0


def test_crops_of_mostly_one_class_are_drawn_again():
    labels = np.zeros((64, 64), np.uint8)
    labels[:16] = 1
    labels[:, :8] = 255  # Does not count, neither as a class nor in the total.
    plain = [share(labels, sample_crop(labels, np.random.default_rng(seed), 32, 1.0))
             for seed in range(300)]  # fmt: skip
    chosen = [share(labels, sample_crop(labels, np.random.default_rng(seed), 32, 0.75))
              for seed in range(300)]  # fmt: skip
    fit = np.mean(np.array(plain) < 0.75)
    assert 0.1 < fit < 0.5
    # Eleven draws: the first, and ten more.
    assert np.mean(np.array(chosen) >= 0.75) == pytest.approx((1 - fit) ** 11, abs=0.03)
    # A crop that fits at once is the same as without the limit.
    for seed, value in enumerate(plain):
        if value < 0.75:
            first = sample_crop(labels, np.random.default_rng(seed), 32, 1.0)
            assert sample_crop(labels, np.random.default_rng(seed), 32, 0.75) == first


@pytest.mark.parametrize('value', [0, 255])
def test_a_map_without_any_choice_still_gives_a_crop(value):
    labels = np.full((20, 20), value, np.uint8)
    left, top, right, bottom = sample_crop(labels, np.random.default_rng(0), 8, 0.75)
    assert 0 <= left < right <= 20
    assert 0 <= top < bottom <= 20


def test_a_share_of_exactly_the_limit_is_drawn_again():
    labels = np.zeros((4, 8), np.uint8)
    labels[:, :1] = 1  # A quarter of the first crop and less of the others.
    rng = np.random.default_rng(0)
    boxes = [sample_crop(labels, rng, 4, 0.75)[0] for _ in range(200)]
    uniform = np.bincount(boxes, minlength=5) / 200
    assert uniform == pytest.approx(np.full(5, 0.2), abs=0.09)


def test_photometric_distortion_changes_what_it_says_half_of_the_time():
    grey = np.full((2, 2, 3), 100, np.uint8)
    results = np.array([distort(grey, np.random.default_rng(seed))[0, 0] for seed in range(2000)])
    # Grey has neither saturation nor hue: brightness and contrast alone change it.
    assert (results == results[:, :1]).all()
    unchanged = np.mean(results[:, 0] == 100)
    assert unchanged == pytest.approx(0.25 + 0.01, abs=0.04)
    assert results.min() == pytest.approx(68 * 0.5, abs=4)
    assert results.max() == pytest.approx(132 * 1.5, abs=12)


def test_hue_turns_by_at_most_36_degrees_and_stays_for_grey():
    red = np.full((2, 2, 3), (200, 20, 20), np.uint8)
    turned = [distort(red, np.random.default_rng(seed))[0, 0].astype(int) for seed in range(500)]
    # Red stays the largest channel within 60 degrees.
    assert all(pixel[0] == pixel.max() for pixel in turned)
    assert any(pixel[1] > pixel[2] + 30 for pixel in turned)
    assert any(pixel[2] > pixel[1] + 30 for pixel in turned)


def test_the_result_is_a_function_of_the_generator_alone():
    image, labels = png(picture(50, 70)), blocks(50, 70)
    every = SegmentationOptions(32, LIMITS)
    first = augment_pair(image, labels, np.random.default_rng(5), every)
    for _ in range(2):
        again = augment_pair(image, labels, np.random.default_rng(5), every)
        for a, b in zip(first, again, strict=True):
            np.testing.assert_array_equal(a, b)
    other = augment_pair(image, labels, np.random.default_rng(6), every)
    assert (other[0] != first[0]).any()


def test_large_jpegs_are_decoded_at_a_share_of_their_resolution():
    rows, columns = np.mgrid[:320, :480]
    image = np.stack([rows / 2, columns / 3, 128 + 0 * rows], -1).astype(np.uint8)
    labels = (columns // 120).astype(np.uint8)
    jpeg = crafted.encode(Image.fromarray(image), 'JPEG', quality=95)
    limits = KeepRatio(short_side=40, long_side=60, multiple_of=1)
    made = [
        augment_pair(data, labels, np.random.default_rng(0), options((40, 60), limits))
        for data in (png(image), jpeg)
    ]
    np.testing.assert_array_equal(made[0][1], made[1][1])
    assert np.abs(made[0][0].astype(int) - made[1][0]).max() < 8


@pytest.mark.parametrize('orientation', [3, 6])
def test_images_are_turned_as_their_orientation_says(orientation):
    image = np.zeros((32, 48, 3), np.uint8)
    image[:16, :24] = 200
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = crafted.encode(Image.fromarray(image), 'JPEG', exif=exif)
    upright = np.rot90(image, 3 if orientation == 6 else 2)
    labels = np.ascontiguousarray(upright[..., 0] // 200)
    limits = KeepRatio(short_side=32, long_side=48, multiple_of=1)
    pixels, result = augment_pair(
        data, labels, np.random.default_rng(0), options(labels.shape, limits)
    )
    np.testing.assert_array_equal(result, labels)
    assert np.mean((pixels[..., 0] > 100) == result) > 0.99


def test_evaluation_keeps_the_ratio_and_all_of_the_image():
    image, labels = picture(30, 60), blocks(30, 60)
    pixels, result, size = fit_pair(png(image), labels, (40, 40))
    assert size == (20, 40)
    np.testing.assert_array_equal(result[:20], nearest(labels, 20, 40))
    assert (result[20:] == 255).all()
    assert (pixels[20:] == 0).all()
    assert pixels[:20].any(axis=-1).mean() > 0.9
    pixels, result, size = fit_pair(png(image), labels, (60, 90))
    assert size == (45, 90)
    pixels, result, size = fit_pair(png(image), labels, (30, 60))
    np.testing.assert_array_equal(pixels, image)
    np.testing.assert_array_equal(result, labels)


def test_every_size_fits_into_every_canvas():
    for height in range(1, 60, 7):
        for width in range(1, 60, 5):
            image = np.zeros((height, width, 3), np.uint8)
            pixels, result, size = fit_pair(png(image), image[..., 0], (37, 53))
            assert pixels.shape == (37, 53, 3)
            assert size[0] == 37 or size[1] == 53
            assert (result != 255).sum() == size[0] * size[1]


def test_an_image_of_another_size_than_its_labels_is_refused():
    with pytest.raises(DataError, match=r'image has 15 x 10 pixels and its label map 16 x 10; '):
        augment_pair(png(picture(10, 15)), blocks(10, 16), np.random.default_rng(0), options())
    with pytest.raises(DataError, match=r'not an image of a known format'):
        fit_pair(b'text', blocks(10, 16), 32)
    with pytest.raises(DataError, match='too elongated'):
        fit_pair(png(picture(1, 900)), blocks(1, 900), 32)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'scale_range': (0.0, 1.0)}, r'scale_range is \(0.0, 1.0\); it is 0 < smallest'),
        ({'scale_range': (2.0, 1.0)}, 'scale_range'),
        ({'scale_range': (1.0, float('nan'))}, 'scale_range'),
        ({'scale_range': (1.0, 11.0)}, 'largest <= 10'),
        ({'category_max_ratio': 0.0}, 'category_max_ratio is 0.0; it is more than 0'),
        ({'category_max_ratio': 1.5}, 'category_max_ratio'),
        ({'size': (5000, 5)}, r'image_size is \(5000, 5\); sides are at most 4096'),
    ],
)
def test_options_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        options(**changes)
