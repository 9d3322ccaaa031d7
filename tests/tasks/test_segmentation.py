"""Tests of gcnet_jax.tasks.segmentation, against numpy one pixel at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcnet_jax.data.preprocessing import KeepRatio
from gcnet_jax.errors import CheckpointError, ConfigError, DataError
from gcnet_jax.stored import ModelDescription
from gcnet_jax.tasks import Segmentation
from gcnet_jax.tasks.segmentation import SegmentationEvaluation, confusion_matrices

CLASSES, IGNORED = 4, 255
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
TASK = Segmentation(CLASSES, MEAN, STD)


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, (3, 5, 6)).astype(np.uint8)
    labels[rng.random(labels.shape) < 0.3] = IGNORED
    return {'image': rng.integers(0, 256, (3, 5, 6, 3), dtype=np.uint8), 'label': labels}


@pytest.fixture
def outputs():
    rng = np.random.default_rng(1)
    names = ('logits', 'auxiliary_logits')
    return {name: rng.normal(size=(3, 5, 6, CLASSES)).astype(np.float32) for name in names}


def losses_by_hand(logits, labels):
    """Minus the logarithm of the own class's probability, pixel by pixel."""
    losses = np.zeros(labels.shape)
    for place in np.ndindex(labels.shape):
        if labels[place] != IGNORED:
            powers = np.exp(logits[place].astype(np.float64))
            losses[place] = -np.log(powers[labels[place]] / powers.sum())
    return losses


def test_the_loss_is_that_of_the_labelled_pixels_and_of_both_heads(batch, outputs):
    prepared = TASK.prepare(batch, jax.random.key(0))
    sums = TASK.loss(outputs, prepared)
    main, auxiliary = (losses_by_hand(outputs[name], batch['label']).sum() for name in outputs)
    np.testing.assert_allclose(sums['loss'], main + 0.4 * auxiliary, rtol=1e-6)
    counted = batch['label'] != IGNORED
    assert sums['pixels'] == TASK.weight(prepared) == counted.sum() < counted.size
    right = (outputs['logits'].argmax(-1) == batch['label'])[counted].sum()
    assert sums['correct'] == right
    metrics = TASK.training_metrics({**sums, 'weight': counted.sum(), 'count': 3})
    assert metrics['pixel_accuracy'] == pytest.approx(right / counted.sum())
    assert metrics['loss'] == pytest.approx((main + 0.4 * auxiliary) / counted.sum(), rel=1e-6)
    del outputs['auxiliary_logits']
    np.testing.assert_allclose(TASK.loss(outputs, prepared)['loss'], main, rtol=1e-6)
    all_pixels = Segmentation(CLASSES, MEAN, STD, count_ignored=True)
    assert all_pixels.weight(prepared) == counted.size
    np.testing.assert_allclose(all_pixels.loss(outputs, prepared)['loss'], main, rtol=1e-6)


def test_the_gradient_of_each_logit_is_its_probability_less_one_of_the_label(batch, outputs):
    prepared = TASK.prepare(batch, None)
    logits = outputs['logits']
    gradient = jax.grad(lambda values: TASK.loss({'logits': values}, prepared)['loss'])(logits)
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    labels = batch['label']
    expected = expected - np.eye(256)[labels][..., :CLASSES]
    expected[labels == IGNORED] = 0
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_a_batch_without_labels_has_no_loss_and_no_gradient(batch, outputs):
    batch['label'][:] = IGNORED
    prepared = TASK.prepare(batch, None)
    assert TASK.weight(prepared) == 0
    loss, gradient = jax.value_and_grad(lambda values: TASK.loss(values, prepared)['loss'])(outputs)
    assert loss == 0
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))
    sums = {'loss': 0.0, 'weight': 0.0, 'correct': 0.0, 'pixels': 0.0, 'count': 3}
    assert TASK.training_metrics(sums) == {'loss': 0.0, 'pixel_accuracy': 0.0}


def test_logits_of_half_precision_are_summed_in_float32(batch, outputs):
    prepared = TASK.prepare(batch, None)
    half = {'logits': jnp.asarray(outputs['logits'], jnp.bfloat16)}
    rounded = {'logits': np.asarray(half['logits'], np.float32)}
    assert TASK.loss(half, prepared)['loss'] == TASK.loss(rounded, prepared)['loss']


def test_padding_is_zero_after_the_normalisation(batch):
    sizes = np.array([[5, 6], [3, 6], [5, 2]], np.int32)
    prepared = TASK.prepare({**batch, 'size': sizes}, None)
    expected = (batch['image'] / 255 - MEAN) / STD
    for image, (height, width) in zip(expected, sizes, strict=True):
        image[height:], image[:, width:] = 0, 0
    np.testing.assert_allclose(prepared['image'], expected, atol=1e-6)


def test_evaluation_adds_up_confusion_and_loss_of_the_images_that_count(batch, outputs):
    mask = np.array([True, False, True])
    results = jax.jit(TASK.results)(outputs, {**batch, 'mask': mask})
    answers = outputs['logits'].argmax(-1)
    expected = np.zeros((3, CLASSES, CLASSES), int)
    for place in np.ndindex(answers.shape):
        if batch['label'][place] != IGNORED:
            expected[place[0], batch['label'][place], answers[place]] += 1
    assert results['confusion'].dtype == jnp.int32
    np.testing.assert_array_equal(results['confusion'], expected)
    evaluation = SegmentationEvaluation(CLASSES)
    for _ in range(2):
        evaluation.add(jax.device_get(results))
    confusion = 2 * expected[mask].sum(0)
    np.testing.assert_array_equal(evaluation.confusion, confusion)
    metrics = evaluation.metrics()
    losses = losses_by_hand(outputs['logits'], batch['label'])[mask].sum()
    assert metrics['loss'] == pytest.approx(2 * losses / confusion.sum(), rel=1e-6)
    assert metrics['examples'] == 4
    assert metrics['pixel_accuracy'] == np.trace(confusion) / confusion.sum()
    union = confusion.sum(0) + confusion.sum(1) - np.diagonal(confusion)
    assert metrics['miou'] == pytest.approx((np.diagonal(confusion) / union).mean())


def test_padding_that_is_not_finite_does_not_count(batch, outputs):
    outputs['logits'][1] = np.nan
    mask = np.array([True, False, True])
    evaluation = SegmentationEvaluation(CLASSES)
    evaluation.add(jax.device_get(TASK.results(outputs, {**batch, 'mask': mask})))
    assert np.isfinite(list(evaluation.metrics().values())).all()


def test_counts_of_a_large_image_are_exact():
    labels = np.zeros((1, 2048, 4100), np.int32)
    labels[0, 0, :3] = 1
    matrix = confusion_matrices(labels, np.zeros_like(labels), 2)[0]
    np.testing.assert_array_equal(matrix, [[2048 * 4100 - 3, 0], [3, 0]])


def test_images_without_any_label_cannot_be_evaluated(batch, outputs):
    batch['label'][:] = IGNORED
    evaluation = SegmentationEvaluation(CLASSES)
    evaluation.add(jax.device_get(TASK.results(outputs, {**batch, 'mask': np.ones(3, bool)})))
    with pytest.raises(DataError, match=r'all pixels of the 3 images .* labelled 255'):
        evaluation.metrics()


def data_group(**settings):
    return {'image_size': None, 'evaluation_image_size': None, **settings}


@pytest.mark.parametrize(
    ('settings', 'expected'),
    [
        ({}, (64, 100, (32, 48))),
        ({'image_size': 40}, (64, 100, 40)),
        ({'image_size': [24, 32], 'evaluation_image_size': [30, 60]}, (30, 60, (24, 32))),
        ({'evaluation_image_size': 32}, (32, 50, (32, 48))),
    ],
)
def test_crop_and_limits_are_the_configs_or_else_the_networks(settings, expected):
    base = KeepRatio(MEAN, STD, 64, 100, 1, (32, 48))
    found = Segmentation.preprocessing(data_group(**settings), base)
    assert (found.short_side, found.long_side, found.train_size) == expected
    assert (found.mean, found.std) == (MEAN, STD)


def test_a_network_without_a_crop_needs_one():
    with pytest.raises(ConfigError, match=r'config\.data\.image_size is not set'):
        Segmentation.preprocessing(data_group(), KeepRatio())


CLASSIFIER = ModelDescription('resnet18', {'num_classes': 3}, ('a', 'b', 'c'))
SEGMENTER = ModelDescription(
    'gc_resnet50_d8_voc',
    {'num_classes': 2, 'backbone': 'resnet18'},
    ('b', 'sky'),
    KeepRatio(train_size=32),
    task='segmentation',
)


def test_a_classifier_fills_the_backbone_but_for_its_last_layer():
    stored = {'params': {'stem': 1, 'classifier': 2}, 'batch_stats': {'stem': 3}}
    moved, new = Segmentation.take_over(CLASSIFIER, stored)
    assert moved == {
        'params': {'backbone': {'stem': 1}},
        'batch_stats': {'backbone': {'stem': 3}},
    }
    assert new == ('head', 'auxiliary_head')
    plan = Segmentation.plan_outputs(SEGMENTER, CLASSIFIER, None, 'DIR')
    assert plan.kept == ()
    assert plan.text == 'the backbone is that of resnet18; the heads start at random'
    with pytest.raises(ConfigError, match='new_classifier is False, but DIR holds resnet18'):
        Segmentation.plan_outputs(SEGMENTER, CLASSIFIER, False, 'DIR')


def test_a_segmenter_keeps_the_outputs_whose_labels_it_knows():
    other = ModelDescription(
        'gc_resnet50_d8_voc',
        {'num_classes': 3, 'backbone': 'resnet18'},
        ('a', 'b', 'c'),
        KeepRatio(train_size=32),
        task='segmentation',
    )
    stored = {'params': {'head': 1}}
    assert Segmentation.take_over(other, stored) == (stored, ())
    assert Segmentation.plan_outputs(SEGMENTER, other, None, 'DIR').kept == ((0, 1),)
    with pytest.raises(CheckpointError, match='holds a run on 2 labels'):
        Segmentation.check_continued('DIR', SEGMENTER, other)
