"""Bilinear resizing against a loop over pixels, and against PyTorch's `interpolate`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcnet_jax.ops.resize import resize_bilinear, resize_weights

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


def by_pixel(values, size, align_corners):
    """One pixel after the other, in float64."""
    batch, height, width, channels = values.shape
    result = np.zeros((batch, *size, channels))
    for row in range(size[0]):
        for column in range(size[1]):
            places = []
            for place, old, new in ((row, height, size[0]), (column, width, size[1])):
                if align_corners:
                    places.append(place * (old - 1) / (new - 1) if new > 1 else 0.0)
                else:
                    places.append(max((place + 0.5) * old / new - 0.5, 0.0))
            y, x = places
            for tap_y in {int(y), min(int(y) + 1, height - 1)}:
                for tap_x in {int(x), min(int(x) + 1, width - 1)}:
                    # What lies at the border counts in full, however far beyond it the place is.
                    down = 1.0 if tap_y == y or height - 1 <= y else 1 - abs(y - tap_y)
                    across = 1.0 if tap_x == x or width - 1 <= x else 1 - abs(x - tap_x)
                    result[:, row, column] += down * across * values[:, tap_y, tap_x]
    return result


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize(('old', 'new'), SIZES)
def test_as_a_loop_over_pixels(old, new, align_corners):
    values = np.random.default_rng(0).normal(size=(2, *old, 3)).astype(np.float32)
    found = resize_bilinear(jnp.asarray(values), new, align_corners=align_corners)
    assert (found.shape, found.dtype) == ((2, *new, 3), jnp.float32)
    # Places are rounded to float32, as in PyTorch.
    np.testing.assert_allclose(found, by_pixel(values, new, align_corners), atol=5e-6)


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
    ('old', 'new'), [*SIZES, ((97, 97), (769, 769)), ((65, 129), (512, 1024)), ((1024, 71), (777, 40))]
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
