"""Classification's evaluation and class weights against their definitions."""

import dataclasses

import jax
import numpy as np
import pytest

from gcnet_jax.data import on_device
from gcnet_jax.errors import ConfigError
from gcnet_jax.tasks import Classification, find_task
from gcnet_jax.tasks.classification import ClassificationEvaluation

TASK = Classification(6, mean=(0.5,) * 3, std=(0.25,) * 3)


def evaluated(logits, labels, mask=None):
    evaluation = ClassificationEvaluation(6)
    mask = np.ones(len(labels), bool) if mask is None else mask
    evaluation.add({'logits': logits, 'label': labels, 'mask': mask})
    return evaluation


def test_the_ranks_are_those_of_a_stable_sort():
    rng = np.random.default_rng(0)
    logits = rng.integers(0, 4, (200, 6)).astype(np.float32)  # With many ties.
    labels = rng.integers(0, 6, 200)
    order = np.argsort(-logits, axis=1, kind='stable')
    metrics = evaluated(logits, labels).metrics()
    assert metrics['accuracy'] == (order[:, 0] == labels).mean()
    assert metrics['top5'] == (order[:, :5] == labels[:, None]).any(axis=1).mean()
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert metrics['loss'] == pytest.approx(-logs[np.arange(200), labels].mean(), rel=1e-6)


def test_padding_does_not_count_and_the_confusion_is_by_class():
    logits = np.eye(6, dtype=np.float32)[[1, 1, 2, 5]]
    evaluation = evaluated(logits, np.array([1, 2, 2, 0]), np.array([True, True, True, False]))
    assert evaluation.examples == 3
    assert evaluation.confusion.sum() == 3
    assert evaluation.confusion[1, 1] == evaluation.confusion[2, 1] == evaluation.confusion[2, 2]
    assert evaluation.metrics()['accuracy'] == pytest.approx(2 / 3)


def test_a_logit_that_is_not_a_number_is_never_right_and_is_seen_in_the_loss():
    logits = np.array([[np.nan, 1, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]], np.float32)
    evaluation = evaluated(logits, np.array([0, 1]))
    metrics = evaluation.metrics()
    assert metrics['accuracy'] == metrics['top5'] == 0.5
    assert np.isnan(metrics['loss'])
    assert evaluation.confusion.sum() == 1


def test_no_example_gives_no_metrics():
    metrics = ClassificationEvaluation(6).metrics()
    assert metrics['examples'] == 0
    assert np.isnan(metrics['accuracy'])


def test_an_unknown_task_names_the_nearest():
    assert find_task('classification') is Classification
    with pytest.raises(ConfigError, match=r"unknown task 'clasification'.*'classification'"):
        find_task('clasification')
    with pytest.raises(ConfigError, match='unknown task'):
        find_task(['classification'])


@pytest.mark.parametrize(
    ('settings', 'mixed', 'erased'),
    [
        ({}, False, False),
        ({'mixup_alpha': 0.5}, True, False),
        ({'cutmix_alpha': 0.5}, True, False),
        ({'erasing_probability': 1.0}, False, True),
        ({'mixup_alpha': 0.5, 'cutmix_alpha': 2.0, 'erasing_probability': 1.0}, True, True),
    ],
)
def test_a_batch_is_normalised_then_erased_then_mixed(settings, mixed, erased):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 6, 6, 3), dtype=np.uint8)
    labels = rng.integers(0, 6, 8).astype(np.int32)
    task, key = dataclasses.replace(TASK, **settings), jax.random.key(3)
    erase_key, mix_key = jax.random.split(key)
    expected = plain = on_device.normalize(images, task.mean, task.std)
    targets = np.eye(6, dtype=np.float32)[labels]
    if erased:
        expected = on_device.random_erasing(erase_key, expected, 1.0)
    if mixed:
        alphas = settings.get('mixup_alpha', 0.0), settings.get('cutmix_alpha', 0.0)
        expected, targets = on_device.mix(mix_key, expected, targets, *alphas)
    batch = task.prepare({'image': images, 'label': labels}, key)
    np.testing.assert_allclose(batch['image'], expected, atol=1e-6)
    np.testing.assert_allclose(batch['label'], targets, atol=1e-6)
    # Evaluation has no key, and nothing random.
    np.testing.assert_array_equal(
        task.prepare({'image': images, 'label': labels}, None)['image'], plain
    )


def test_an_infinite_logit_is_seen_in_the_loss():
    logits = np.zeros((2, 6), np.float32)
    logits[0, 3] = -np.inf  # Its exponential is 0, and the sum finite.
    assert np.isnan(evaluated(logits, np.array([0, 1])).metrics()['loss'])
