"""Deformable convolution against the definition, and against an ordinary convolution."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from gcnet_jax.models.layers import Conv
from gcnet_jax.ops.deformable import deformable_convolution


def draw(stride, groups, seed=0, size=(7, 6), channels=4, out=6):
    rng = np.random.default_rng(seed)
    height, width = (-(-side // stride) for side in size)
    features = rng.normal(size=(2, *size, channels)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, channels // groups, out)).astype(np.float32)
    offsets = rng.normal(size=(2, height, width, 18)).astype(np.float32) * 2
    return features, kernel, offsets


def pixel(image, y, x):
    inside = 0 <= y < image.shape[0] and 0 <= x < image.shape[1]
    return image[y, x] if inside else np.zeros(image.shape[-1])


def reference(features, kernel, offsets, stride, groups):
    batch, height, width, _ = offsets.shape
    channels, out = kernel.shape[2:]
    result = np.zeros((batch, height, width, out))
    for b, i, j, r, c in np.ndindex(batch, height, width, 3, 3):
        dy, dx = offsets[b, i, j, 2 * (3 * r + c) :][:2].astype(np.float64)
        y, x = i * stride - 1 + r + dy, j * stride - 1 + c + dx
        top, left = int(np.floor(y)), int(np.floor(x))
        value = sum(
            (1 - abs(y - row)) * (1 - abs(x - column)) * pixel(features[b], row, column)
            for row in (top, top + 1)
            for column in (left, left + 1)
        )
        for g in range(groups):
            some = slice(g * out // groups, (g + 1) * out // groups)
            group = value[g * channels : (g + 1) * channels]
            result[b, i, j, some] += group @ kernel[r, c, :, some]
    return result


@pytest.mark.parametrize(('stride', 'groups'), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_agrees_with_the_definition(stride, groups):
    features, kernel, offsets = draw(stride, groups)
    offsets[0, 0, 0, :4] = [-50, 3, 1e6, -1e6]  # Far outside: 0.
    actual = jax.jit(deformable_convolution, static_argnames=('stride', 'groups'))(
        features, kernel, offsets, stride=stride, groups=groups
    )
    expected = reference(features, kernel, offsets, stride, groups)
    np.testing.assert_allclose(actual, expected, atol=2e-5)


@pytest.mark.parametrize(('stride', 'groups'), [(1, 1), (2, 2)])
def test_without_offsets_it_is_a_convolution(stride, groups):
    features, kernel, offsets = draw(stride, groups)
    plain = Conv(6, 3, stride, groups).apply({'params': {'kernel': kernel}}, features)
    actual = deformable_convolution(features, kernel, 0 * offsets, stride=stride, groups=groups)
    np.testing.assert_allclose(actual, plain, atol=2e-5)


@pytest.mark.parametrize(('stride', 'groups'), [(1, 2), (2, 1)])
def test_gradients_agree_with_finite_differences(stride, groups, float64):
    drawn = draw(stride, groups, size=(4, 5))
    features, kernel, offsets = (np.float64(values) for values in drawn)
    # Away from whole pixels, where the interpolation has a corner.
    offsets = np.floor(offsets) + np.clip(offsets - np.floor(offsets), 0.1, 0.9)
    inputs = tuple(map(jnp.asarray, (features, kernel, offsets)))
    compute = jax.jit(functools.partial(deformable_convolution, stride=stride, groups=groups))
    check_grads(compute, inputs, 1, atol=1e-4, rtol=1e-4)


def test_bfloat16_keeps_places_exact():
    features, kernel, offsets = draw(1, 1, size=(5, 300))
    wide = deformable_convolution(features, kernel, offsets)
    narrow = deformable_convolution(
        features.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), offsets
    )
    assert narrow.dtype == jnp.bfloat16
    assert np.abs(narrow.astype(np.float32) - wide).max() < 0.03 * np.abs(wide).max()
