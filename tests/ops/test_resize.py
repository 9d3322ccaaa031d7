"""Bilinear resizing against sums written out by hand and PyTorch, and functions of blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcnet_jax.ops.resize import map_resized, resize_bilinear, resize_weights

# Enlarged, shrunk, one axis of each, left as it is, to and from a single position.
SIZES = [
    ((5, 7), (13, 20)),
    ((13, 20), (5, 7)),
    ((9, 4), (4, 9)),
    ((6, 6), (6, 6)),
    ((6, 5), (6, 11)),
    ((1, 1), (4, 3)),
    ((1, 5), (3, 1)),
    ((7, 8), (1, 1)),
    ((2, 3), (16, 24)),
]


def place(index, old, new, align_corners):
    """Where a new position lies among the old ones, by PyTorch's definition."""
    if align_corners:
        return index * (old - 1) / (new - 1) if new > 1 else 0
    return max((index + 0.5) * old / new - 0.5, 0)


def by_hand(values, size, align_corners):
    """Every value for itself, in float64."""
    batch, height, width, channels = values.shape
    values = values.astype(np.float64)
    result = np.zeros((batch, *size, channels))
    for row, column in np.ndindex(*size):
        y = place(row, height, size[0], align_corners)
        x = place(column, width, size[1], align_corners)
        top, left = int(y), int(x)
        bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
        upper = values[:, top, left] * (1 - x + left) + values[:, top, right] * (x - left)
        lower = values[:, bottom, left] * (1 - x + left) + values[:, bottom, right] * (x - left)
        result[:, row, column] = upper * (1 - y + top) + lower * (y - top)
    return result


@pytest.fixture
def values():
    return np.random.default_rng(0).normal(size=(2, 5, 7, 3)).astype(np.float32)


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize(('old', 'new'), SIZES)
def test_values_are_bilinear(old, new, align_corners):
    values = np.random.default_rng(0).normal(size=(2, *old, 3)).astype(np.float32)
    expected = by_hand(values, new, align_corners)
    found = resize_bilinear(jnp.asarray(values), new, align_corners=align_corners)
    assert (found.shape, found.dtype) == ((2, *new, 3), jnp.float32)
    # Places are rounded to float32, as in PyTorch.
    np.testing.assert_allclose(found, expected, atol=5e-6)
    whole = map_resized(
        lambda given: given, jnp.asarray(values), new, align_corners=align_corners, max_values=10**6
    )
    np.testing.assert_allclose(whole, expected, atol=5e-6)


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('max_values', [1, 200, 500, 10**6])
def test_blocks_of_rows_give_what_the_whole_gives(values, align_corners, max_values):
    size = (13, 11)
    seen = []

    def labels(rows):
        seen.append(rows.shape)
        return jnp.argmax(rows, axis=-1).astype(jnp.uint8)

    found = map_resized(labels, values, size, align_corners=align_corners, max_values=max_values)
    assert found.shape == (2, *size)
    expected = by_hand(values, size, align_corners)
    best = np.sort(expected, axis=-1)
    sure = best[..., -1] - best[..., -2] > 1e-5
    assert sure.mean() > 0.99
    np.testing.assert_array_equal(found[sure], expected.argmax(axis=-1)[sure])
    assert len({*seen}) == 1
    assert np.prod(seen[0]) <= max(max_values, 2 * 11 * 3)


def test_memory_does_not_grow_with_the_result():
    """Of an image of 4000 x 4000 pixels the resized logits of 150 classes would be 9.6 GB."""

    def label(logits):
        return map_resized(
            lambda rows: jnp.argmax(rows, axis=-1).astype(jnp.uint8),
            logits,
            (4000, 4000),
            max_values=2**24,
        )

    logits = jax.ShapeDtypeStruct((1, 64, 64, 150), jnp.float32)
    memory = jax.jit(label).lower(logits).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 400e6


@pytest.mark.parametrize('align_corners', [False, True])
def test_a_ramp_stays_a_ramp(align_corners):
    ramp = jnp.arange(5.0)[None, None, :, None]
    found = np.asarray(resize_bilinear(ramp, (1, 9), align_corners=align_corners))[0, 0, :, 0]
    if align_corners:
        np.testing.assert_allclose(found, np.linspace(0, 4, 9), atol=1e-6)
    else:
        inner = (np.arange(9) + 0.5) * 5 / 9 - 0.5
        np.testing.assert_allclose(found, inner.clip(0, 4), atol=1e-6)


@pytest.mark.parametrize('align_corners', [False, True])
def test_weights_add_up_to_one_and_are_at_two_neighbours(align_corners):
    for old in range(1, 20):
        for new in (1, 2, 3, 7, 8, 19, 40):
            weights = resize_weights(old, new, align_corners)
            assert weights.dtype == np.float32
            np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
            assert weights.min() >= 0
            assert (np.count_nonzero(weights, axis=1) <= 2).all()


def test_the_type_stays_and_the_gradient_is_the_transpose():
    values = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 5, 2)), jnp.bfloat16)
    assert resize_bilinear(values, (8, 9)).dtype == jnp.bfloat16
    values = values.astype(jnp.float32)
    # Every output has weights that add up to one.
    gradient = jax.grad(lambda x: resize_bilinear(x, (8, 9)).sum())(values)
    np.testing.assert_allclose(gradient.sum(), 8 * 9 * 2, rtol=1e-6)
    shares = [resize_weights(4, 8, False).sum(0), resize_weights(5, 9, False).sum(0)]
    np.testing.assert_allclose(gradient[0, :, :, 1], np.outer(*shares), rtol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize(
    ('old', 'new'),
    [*SIZES, ((97, 97), (769, 769)), ((65, 129), (512, 1024)), ((1024, 71), (777, 40))],
)
def test_as_pytorch(old, new, align_corners):
    import torch

    values = np.random.default_rng(0).normal(size=(1, *old, 2)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(values.transpose(0, 3, 1, 2)), new, mode='bilinear',
        align_corners=align_corners,
    )  # fmt: skip
    expected = theirs.numpy().transpose(0, 2, 3, 1)
    found = np.asarray(resize_bilinear(jnp.asarray(values), new, align_corners=align_corners))
    assert np.abs(found - expected).max() < 1e-6 * np.abs(values).max()
