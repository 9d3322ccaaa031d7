"""Bilinear resizing against sums written out by hand, and functions of blocks of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcnet_jax.ops.resize import map_resized, resize_bilinear


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
@pytest.mark.parametrize('size', [(5, 7), (11, 20), (3, 2), (1, 9), (8, 7)])
def test_values_are_bilinear(values, size, align_corners):
    expected = by_hand(values, size, align_corners)
    found = resize_bilinear(values, size, align_corners=align_corners)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    whole = map_resized(
        lambda given: given, values, size, align_corners=align_corners, max_values=10**6
    )
    np.testing.assert_allclose(whole, expected, atol=1e-6)


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
