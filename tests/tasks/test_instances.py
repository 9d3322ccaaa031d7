"""Instances: their masks, run lengths, selection and how they are printed."""

import json

import numpy as np
import pytest
from pycocotools import mask as coco_masks

from gcnet_jax.tasks.instances import Instances

LABELS = ('person', 'dog', 'person', 'class 7')


@pytest.fixture
def instances():
    rng = np.random.default_rng(0)
    return Instances(
        boxes=np.float32([[2, 3, 20.5, 31], [0, 0, 12, 9.25], [30, 5, 47, 40], [10, 10, 10, 20]]),
        scores=np.float32([0.98, 0.91, 0.5, 0.25]),
        labels=LABELS,
        classes=np.array([0, 16, 0, 7]),
        size=(40, 48),
        mask_probabilities=rng.uniform(size=(4, 28, 28)).astype(np.float32),
    )


def test_masks_are_bool_images_inside_their_boxes(instances):
    masks = instances.masks
    assert masks.dtype == bool
    assert masks.shape == (4, 40, 48)
    assert masks[:3].any(axis=(1, 2)).all()
    assert not masks[3].any()
    for mask, (left, top, right, bottom) in zip(masks[:3], instances.boxes[:3], strict=True):
        rows, columns = np.nonzero(mask)
        assert rows.min() + 0.5 >= top
        assert rows.max() + 0.5 <= bottom
        assert columns.min() + 0.5 >= left
        assert columns.max() + 0.5 <= right


def test_run_lengths_are_those_of_pycocotools(instances):
    expected = coco_masks.encode(np.asfortranarray(instances.masks.transpose(1, 2, 0), np.uint8))
    actual = instances.rle()
    assert [item['counts'] for item in actual] == [item['counts'].decode() for item in expected]
    assert all(item['size'] == [40, 48] for item in actual)


def test_json_holds_everything(instances):
    objects = json.loads(json.dumps(instances.to_json()))
    assert [item['label'] for item in objects] == list(LABELS)
    assert [item['class'] for item in objects] == [0, 16, 0, 7]
    assert objects[1]['box'] == [0, 0, 12, 9.25]
    assert objects[0]['score'] == float(np.float32(0.98))
    assert [item['mask'] for item in objects] == instances.rle()


def test_selection_by_score_and_by_label(instances):
    assert instances.select(0.5).labels == ('person', 'dog', 'person')
    people = instances.select(0.4, ['person', 'unicorn'])
    assert people.labels == ('person', 'person')
    assert people.classes.tolist() == [0, 0]
    np.testing.assert_array_equal(people.boxes, instances.boxes[[0, 2]])
    np.testing.assert_array_equal(people.masks, instances.masks[[0, 2]])
    assert len(instances.select(0.99)) == 0
    assert len(instances.select()) == 4


def test_they_print_in_one_line(instances):
    assert str(instances) == '4 objects: person 0.98, dog 0.91, person 0.50, class 7 0.25'
    assert str(instances.select(0.95)) == '1 object: person 0.98'
    escaped = r'a\nb 1.00'
    many = np.concatenate([np.zeros(9, int), np.arange(4)])
    crowd = Instances(
        boxes=instances.boxes[many],
        scores=np.ones(13, np.float32),
        labels=('a\nb',) * 13,
        classes=many,
        size=(40, 48),
    )
    assert str(crowd) == f'13 objects: {", ".join([escaped] * 10)} and 3 more'


def test_an_image_without_objects(instances):
    nothing = instances.select(2.0)
    assert str(nothing) == 'no objects'
    assert nothing.masks.shape == (0, 40, 48)
    assert nothing.rle() == nothing.to_json() == []


def test_a_detector_without_masks(instances):
    boxes = Instances(
        instances.boxes, instances.scores, instances.labels, instances.classes, (40, 48)
    )
    assert not boxes.has_masks
    assert 'mask' not in boxes.to_json()[0]
    assert len(boxes.select(0.5)) == 3
    with pytest.raises(ValueError, match='gives no masks'):
        boxes.rle()


def test_parts_of_different_lengths_are_refused(instances):
    with pytest.raises(ValueError, match=r'\[4, 4, 3, 4\] in number'):
        Instances(instances.boxes, instances.scores, LABELS[:3], instances.classes, (40, 48))
