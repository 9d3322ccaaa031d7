"""Evaluation of a detector on a COCO set: pairing by names, what is left out, text and files."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from gcnet_jax.data.coco import load_coco
from gcnet_jax.errors import ConfigError, DataError
from gcnet_jax.inference.coco_evaluation import (
    draw_precision,
    format_coco_evaluation,
    write_coco_evaluation,
)
from gcnet_jax.tasks.coco_evaluator import CocoEvaluator, evaluate_instances
from gcnet_jax.tasks.instances import Instances

LABELS = ('person', 'bicycle', 'dog')
SIZES = {4: (90, 120), 2: (120, 90), 9: (64, 64), 30: (50, 80)}
# Image, category, box as left, top, width, height.
OBJECTS = (
    (4, 1, (10, 10, 40, 60)),
    (4, 18, (60, 20, 50, 30)),
    (4, 18, (5, 75, 10, 10)),
    (2, 1, (0, 0, 90, 120)),
    (9, 18, (20, 20, 30, 40)),
)


def corners(box):
    left, top, width, height = box
    return [left, top, left + width, top, left + width, top + height, left, top + height]


@pytest.fixture
def annotations():
    return {
        'images': [
            {'id': number, 'file_name': f'{number}.png', 'height': size[0], 'width': size[1]}
            for number, size in SIZES.items()
        ],
        'annotations': [
            {
                'id': number,  # From 0: pycocotools by itself takes 0 for no object.
                'image_id': image,
                'category_id': category,
                'bbox': list(box),
                'area': box[2] * box[3],
                'iscrowd': 0,
                'segmentation': [corners(box)],
            }
            for number, (image, category, box) in enumerate(OBJECTS)
        ],
        'categories': [{'id': 18, 'name': 'dog'}, {'id': 1, 'name': 'person'}],
    }


@pytest.fixture
def load(tmp_path, annotations):
    """Writes the annotations as they are now, and opens the set."""

    def write_and_load():
        (tmp_path / 'images').mkdir(exist_ok=True)
        (tmp_path / 'instances_test.json').write_text(json.dumps(annotations))
        for number in SIZES:
            (tmp_path / f'images/{number}.png').write_bytes(b'is not opened')
        return load_coco(tmp_path)

    return write_and_load


def perfect(data, labels=LABELS):
    """What is annotated, as instances."""
    for image in data.images:
        objects = [item for item in data.objects if item['image_id'] == image.id]
        names = [data.categories[item['category_id']] for item in objects]
        boxes = np.array([item['bbox'] for item in objects], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        yield (
            image.id,
            Instances(
                boxes=boxes,
                scores=np.linspace(0.9, 0.5, len(objects), dtype=np.float32),
                labels=tuple(names),
                classes=np.array([labels.index(name) for name in names], int),
                size=image.size,
                mask_probabilities=np.ones((len(objects), 28, 28), np.float32),
            ),
        )


def test_the_annotations_themselves_are_perfect(load):
    data = load()
    evaluation = evaluate_instances(data, LABELS, perfect(data))
    for kind in ('box', 'mask'):
        metrics = evaluation.metrics[kind]
        for name in ('AP', 'AP50', 'AP75', 'AP_small', 'AP_medium', 'AP_large', 'AR100'):
            assert metrics[name] == pytest.approx(1), (kind, name)
        assert metrics['AR1'] == pytest.approx((1 + 2 / 3) / 2)
        np.testing.assert_allclose(evaluation.precision[kind], 1)
    assert (evaluation.examples, evaluation.skipped) == (4, 0)
    assert (evaluation.objects, evaluation.detections) == (5, 5)
    assert [(result.label, result.objects) for result in evaluation.classes] == [
        ('dog', 3),
        ('person', 2),
    ]
    assert evaluation.notes == (
        "left out: 1 label of the detector that the set has no category for: 'bicycle'",
    )


def test_labels_are_paired_by_their_names(load):
    data = load()
    labels = ('dog', 'cat', 'person')
    right = evaluate_instances(data, labels, perfect(data, labels))
    assert right.metrics['box']['AP'] == pytest.approx(1)
    swapped = evaluate_instances(data, ('person', 'cat', 'dog'), perfect(data, labels))
    assert swapped.metrics['box']['AP'] == 0


def test_only_categories_of_both_sides_count(load, annotations):
    annotations['categories'].append({'id': 3, 'name': 'unicorn'})
    annotations['annotations'].append(
        annotations['annotations'][0] | {'id': 77, 'category_id': 3, 'bbox': [0, 0, 5, 5]}
    )
    data = load()
    labels = (*LABELS, 'unicorn')
    predictions = list(perfect(data, labels))
    evaluation = evaluate_instances(data, LABELS, predictions)
    assert evaluation.metrics['mask']['AP'] == pytest.approx(1)
    assert evaluation.detections == evaluation.objects == 5
    assert [result.label for result in evaluation.classes] == ['dog', 'person']
    assert evaluation.notes[0] == (
        "left out: 1 category that the detector does not know: 'unicorn'; annotations of these: 1"
    )
    assert evaluate_instances(data, labels, predictions).objects == 6


def test_no_common_category_and_no_names(load):
    data = load()
    with pytest.raises(
        DataError, match=r"no category of .* are 'dog', 'person', and the labels 'ant', 'bee'$"
    ):
        CocoEvaluator(data, ('ant', 'bee'))
    with pytest.raises(ConfigError, match='the detector has no label names'):
        CocoEvaluator(data, ())


def test_only_images_that_were_added_count(load):
    data = load()
    predictions = [(number, found) for number, found in perfect(data) if number in (9, 30)]
    evaluation = evaluate_instances(data, LABELS, iter(predictions))
    assert (evaluation.examples, evaluation.skipped, evaluation.objects) == (2, 2, 1)
    assert evaluation.metrics['box']['AP'] == pytest.approx(1)
    assert np.isnan(evaluation.classes[1].metrics['box']['AP'])
    with pytest.raises(DataError, match=r'no image of .* was evaluated'):
        evaluate_instances(data, LABELS, [])


def test_missing_images_are_left_out(load, tmp_path):
    load()
    (tmp_path / 'images/2.png').unlink()
    data = load_coco(tmp_path)
    evaluation = evaluate_instances(data, LABELS, perfect(data))
    assert (evaluation.examples, evaluation.skipped) == (3, 1)
    assert 'missing and left out' in evaluation.notes[-1]


def test_results_that_do_not_fit_are_refused(load):
    data = load()
    evaluator = CocoEvaluator(data, LABELS)
    found = dict(perfect(data))
    with pytest.raises(DataError, match=r'instances_test\.json has no image 5'):
        evaluator.add(5, found[4])
    with pytest.raises(DataError, match=r'image 2 is 90 x 120 pixels .* and 120 x 90 by'):
        evaluator.add(2, found[4])
    evaluator.add(4, found[4])
    with pytest.raises(DataError, match='image 4 was evaluated before'):
        evaluator.add(4, found[4])


def test_without_segmentations_only_boxes_count(load, annotations):
    del annotations['annotations'][2]['segmentation']
    data = load()
    evaluation = evaluate_instances(data, LABELS, perfect(data))
    assert list(evaluation.metrics) == ['box']
    assert 'masks are not evaluated: 1 of 5 annotations have no segmentation' in evaluation.notes
    assert 'mask' not in format_coco_evaluation(evaluation).splitlines()[1]


def test_a_detector_without_masks(load):
    data = load()
    predictions = [
        (number, dataclasses.replace(found, mask_probabilities=None))
        for number, found in perfect(data)
    ]
    evaluation = evaluate_instances(data, LABELS, predictions)
    assert list(evaluation.metrics) == list(evaluation.precision) == ['box']
    assert evaluation.notes[-1] == 'masks are not evaluated: the detector gives none'


def test_an_image_without_instances_needs_no_masks(load):
    data = load()
    predictions = dict(perfect(data))
    predictions[30] = dataclasses.replace(predictions[30], mask_probabilities=None)
    assert 'mask' in evaluate_instances(data, LABELS, predictions.items()).metrics


def test_results_are_those_of_cocos_server(load):
    data = load()
    evaluator = CocoEvaluator(data, LABELS)
    for number, found in perfect(data):
        evaluator.add(number, found)
    results = json.loads(json.dumps(evaluator.results()))
    assert len(results) == 5
    assert results[1] == {
        'image_id': 4,
        'category_id': 18,
        'score': pytest.approx(0.7),
        'bbox': [60, 20, 50, 30],
        'segmentation': dict(perfect(data))[4].rle()[1],
    }


JUNK = (
    *(None, True, -1, 0, 2, 0.5, 1e300, float('nan'), float('inf'), -(10**30)),
    *('', 'x', '1' * 50, [], {}, [[]], [1, 2, 3, 4], {'size': [90, 120], 'counts': 'o'}),
)


def leaves(value, path=()):
    """Yields the path of every value inside a value out of JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, (dict, list)) and key not in (1, 2, 3):  # The others are alike.
            yield from leaves(inner, (*path, key))


@pytest.mark.slow
def test_any_value_is_refused_in_one_line_or_can_be_evaluated(load, annotations):
    annotations['annotations'][0]['segmentation'] = {'size': [90, 120], 'counts': [10_000, 800]}
    original = json.dumps(annotations)
    found = [
        (number, Instances(np.float32([[5, 5, 40, 40]]), np.float32([0.5]), ('dog',),
                           np.array([2]), size, np.ones((1, 28, 28), np.float32)))
        for number, size in SIZES.items()
    ]  # fmt: skip
    refused, evaluated = [], 0
    for path in leaves(json.loads(original)):
        for junk in JUNK:
            annotations.clear()
            annotations.update(json.loads(original))
            place = annotations
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = junk
            try:
                data = load()
                counted = {image.id: image.size for image in data.images}
                predictions = [item for item in found if counted.get(item[0]) == item[1].size]
                evaluate_instances(data, LABELS, predictions)
                evaluated += 1
            except DataError as error:
                refused.append(str(error))
    assert len(refused) > 300
    assert not any('\n' in message for message in refused)
    assert evaluated > 30


def test_text_shows_the_worst_classes_first(load):
    data = load()
    predictions = dict(perfect(data))
    predictions[9] = predictions[9].select(2)
    text = format_coco_evaluation(evaluate_instances(data, LABELS, predictions.items()))
    lines = text.splitlines()
    assert lines[0] == f'{data.name} test: 4 images, 5 objects, 4 detections'
    assert lines[1].split() == ['box', 'mask']
    assert lines[2].split() == ['AP', '83.17%', '83.17%']  # 67 of 101 recalls for dogs.
    table = lines.index('') + 1
    assert [line.split() for line in lines[table : table + 3]] == [
        ['AP', 'box', 'mask', 'of', 'objects'],
        ['dog', '66.34%', '66.34%', 'of', '3'],
        ['person', '100.00%', '100.00%', 'of', '2'],
    ]
    assert lines[-1].startswith('note: left out: 1 label')


def test_text_of_many_classes_and_of_nothing_to_find(load, annotations):
    annotations['categories'] = [{'id': number, 'name': f'{number:02}'} for number in range(1, 31)]
    for number, entry in enumerate(annotations['annotations']):
        entry['category_id'] = number + 1
    annotations['annotations'] += [
        annotations['annotations'][0] | {'id': 100 + number, 'category_id': number}
        for number in range(6, 31)
    ]
    labels = tuple(f'{number:02}' for number in range(1, 31))
    data = load()
    evaluation = evaluate_instances(data, labels, perfect(data, labels))
    assert '  ... and 10 classes better than these' in format_coco_evaluation(evaluation)
    annotations['annotations'] = []
    data = load()
    evaluation = evaluate_instances(data, labels, perfect(data, labels))
    assert format_coco_evaluation(evaluation).splitlines()[2].split() == ['AP', '-', '-']
    assert evaluation.to_json()['box']['AP'] is None
    assert evaluation.to_json()['precision'] == {}


def test_files_are_complete(load, tmp_path):
    data = load()
    evaluation = evaluate_instances(data, LABELS, perfect(data))
    report, picture = write_coco_evaluation(evaluation, tmp_path / 'new/out')
    written = json.loads(report.read_text())
    assert written == evaluation.to_json()
    assert written['mask']['AP'] == pytest.approx(1)
    assert written['classes'][0]['label'] == 'dog'
    assert len(written['precision']['box']['IoU 0.50']) == 101
    with Image.open(picture) as opened:
        assert opened.format == 'PNG'
        assert opened.width > 1000
    assert sorted(path.name for path in report.parent.iterdir()) == [
        'evaluation.json',
        'precision_recall.png',
    ]


def test_nothing_to_find_gives_no_picture(load, annotations, tmp_path):
    annotations['annotations'] = []
    data = load()
    evaluation = evaluate_instances(data, LABELS, perfect(data))
    (report,) = write_coco_evaluation(evaluation, tmp_path / 'out')
    assert 'NaN' not in report.read_text()


def test_labels_of_one_name_are_one_class(load):
    """As ImageNet has two classes called 'crane': objects of both count."""
    data = load()
    twice = ('person', 'bicycle', 'dog', 'dog')
    predictions = [
        (number, dataclasses.replace(found, classes=np.where(found.classes == 2, 3, found.classes)))
        for number, found in perfect(data)
    ]
    evaluation = evaluate_instances(data, twice, predictions)
    assert evaluation.metrics['box']['AP'] == pytest.approx(1)
    assert [result.label for result in evaluation.classes] == ['dog', 'person']


def test_a_file_that_cannot_be_written(load, tmp_path, read_only):
    data = load()
    evaluation = evaluate_instances(data, LABELS, perfect(data))
    with pytest.raises(DataError, match=read_only):
        write_coco_evaluation(evaluation, tmp_path)
    with pytest.raises(DataError, match='cannot make the directory'):
        write_coco_evaluation(evaluation, tmp_path / 'images/2.png')


def test_the_picture_has_a_panel_for_each_kind(load):
    data = load()
    figure = draw_precision(evaluate_instances(data, LABELS, perfect(data)))
    assert [panel.get_title() for panel in figure.axes] == ['box', 'mask']
    assert all(len(panel.lines) == 3 for panel in figure.axes)
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), 1)
