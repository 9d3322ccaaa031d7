"""Assignment against a loop over boxes and objects in numpy."""

import jax
import numpy as np
import pytest

from gcnet_jax.ops.assignment import BACKGROUND, IGNORED, Thresholds, assign

RPN = Thresholds(0.7, 0.3, 0.3)
BOX = Thresholds(0.5, 0.5, 0.5)
CASCADE = Thresholds(0.6, 0.6, None)

compute = jax.jit(assign, static_argnames='thresholds')


def overlaps_of(boxes, objects):
    """In float32, in the order in which mmdetection computes them."""
    found = np.zeros((len(objects), len(boxes)), np.float32)
    for row, one in enumerate(objects):
        for column, other in enumerate(boxes):
            sides = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
            common = np.prod(np.maximum(sides, 0))
            areas = [np.prod(box[2:] - box[:2]) for box in (one, other)]
            found[row, column] = common / np.maximum(sum(areas) - common, np.float32(1e-6))
    return found


def reference(boxes, valid, objects, thresholds):
    """mmdetection's steps, one after the other, on the boxes and objects that are there."""
    index = np.full(len(boxes), IGNORED)
    places = np.flatnonzero(valid)
    if not len(objects):
        index[places] = BACKGROUND
        return index
    overlaps = overlaps_of(boxes[places], objects)
    for column, place in enumerate(places):
        if overlaps[:, column].max() < np.float32(thresholds.negative):
            index[place] = BACKGROUND
        if overlaps[:, column].max() >= np.float32(thresholds.positive):
            index[place] = overlaps[:, column].argmax()
    if thresholds.best is not None:
        for row in range(len(objects)):
            if overlaps[row].max() >= np.float32(thresholds.best):
                index[places[overlaps[row] == overlaps[row].max()]] = row
    return index


def grid(stride, side):
    """Square boxes around every position of a grid, of an odd size, as anchors are."""
    y, x = (np.float32(values) * stride for values in np.mgrid[:12, :12])
    half = np.float32(side) / 2
    return np.stack([x - half, y - half, x + half, y + half], axis=-1).reshape(-1, 4)


def draw(seed, present=5, places=8):
    rng = np.random.default_rng(seed)
    boxes = np.concatenate([grid(8, 45.254834), grid(8, 22.627417), grid(16, 90.50967)])
    low = rng.uniform(0, 60, (places, 2))
    objects = np.concatenate([low, low + rng.uniform(8, 70, (places, 2))], axis=1)
    valid = rng.random(len(boxes)) < 0.9
    return boxes, valid, objects.astype(np.float32), np.arange(places) < present


@pytest.mark.parametrize('thresholds', [RPN, BOX, CASCADE])
@pytest.mark.parametrize('seed', range(3))
def test_every_box_is_assigned_as_by_the_loop(thresholds, seed):
    boxes, valid, objects, present = draw(seed)
    found = compute(boxes, valid, objects, present, thresholds=thresholds)
    expected = reference(boxes, valid, objects[present], thresholds)
    np.testing.assert_array_equal(found, expected)
    assert (expected >= 0).any()
    assert (expected == BACKGROUND).any()


def test_equally_good_boxes_all_belong_to_the_object():
    boxes, objects = grid(8, 45.254834), np.array([[20, 20, 46, 46]], np.float32)
    valid = np.ones(len(boxes), bool)
    found = np.asarray(compute(boxes, valid, objects, np.array([True]), thresholds=RPN))
    np.testing.assert_array_equal(found, reference(boxes, valid, objects, RPN))
    assert (found == 0).sum() == 9


def test_the_last_of_two_objects_gets_the_box_that_is_best_for_both():
    boxes = np.array([[0, 0, 10, 10], [50, 50, 60, 60]], np.float32)
    objects = np.array([[0, 0, 10, 9], [0, 0, 10, 8]], np.float32)
    arguments = (boxes, np.ones(2, bool), objects, np.ones(2, bool))
    assert compute(*arguments, thresholds=RPN).tolist() == [1, BACKGROUND]
    assert compute(*arguments, thresholds=CASCADE).tolist() == [0, BACKGROUND]


def test_a_threshold_itself_is_enough_for_an_object_and_not_background():
    # Overlaps of 1/2, 1/4 and 0, of which each is exact.
    boxes = np.array([[0, 0, 8, 8], [0, 0, 8, 16], [20, 0, 28, 8]], np.float32)
    objects = np.array([[0, 0, 8, 4]], np.float32)

    def found(*thresholds):
        valid, present = np.ones(3, bool), np.ones(1, bool)
        return compute(boxes, valid, objects, present, thresholds=Thresholds(*thresholds)).tolist()

    assert found(0.5, 0.5, None) == [0, BACKGROUND, BACKGROUND]
    assert found(0.5, 0.25, None) == [0, IGNORED, BACKGROUND]
    assert found(0.75, 0.25, 0.5) == [0, IGNORED, BACKGROUND]


def test_without_objects_all_is_background():
    boxes, valid, objects, present = draw(0, present=0)
    found = compute(boxes, valid, objects, present, thresholds=RPN)
    np.testing.assert_array_equal(found, np.where(valid, BACKGROUND, IGNORED))


def test_absent_objects_and_invalid_boxes_change_nothing():
    boxes, valid, objects, present = draw(1)
    found = compute(boxes, valid, objects, present, thresholds=RPN)
    boxes = np.where(valid[:, None], boxes, objects[0])  # The best box there could be.
    objects = np.where(present[:, None], objects, boxes[np.flatnonzero(valid)[0]])
    np.testing.assert_array_equal(compute(boxes, valid, objects, present, thresholds=RPN), found)
