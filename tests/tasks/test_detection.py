"""Tests of gcnet_jax.tasks.detection; its losses have tests of their own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcnet_jax.data.detection_folder import prepare_detection
from gcnet_jax.data.detection_sources import load_detection
from gcnet_jax.data.preprocessing import KeepRatio
from gcnet_jax.errors import CheckpointError, ConfigError, DataError
from gcnet_jax.stored import ModelDescription
from gcnet_jax.tasks import Detection
from gcnet_jax.training.checks import check_config
from gcnet_jax.training.config import default_config, name_task
from tests.data import detection_folders as folders

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
TASK = Detection(3, MEAN, STD, max_boxes=2, mask_size=8)
SETTINGS = {'max_boxes': 2, 'mask_size': 8}
DATA = dict.fromkeys(('image_size', 'evaluation_image_size', 'scales', 'canvases'))


def data_group(**settings):
    return {**DATA, 'flip': True, **settings}


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp('folder')
    folders.fill(root, {'train2017': range(7), 'val2017': range(20, 24)})
    place = str(tmp_path_factory.mktemp('sets'))
    prepare_detection(str(root), 'mine', place)
    return place


@pytest.fixture(scope='module')
def source(prepared):
    return load_detection('mine', 'validation', prepared)


def test_padding_is_zero_after_the_normalisation_and_the_network_reads_the_objects():
    rng = np.random.default_rng(0)
    shapes = TASK.batch_shapes(2, 6, 8)
    batch = {name: np.zeros(shape.shape, shape.dtype) for name, shape in shapes.items()}
    batch['image'] = rng.integers(0, 256, (2, 6, 8, 3), dtype=np.uint8)
    batch['size'] = np.array([[6, 8], [4, 5]], np.int32)
    prepared = TASK.prepare(batch, jax.random.key(0))
    expected = (batch['image'] / 255 - MEAN) / STD
    expected[1, 4:], expected[1, :, 5:] = 0, 0
    np.testing.assert_allclose(prepared['image'], expected, atol=1e-6)
    images, objects = TASK.inputs(prepared)
    np.testing.assert_array_equal(images, prepared['image'])
    assert objects.keys() == shapes.keys() == TASK.batch_spec().keys()
    assert TASK.weight(prepared) == 2
    images, sizes = TASK.evaluation_inputs(prepared)
    assert sizes.dtype == jnp.float32


def test_boxes_alone_have_no_masks_in_their_batches_and_results():
    task = dataclasses.replace(TASK, mask_size=None)
    assert task.batch_spec().keys() == {'image', 'size', 'boxes', 'labels'}
    outputs, batch = detections(), evaluation_batch()
    assert 'masks' in TASK.results(outputs, batch)
    assert 'masks' not in task.results(outputs, batch)


def test_the_metrics_of_training_are_means_over_images_and_boxes():
    sums = {'loss': 12.0, 'rpn_class': 2.0, 'rpn_box': 1.0, 'class': 4.0, 'box': 2.0, 'mask': 3.0}
    counts = {'positives': 10.0, 'boxes': 40.0, 'correct': 30.0, 'weight': 4.0, 'count': 4.0}
    metrics = TASK.training_metrics(sums | counts)
    assert metrics['loss'] == 3 == sum(v for name, v in metrics.items() if name.endswith('_loss'))
    assert (metrics['box_accuracy'], metrics['object_boxes']) == (0.75, 2.5)
    del sums['mask']
    metrics = TASK.training_metrics(sums | counts | {'boxes': 0.0, 'correct': 0.0})
    assert 'mask_loss' not in metrics
    assert metrics['box_accuracy'] == 0


def evaluation_batch():
    """Images 0 and 1, of 24 x 24 and 20 x 32 pixels, at twice that size, and padding."""
    return {
        'image': np.zeros((3, 64, 64, 3), np.uint8),
        'size': np.array([[48, 48], [40, 64], [64, 64]], np.int32),
        'original_size': np.array([[24, 24], [20, 32], [64, 64]], np.int32),
        'index': np.array([2, 3, -1], np.int32),
        'mask': np.array([True, True, False]),
    }


def detections():
    """One detection in each of the first two images, of two places."""
    boxes = np.zeros((3, 2, 4), np.float32)
    boxes[:2, 0] = (4, 6, 24, 22)
    masks = np.zeros((3, 2, 28, 28), np.float32)
    masks[:, 0] = 0.9
    return {
        'boxes': boxes,
        'scores': np.array([[0.7, 0], [0.6, 0], [0.9, 0.9]], np.float32),
        'labels': np.array([[1, 0], [1, 0], [0, 0]], np.int32),
        'valid': np.array([[True, False], [True, False], [True, True]]),
        'finite': np.array([True, True, False]),
        'masks': masks,
    }


def test_results_are_in_pixels_of_the_original_image_and_small():
    results = jax.jit(TASK.results)(detections(), evaluation_batch())
    np.testing.assert_allclose(results['boxes'][:2, 0], [[2, 3, 12, 11]] * 2)
    assert results['masks'].dtype == jnp.uint8
    np.testing.assert_array_equal(results['masks'][:, 0], 230)  # 0.9 * 255 is 229.5.
    assert sum(value.nbytes for value in results.values()) / 3 < 2 * (28 * 28 + 32) + 40


def objects_of(source):
    """The objects of every image as certain detections, in the form of `Detection.results`."""
    images = len(source)
    results = {
        'boxes': np.zeros((images, 2, 4), np.float32),
        'scores': np.full((images, 2), 0.9, np.float32),
        'labels': np.zeros((images, 2), np.int32),
        'valid': np.zeros((images, 2), bool),
        'finite': np.ones(images, bool),
        'masks': np.full((images, 2, 28, 28), 255, np.uint8),
        'original_size': np.zeros((images, 2), np.int32),
        'index': np.arange(images, dtype=np.int32),
        'mask': np.ones(images, bool),
    }
    for image in range(images):
        record = source[image]
        results['original_size'][image] = record['size']
        kept = [item for item in record['objects'] if not item['iscrowd']]
        for place, item in enumerate(kept):
            left, top, width, height = item['bbox']
            results['boxes'][image, place] = left, top, left + width, top + height
            results['labels'][image, place] = item['label']
            results['valid'][image, place] = True
    return results


def test_evaluation_is_average_precision_in_any_batches(source):
    results = objects_of(source)
    found = []
    for size in (4, 1):
        evaluation = TASK.evaluation(source)
        for start in range(0, 4, size):
            part = {name: value[start : start + size] for name, value in results.items()}
            evaluation.add(part)
            evaluation.add(part | {'mask': np.zeros(size, bool)})  # What pads a batch.
        found.append(evaluation.metrics())
    assert found[0] == found[1]
    assert found[0]['box_ap'] == pytest.approx(1)
    # The masks are triangles, half of their boxes: right at an overlap of 0.5 at most.
    assert found[0]['ap'] == found[0]['mask_ap'] < 0.3
    assert found[0]['examples'] == 4
    assert 'box_ap_large' not in found[0]  # There is no such object.
    del results['masks']
    evaluation = TASK.evaluation(source)
    evaluation.add(results)
    metrics = evaluation.metrics()
    assert metrics['ap'] == metrics['box_ap'] == pytest.approx(1)
    assert not any(name.startswith('mask') for name in metrics)


def test_what_is_not_finite_or_not_there_is_no_result(source):
    results = objects_of(source)
    results['finite'][1] = False
    evaluation = TASK.evaluation(source)
    evaluation.add(results)
    assert np.isnan(evaluation.metrics()['ap'])
    evaluation = TASK.evaluation(source)
    (empty,) = np.flatnonzero(source.index.counts == 0)
    evaluation.add({name: value[[empty]] for name, value in objects_of(source).items()})
    with pytest.raises(DataError, match='none of the 1 images to evaluate on has an object'):
        evaluation.metrics()


def test_what_is_left_out_is_noted(source):
    assert TASK.notes(source) == []
    task = dataclasses.replace(TASK, max_boxes=1, mask_size=None)
    left_out, boxes = task.notes(source)
    assert left_out.startswith('2 objects of 2 training images are left out: an image holds 1')
    assert boxes.startswith('boxes alone are trained')
    assert boxes.endswith('masks that the network predicts all the same are not trained')


def test_a_source_without_masks_trains_boxes(source):
    assert Detection.build(SETTINGS, source, KeepRatio(MEAN, STD)) == TASK
    bare = dataclasses.replace(TASK, mask_size=None)
    source = type('Bare', (), {'num_classes': 3, 'has_masks': False})
    assert Detection.build(SETTINGS, source, KeepRatio(MEAN, STD)) == bare


@pytest.mark.parametrize(
    ('settings', 'limits', 'canvas', 'scales'),
    [
        ({}, (64, 100), (64, 128), ((64, 100),)),
        ({'image_size': [30, 60]}, (30, 60), (32, 64), ((30, 60),)),
        ({'image_size': 32}, (32, 50), (32, 64), ((32, 50),)),
        ({'evaluation_image_size': 32}, (32, 50), (32, 64), ((32, 50),)),
        ({'image_size': 96, 'evaluation_image_size': 64}, (64, 100), (96, 160), ((96, 150),)),
        ({'scales': [[32, 64], [48, 96]]}, (64, 100), (64, 96), ((32, 64), (48, 96))),
        ({'canvases': [[96, 128], [128, 96]]}, (64, 100), (96, 128), ((64, 100),)),
    ],
)
def test_limits_are_the_configs_or_else_the_networks(settings, limits, canvas, scales):
    data = data_group(**settings)
    found = Detection.preprocessing(data, KeepRatio(MEAN, STD, 64, 100))
    assert (found.short_side, found.long_side) == limits
    assert found.train_shape == canvas
    assert (found.mean, found.std) == (MEAN, STD)
    assert TASK.train_loader(data, found).keywords['scales'] == scales


def test_a_size_that_would_do_nothing_is_refused():
    conflict = Detection.conflict_in(data_group(image_size=64, scales=((32, 64),)))
    assert conflict.startswith('config.data.image_size is 64 and config.data.scales')
    assert Detection.conflict_in(data_group(scales=((32, 64),))) is None
    for name in ('scales', 'canvases'):
        allowed = Detection.data_ranges[name]
        assert allowed.allows(((32, 64), [64, 96]))
        assert not any(map(allowed.allows, ((), (32, 64), ((0, 3),), ((32, 64, 3),), 'ab')))


@pytest.mark.parametrize('name', ['image_size', 'evaluation_image_size'])
@pytest.mark.parametrize(
    ('value', 'is_right'),
    [
        *((value, True) for value in (32, 800, 4096, (32, 32), [800, 1333])),
        *((value, False) for value in (0, 5, 31, 4097, (5, 800), (800, 5000), (65, 33))),
        *((value, False) for value in ('abc', 64.0, True, (), (64,), (64, 64, 64), ((64, 64),))),
    ],
)
def test_limits_of_the_sides_are_sensible_sizes_in_order(name, value, is_right):
    assert Detection.data_ranges[name].allows(value) == is_right
    if name == 'image_size' and isinstance(value, (tuple, list)):
        assert Detection.data_ranges['scales'].allows((value, (64, 64))) == is_right


def test_the_error_about_a_size_says_what_the_limits_are():
    config = default_config()
    name_task(config, 'detection')
    config.data.image_size = 5
    with pytest.raises(ConfigError, match=r'image_size is 5; .* from 32 to 4096 \(the short side'):
        check_config(config)


def test_masks_are_no_coarser_than_what_is_predicted():
    allows = Detection.ranges['mask_size'].allows
    assert allows(28)
    assert allows(1024)
    assert not any(map(allows, (0, 1, 27, 1025)))


CLASSIFIER = ModelDescription('resnet18', {'num_classes': 3}, ('a', 'b', 'c'))


def detector(name, *labels):
    options = {'num_classes': len(labels), 'backbone': 'resnet18'}
    return ModelDescription(name, options, labels, KeepRatio(), task='detection')


def test_a_classifier_fills_the_backbone_but_for_its_last_layer():
    stored = {'params': {'stem': 1, 'classifier': 2}, 'batch_stats': {'stem': 3}}
    moved, new = Detection.take_over(CLASSIFIER, stored)
    assert moved == {'params': {'backbone': {'stem': 1}}, 'batch_stats': {'backbone': {'stem': 3}}}
    assert {'neck', 'rpn_head', 'box_head_0', 'mask_head_2'} <= set(new)
    here = detector('mask_rcnn_resnet50_fpn', 'b', 'sky')
    plan = Detection.plan_outputs(here, CLASSIFIER, None, 'DIR')
    assert plan.kept == ()
    assert plan.text.startswith('the backbone is that of resnet18; all that follows')
    with pytest.raises(ConfigError, match='new_classifier is False, but DIR holds resnet18'):
        Detection.plan_outputs(here, CLASSIFIER, False, 'DIR')


def test_a_detector_keeps_the_classes_it_knows_and_the_background():
    name = 'mask_rcnn_resnet50_fpn'
    here, there = detector(name, 'b', 'sky'), detector(name, 'a', 'b', 'c')
    stored = {'params': {'neck': 1}}
    assert Detection.take_over(there, stored) == (stored, ())
    plan = Detection.plan_outputs(here, there, None, 'DIR')
    assert plan.kept == ((0, 1),)
    assert plan.kept_of['box_head_0/logits'] == ((0, 1), (2, 3))
    assert plan.kept_of['box_head_0/deltas'] == ((0, 4), (1, 5), (2, 6), (3, 7))
    # A cascade's boxes are of no class.
    name = 'cascade_mask_rcnn_resnext101_fpn_syncbn'
    plan = Detection.plan_outputs(detector(name, 'x'), detector(name, 'y'), None, 'DIR')
    assert plan.kept == plan.kept_of['box_head_2/logits'] == ()
    assert plan.kept_of['box_head_2/deltas'] == ((0, 0), (1, 1), (2, 2), (3, 3))
    with pytest.raises(CheckpointError, match='holds a run on 2 labels'):
        Detection.check_continued('DIR', here, there)
