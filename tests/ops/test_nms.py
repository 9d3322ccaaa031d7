"""Suppression against the sequential loop, on random and on adversarial boxes."""

import jax
import numpy as np
import pytest

from gcnet_jax.ops import nms

keep_sorted, suppress = jax.jit(nms.keep_sorted), jax.jit(nms.suppress)
pick_best = jax.jit(nms.pick_best, static_argnames='count')


def crowd(count, seed, groups=1):
    """Boxes that overlap a lot, with scores of which some are equal."""
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 60, (count, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 40, (count, 2))], 1)
    scores = rng.integers(1, 50, count) / 50
    return (
        boxes.astype(np.float32),
        scores.astype(np.float32),
        rng.integers(0, groups, count).astype(np.int32),
        rng.random(count) < 0.9,
    )


def overlap(a, b):
    width = max(np.float32(0), min(a[2], b[2]) - max(a[0], b[0]))
    height = max(np.float32(0), min(a[3], b[3]) - max(a[1], b[1]))
    both = width * height
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def sequential(boxes, scores, groups, valid, threshold):
    """Indices of the kept boxes, best first."""
    kept = []
    for index in np.argsort(-scores, kind='stable'):
        rivals = [k for k in kept if groups[k] == groups[index]]
        if valid[index] and all(overlap(boxes[k], boxes[index]) <= threshold for k in rivals):
            kept.append(int(index))
    return kept


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('threshold', [0.3, 0.5, 0.7])
def test_both_forms_equal_the_loop(seed, threshold):
    boxes, scores, groups, valid = crowd(150, seed)
    expected = sequential(boxes, scores, groups, valid, threshold)
    order, kept = suppress(boxes, scores, groups, valid, threshold)
    assert np.asarray(order)[np.asarray(kept)].tolist() == expected
    best, found = pick_best(boxes, scores, valid, threshold, 150)
    assert np.asarray(best)[np.asarray(found)].tolist() == expected
    first, all_there = pick_best(boxes, scores, valid, threshold, 5)
    assert all_there.all()
    assert first.tolist() == expected[:5]


def test_groups_do_not_suppress_each_other():
    boxes, scores, groups, valid = crowd(200, 9, groups=5)
    expected = sequential(boxes, scores, groups, valid, 0.5)
    order, kept = suppress(boxes, scores, groups, valid, 0.5)
    assert np.asarray(order)[np.asarray(kept)].tolist() == expected
    moved = nms.separate(boxes, groups, valid)
    best, found = pick_best(moved, scores, valid, 0.5, 200)
    assert np.asarray(best)[np.asarray(found)].tolist() == expected


def test_groups_are_moved_by_the_largest_valid_coordinate_and_one():
    """mmcv's offset to the bit: its rounding decides overlaps near the threshold."""
    boxes, _, groups, valid = crowd(50, 3, groups=4)
    boxes[~valid] += 1000
    offset = groups.astype(np.float32) * (boxes[valid].max() + np.float32(1))
    np.testing.assert_array_equal(nms.separate(boxes, groups, valid), boxes + offset[:, None])


def test_a_chain_that_needs_a_round_for_every_box():
    """Each box overlaps the next: every other one stays."""
    left = 6 * np.arange(40, dtype=np.float32)
    boxes = np.stack([left, 0 * left, left + 10, 0 * left + 10], 1)
    kept = keep_sorted(boxes, np.ones(40, bool), 0.2)
    assert np.asarray(kept).tolist() == [index % 2 == 0 for index in range(40)]


def test_an_overlap_of_exactly_the_threshold_is_kept():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 5]], np.float32)
    assert keep_sorted(boxes, np.ones(2, bool), 0.5).tolist() == [True, True]
    assert keep_sorted(boxes, np.ones(2, bool), 0.49).tolist() == [True, False]


def test_nothing_valid_gives_nothing():
    boxes, scores, _, _ = crowd(10, 0)
    nothing = np.zeros(10, bool)
    assert not keep_sorted(boxes, nothing, 0.5).any()
    assert not pick_best(boxes, scores, nothing, 0.5, 3)[1].any()
