import jax.numpy as jnp
import numpy as np
import pytest

from gcnet_jax.tasks.losses import (
    balanced_weights,
    cross_entropy,
    example_weights,
    is_highest,
    smooth_labels,
)

RNG = np.random.default_rng(0)


def test_cross_entropy_is_minus_the_expected_log_probability():
    logits = RNG.normal(size=(5, 7)) * 5
    labels = RNG.dirichlet(np.ones(7), size=5)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = -(labels * np.log(probabilities)).sum(axis=1)
    np.testing.assert_allclose(
        cross_entropy(jnp.array(logits), jnp.array(labels)), expected, rtol=1e-5
    )


def test_cross_entropy_runs_in_float32_and_does_not_overflow():
    losses = cross_entropy(jnp.array([[1000.0, 0.0]], jnp.bfloat16), jnp.array([[0.0, 1.0]]))
    assert losses.dtype == jnp.float32
    assert losses[0] == 1000


def test_label_smoothing_keeps_the_sum():
    labels = np.eye(4)[[1, 3]]
    expected = np.where(labels == 1, 0.9 + 0.1 / 4, 0.1 / 4)
    np.testing.assert_allclose(smooth_labels(jnp.array(labels), 0.1), expected, rtol=1e-6)


def test_the_highest_is_the_first_of_a_stable_sort():
    logits = RNG.integers(0, 4, size=(200, 6)).astype(np.float32)  # With many ties.
    labels = RNG.integers(0, 6, size=200)
    expected = np.argsort(-logits, axis=1, kind='stable')[:, 0] == labels
    np.testing.assert_array_equal(is_highest(jnp.array(logits), jnp.array(labels)), expected)


def test_a_logit_that_is_not_a_number_is_never_right():
    logits = jnp.array([[jnp.nan, 1.0], [0.0, 1.0]])
    np.testing.assert_array_equal(is_highest(logits, jnp.array([0, 1])), [False, True])


def test_balanced_weights_are_scikit_learns():
    from sklearn.utils.class_weight import compute_class_weight

    labels = np.array([0, 0, 0, 0, 2, 2, 3])
    weights = balanced_weights(labels, 5)
    expected = compute_class_weight('balanced', classes=np.array([0, 2, 3]), y=labels)
    np.testing.assert_allclose([weights[0], weights[2], weights[3]], expected)
    assert weights[1] == weights[4] == 0
    assert np.mean([weights[label] for label in labels]) == pytest.approx(1)


def test_a_mixed_example_has_its_classes_weights_in_the_same_shares():
    labels = np.array([[1, 0, 0], [0, 0, 1], [0.25, 0.75, 0]], np.float32)
    weights = example_weights(labels, (2.0, 4.0, 0.5))
    np.testing.assert_allclose(weights, [2, 0.5, 3.5])
