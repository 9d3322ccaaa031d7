"""Tests of gcnet_jax.tasks.confusion."""

import numpy as np
import pytest

from gcnet_jax.tasks import confusion


def _by_hand(labels, answers, classes):
    """IoU and accuracy of each class from sets of pixels, one class at a time."""
    ious, accuracies = [], []
    for one in range(classes):
        true, answered = labels == one, answers == one
        both, either = (true & answered).sum(), (true | answered).sum()
        ious.append(both / either if either else np.nan)
        accuracies.append(both / true.sum() if true.sum() else np.nan)
    return np.array(ious), np.array(accuracies)


def test_figures_of_classes_by_sets_of_pixels() -> None:
    rng = np.random.default_rng(0)
    labels, answers = rng.integers(0, 4, 500), rng.integers(0, 5, 500)  # Class 5 is in neither.
    matrix = np.zeros((6, 6), np.int64)
    np.add.at(matrix, (labels, answers), 1)
    ious, accuracies = _by_hand(labels, answers, 6)
    np.testing.assert_allclose(confusion.iou(matrix), ious, rtol=1e-12)
    np.testing.assert_allclose(confusion.accuracy(matrix), accuracies, rtol=1e-12)
    assert np.isnan(confusion.iou(matrix)[5])
    assert confusion.iou(matrix)[4] == 0
    figures = confusion.summary(matrix)
    assert figures['miou'] == pytest.approx(ious[:5].mean(), rel=1e-12)
    assert figures['mean_accuracy'] == pytest.approx(accuracies[:4].mean(), rel=1e-12)
    assert figures['pixel_accuracy'] == pytest.approx((labels == answers).mean(), rel=1e-12)


def test_counts_beyond_int32_and_float32() -> None:
    matrix = np.array([[2**40 + 1, 1], [0, 2**40]], np.int64)
    assert confusion.iou(matrix)[1] == 2**40 / (2**40 + 1)
    assert confusion.summary(matrix)['pixel_accuracy'] < 1


def test_no_pixel_has_no_figure() -> None:
    figures = confusion.summary(np.zeros((3, 3), np.int32))
    assert set(figures) == {'miou', 'pixel_accuracy', 'mean_accuracy'}
    assert np.isnan(list(figures.values())).all()
