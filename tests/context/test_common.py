"""What all blocks check and compute alike, each function by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcnet_jax.context.common import (
    check_features,
    flatten_positions,
    float32_or_wider,
    hidden_size,
    masked_softmax,
)
from gcnet_jax.errors import ConfigError


def test_sums_are_float32_or_wider():
    wide = [float32_or_wider(jnp.dtype(name)) for name in ('bfloat16', 'float16', 'float32')]
    assert wide == [jnp.float32] * 3
    assert float32_or_wider(np.dtype('float64')) == np.float64


@pytest.mark.parametrize(
    ('channels', 'ratio', 'rounding', 'width'),
    [
        (104, 1 / 16, 'floor', 6),
        (104, 1 / 16, 'nearest', 7),  # 6.5
        (103, 1 / 16, 'nearest', 6),
        (8, 1 / 16, 'floor', 1),
        (7, 1 / 16, 'nearest', 1),
        (6, 1, 'floor', 6),
        (6, 1, 'nearest', 6),
    ],
)
def test_hidden_size_by_ratio(channels, ratio, rounding, width):
    assert hidden_size(channels, ratio, None, rounding) == width
    assert hidden_size(channels, ratio, 1, rounding) == 1
    with pytest.raises(ConfigError, match='hidden_channels must be 1 or more, got 0'):
        hidden_size(channels, ratio, 0, rounding)


def test_a_ratio_above_one_is_probably_its_inverse():
    with pytest.raises(ConfigError, match=r'\(0, 1\], got 16; did you mean 1/16\?$'):
        hidden_size(64, 16, None, 'floor')
    with pytest.raises(ConfigError, match=r'\(0, 1\], got 0$'):
        hidden_size(64, 0.0, None, 'floor')


@pytest.mark.parametrize('shape', [(1, 1, 1), (2, 3, 4), (0, 3, 4), (2, 3, 3, 3, 4)])
def test_features_have_a_batch_positions_and_channels(shape):
    check_features(np.zeros(shape, np.float16), np.zeros(shape[:-1], bool), 'Block')


@pytest.mark.parametrize('shape', [(), (4,), (3, 4), (2, 0, 4), (2, 3, 0)])
def test_features_without_positions_or_channels_are_refused(shape):
    with pytest.raises(ValueError, match=r'Block: features must be .*got shape'):
        check_features(np.zeros(shape, np.float32), None, 'Block')


@pytest.mark.parametrize(
    ('mask', 'error', 'found'),
    [
        ([[True] * 3] * 2, TypeError, 'got list'),
        (np.ones((2, 3), np.uint8), TypeError, 'got uint8'),
        (np.ones((2, 3, 4), bool), ValueError, r'\(2, 3\), got shape \(2, 3, 4\)'),
        (np.ones((2, 1), bool), ValueError, r'\(2, 3\), got shape \(2, 1\)'),
    ],
)
def test_masks_are_boolean_and_have_the_shape_of_the_positions(mask, error, found):
    with pytest.raises(error, match=f'Block: mask must be .*{found}'):
        check_features(np.zeros((2, 3, 4), np.float32), mask, 'Block')


def test_positions_are_joined_and_hidden_ones_are_not_read():
    features = np.arange(2 * 3 * 2 * 4, dtype=np.float32).reshape(2, 3, 2, 4)
    positions, valid = flatten_positions(features, None)
    assert valid is None
    np.testing.assert_array_equal(positions, features.reshape(2, 6, 4))
    mask = np.arange(12).reshape(2, 3, 2) % 3 > 0
    hidden = np.where(mask[..., None], features, np.nan)
    positions, valid = flatten_positions(hidden, mask)
    np.testing.assert_array_equal(valid, mask.reshape(2, 6))
    np.testing.assert_array_equal(positions[valid], features.reshape(2, 6, 4)[valid])
    assert not positions[~valid].any()


@pytest.mark.parametrize('offset', [0.0, 300.0, -300.0])
def test_softmax_over_the_valid_positions(offset):
    logits = np.random.default_rng(0).normal(offset, 3, (2, 3, 5)).astype(np.float32)
    mask = np.array([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0]], bool)[:, None, :]
    exponentials = np.exp(np.float64(logits) - offset)
    everywhere = exponentials / exponentials.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(masked_softmax(jnp.asarray(logits), None), everywhere, rtol=1e-4)
    exponentials = exponentials * mask
    valid = exponentials / np.maximum(exponentials.sum(axis=-1, keepdims=True), 1e-300)
    np.testing.assert_allclose(masked_softmax(jnp.asarray(logits), mask), valid, rtol=1e-4)


def test_softmax_is_float32_with_finite_gradients_where_nothing_is_valid():
    logits = jnp.asarray([[1, 2, 3], [4, 5, 6]], jnp.bfloat16)
    mask = jnp.asarray([[True, True, False], [False, False, False]])
    for hidden in (None, mask):
        assert masked_softmax(logits, hidden).dtype == jnp.float32
    gradient = jax.grad(lambda x: masked_softmax(x, mask)[:, 0].sum())(logits)
    share = 1 / (1 + np.e)
    expected = [[share * (1 - share), -share * (1 - share), 0], [0, 0, 0]]
    np.testing.assert_allclose(np.float32(gradient), expected, atol=2e-3)
