"""Boxes against formulas in numpy, number by number."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcnet_jax.ops.boxes import (
    box_area,
    clip_boxes,
    decode_deltas,
    encode_deltas,
    intersection_over_union,
)

STDS = (0.1, 0.1, 0.2, 0.2)


def random_boxes(count, seed=0, side=50):
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 100, (count, 2))
    return np.concatenate([corner, corner + rng.uniform(1, side, (count, 2))], 1).astype(np.float32)


def test_the_area_has_no_extra_pixel():
    assert box_area(jnp.array([[2.0, 3.0, 5.0, 10.0]])).tolist() == [21.0]


def test_overlap_is_intersection_over_union():
    first, second = random_boxes(6), random_boxes(5, seed=1)
    actual = np.asarray(intersection_over_union(jnp.asarray(first), jnp.asarray(second)))
    for i, a in enumerate(first.tolist()):
        for j, b in enumerate(second.tolist()):
            width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
            height = max(0, min(a[3], b[3]) - max(a[1], b[1]))
            union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
            assert actual[i, j] == pytest.approx(width * height / union, abs=1e-6)
    assert (actual > 0).any()
    assert (actual == 0).any()


def test_overlaps_are_rounded_step_by_step():
    # A product and a sum that the compiler makes one operation of round once, not twice; boxes that
    # overlap an object equally in mmdetection then do not here.
    first, second = random_boxes(50), random_boxes(400, seed=1, side=90)
    one, other = first[:, None], second[None]
    size = np.minimum(one[..., 2:], other[..., 2:]) - np.maximum(one[..., :2], other[..., :2])
    common = np.maximum(size, 0).prod(axis=-1)
    areas = [(box[..., 2:] - box[..., :2]).prod(axis=-1) for box in (one, other)]
    options = {'xla_backend_optimization_level': 3}  # The tests are compiled without optimisation.
    actual = jax.jit(intersection_over_union, compiler_options=options)(first, second)
    np.testing.assert_array_equal(actual, common / (areas[0] + areas[1] - common))


def test_boxes_without_area_overlap_nothing():
    empty = jnp.array([[3.0, 3.0, 3.0, 3.0]])
    assert intersection_over_union(empty, empty).tolist() == [[0.0]]


def test_deltas_are_shifts_in_sizes_and_logarithms_of_ratios():
    box = np.array([[10, 20, 30, 60]], np.float32)  # 20 x 40 around (20, 40)
    deltas = np.array([[1.0, -0.5, math.log(2) / 0.2, 0]], np.float32)
    decoded = decode_deltas(box, deltas, STDS, (200, 300))
    centre_x, centre_y = 20 + 0.1 * 20, 40 - 0.05 * 40
    expected = [[centre_x - 20, centre_y - 20, centre_x + 20, centre_y + 20]]
    np.testing.assert_allclose(decoded, expected, rtol=1e-6)


def test_growth_is_limited_and_the_result_clipped():
    box = np.array([[100, 100, 101, 101]], np.float32)
    decoded = decode_deltas(box, np.array([[0, 0, 99, 99]], np.float32), STDS, (120, 1000))
    half = 1000 / 16 / 2
    np.testing.assert_allclose(
        decoded, [[100.5 - half, 100.5 - half, 100.5 + half, 120]], rtol=1e-5
    )


def test_encoding_is_the_inverse():
    boxes, targets = random_boxes(20), random_boxes(20, seed=1)
    deltas = encode_deltas(jnp.asarray(boxes), jnp.asarray(targets), STDS)
    decoded = decode_deltas(jnp.asarray(boxes), deltas, STDS, (1000, 1000))
    np.testing.assert_allclose(decoded, targets, rtol=1e-4, atol=1e-3)


def test_boxes_are_clipped_to_the_size_not_to_the_last_pixel():
    clipped = clip_boxes(jnp.array([[-5.0, 3.0, 700.0, 480.5]]), (480, 640))
    assert clipped.tolist() == [[0.0, 3.0, 640.0, 480.0]]
