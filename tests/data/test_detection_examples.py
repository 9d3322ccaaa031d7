"""Examples of detectors, against mmdetection's steps written out."""

import cv2
import numpy as np
import pytest
from PIL import Image

from gcnet_jax.data.detection_canvases import make_canvases
from gcnet_jax.data.detection_examples import (
    DetectionOptions,
    evaluation_example,
    evaluation_filling,
    resized_boxes,
    training_example,
)
from gcnet_jax.data.detection_masks import draw_mask
from gcnet_jax.data.preprocessing import KeepRatio
from gcnet_jax.errors import ConfigError, DataError
from tests.data import crafted_images as crafted
from tests.data.detection_folders import annotation, run_lengths

LIMITS = KeepRatio(short_side=40, long_side=60, multiple_of=32)
SIZE = (60, 80)


def record(boxes, size=SIZE, seed=0, **changes):
    """A record of noise with a triangle in each box; labels count from 3."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    objects = [
        annotation(place, 0, box=box, **changes) | {'label': 3 + place}
        for place, box in enumerate(boxes)
    ]
    image = crafted.encode(Image.fromarray(pixels), 'PNG')
    return {'image': image, 'size': size, 'objects': objects}, pixels


def options(scales=None, canvases=None, **changes):
    defaults = {'flip': 0, 'max_boxes': 5, 'mask_size': 64}
    return DetectionOptions(make_canvases(LIMITS, scales, canvases), **(defaults | changes))


def make(given, seed=0, **changes):
    return training_example(given, np.random.default_rng(seed), options(**changes))


def theirs(pixels, boxes, limits, flip):
    """Resize, clip and flip as mmdetection does; image, boxes, and the height and width."""
    height, width = pixels.shape[:2]
    scale = min(max(limits) / max(height, width), min(limits) / min(height, width))
    new = int(width * scale + 0.5), int(height * scale + 0.5)
    image = cv2.resize(pixels, new, interpolation=cv2.INTER_LINEAR)
    found = []
    for left, top, box_width, box_height in boxes:
        corners = np.array([left, top, left + box_width, top + box_height], np.float32)
        corners *= np.array([new[0] / width, new[1] / height] * 2, np.float32)
        corners = corners.clip(0, [new[0], new[1]] * 2).astype(np.float32)
        if flip:
            corners[0], corners[2] = new[0] - corners[2], new[0] - corners[0]
        found.append(corners)
    return image[:, ::-1] if flip else image, np.array(found), new[::-1]


BOXES = [(10.3, 5.2, 30.7, 40.1), (-0.5, 50.2, 20.25, 10.3), (60.1, 20.2, 20.4, 8.8)]


@pytest.mark.parametrize('flip', [False, True])
@pytest.mark.parametrize('limits', [(40, 60), (30, 64), (60, 80), (75, 120)])
def test_images_and_boxes_are_mmdetections(limits, flip):
    given, pixels = record(BOXES)
    example = make(given, scales=[limits], flip=float(flip))
    image, boxes, size = theirs(pixels, BOXES, limits, flip)
    assert example['size'].tolist() == list(size)
    np.testing.assert_array_equal(example['image'][: size[0], : size[1]], image)
    assert not example['image'][size[0] :].any()
    assert not example['image'][:, size[1] :].any()
    np.testing.assert_array_equal(example['boxes'][:3], boxes)
    assert example['labels'].tolist() == [3, 4, 5, -1, -1]
    assert not example['boxes'][3:].any()
    assert not example['masks'][3:].any()
    assert not example['mask_boxes'][3:].any()


@pytest.mark.parametrize('flip', [False, True])
def test_masks_belong_to_their_boxes(flip):
    given, _ = record(BOXES)
    example = make(given, scales=[(60, 80)], flip=float(flip))
    for place, item in enumerate(given['objects']):
        mask = draw_mask(item['segmentation'], SIZE)
        mask = mask[:, ::-1] if flip else mask
        left, top, *_ = example['mask_boxes'][place].astype(int)
        part = mask[top : top + 64, left : left + 64]
        crop = example['masks'][place]
        np.testing.assert_array_equal(crop[: part.shape[0], : part.shape[1]], part)
        assert crop.sum() == mask.sum() > 0


def test_the_types_and_shapes_are_those_promised():
    given, _ = record(BOXES)
    example = make(given)
    assert {key: (value.shape, value.dtype) for key, value in example.items()} == {
        'image': ((64, 64, 3), np.uint8),
        'size': ((2,), np.int32),
        'boxes': ((5, 4), np.float32),
        'labels': ((5,), np.int32),
        'masks': ((5, 64, 64), np.uint8),
        'mask_boxes': ((5, 4), np.float32),
    }
    assert make(given, mask_size=None).keys() == {'image', 'size', 'boxes', 'labels'}
    # A canvas is chosen by the image.
    both = {'scales': [(60, 80)], 'canvases': [(64, 96), (96, 64)]}
    shapes = [make(record([], size)[0], **both)['image'].shape for size in ((60, 80), (80, 60))]
    assert shapes == [(64, 96, 3), (96, 64, 3)]


def test_limits_and_mirroring_are_drawn():
    given, pixels = record(BOXES[:1])
    scales = [(30, 60), (36, 60), (40, 60)]
    examples = [make(given, seed, scales=scales, flip=0.25) for seed in range(300)]
    heights = np.array([example['size'][0] for example in examples])
    assert set(heights) == {30, 36, 40}
    shares = [np.mean(heights == height) for height in (30, 36, 40)]
    np.testing.assert_allclose(shares, 1 / 3, atol=0.08)
    left, _ = (theirs(pixels, BOXES[:1], (40, 60), flip)[1][0, 0] for flip in (False, True))
    mirrored = [e['boxes'][0, 0] / e['size'][0] > left / 40 + 0.1 for e in examples]
    assert np.mean(mirrored) == pytest.approx(0.25, abs=0.08)
    again = make(given, 7, scales=scales, flip=0.25)
    for key, value in again.items():
        np.testing.assert_array_equal(value, examples[7][key])


def test_what_is_no_target_is_left_out():
    given, _ = record([*BOXES, (10, 10, 0.5, 30), (79.5, 3, 20, 20)])
    given['objects'][1] |= {'iscrowd': 1, 'segmentation': run_lengths(*SIZE)}
    assert make(given)['labels'].tolist() == [3, 5, -1, -1, -1]
    empty = make(record([])[0])
    assert empty['labels'].tolist() == [-1] * 5
    assert not empty['boxes'].any()
    assert not empty['masks'].any()


def test_the_largest_objects_are_kept_in_their_order():
    boxes = [(1, 1, 10 + side, 20) for side in (3, 9, 1, 7, 9, 5)]
    example = make(record(boxes)[0], max_boxes=4)
    assert example['labels'].tolist() == [3 + 1, 3 + 3, 3 + 4, 3 + 5]


def test_boxes_of_nothing():
    assert resized_boxes([], (10, 10), (20, 20), mirrored=True).shape == (0, 4)


def test_examples_of_evaluation():
    given, pixels = record(BOXES)
    example = evaluation_example(given | {'index': 7}, (40, 60), (64, 64))
    image, _, size = theirs(pixels, [], (40, 60), False)
    np.testing.assert_array_equal(example['image'][: size[0], : size[1]], image)
    assert not example['image'][size[0] :].any()
    assert example['size'].tolist() == list(size)
    assert example['original_size'].tolist() == list(SIZE)
    assert example['index'] == 7
    filling = evaluation_filling((64, 64))
    assert {key: (value.shape, value.dtype) for key, value in example.items()} == {
        key: (value.shape, value.dtype) for key, value in filling.items()
    }
    assert filling['index'] == -1


def test_exif_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :30] = 200
    image = crafted.encode(Image.fromarray(pixels), 'JPEG', exif=exif, quality=95)
    example = make({'image': image, 'size': (60, 40), 'objects': []}, scales=[(40, 60)])
    assert example['size'].tolist() == [60, 40]
    np.testing.assert_allclose(example['image'][:25, :40], 200, atol=5)
    np.testing.assert_allclose(example['image'][35:60, :40], 0, atol=5)


def test_bad_records_are_errors():
    given, _ = record(BOXES)
    with pytest.raises(DataError, match='the image has 80 x 60 pixels, and the data set says 80 x'):
        make(given | {'size': (61, 80)})
    with pytest.raises(DataError, match='damaged PNG'):
        make(given | {'image': given['image'][:90]})
    with pytest.raises(DataError, match='a segmentation has a polygon'):
        make(record(BOXES, segmentation=[[1, 2]])[0])
    with pytest.raises(DataError, match='a segmentation is neither'):
        make(record(BOXES, segmentation=None)[0])
    assert make(record(BOXES, segmentation=None)[0], mask_size=None)['labels'][0] == 3


@pytest.mark.parametrize(
    'change',
    [{'flip': -0.1}, {'flip': 1.1}, {'max_boxes': 0}, {'max_boxes': 2000}, {'mask_size': 0}],
)
def test_options_that_cannot_be_are_refused(change):
    (name,) = change
    with pytest.raises(ConfigError, match=f'^{name} is '):
        options(**change)
