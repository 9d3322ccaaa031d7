"""Evaluation of segmenters: figures by another way, paired labels, and what is damaged."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from gcnet_jax.data.segmentation_sources import load_segmentation
from gcnet_jax.errors import DataError
from gcnet_jax.inference.segmentation_evaluation import (
    LabelMapEvaluation,
    count_pixels,
    evaluate_segmenter,
    format_segmentation,
    match_labels,
    write_segmentation,
)
from gcnet_jax.inference.segmenter import Segmenter

pytestmark = pytest.mark.usefixtures('quick_compilation')
LABELS = ('ant', 'bee', 'cat')


@pytest.fixture(scope='module')
def segmenter(stored_segmenter, quick_compilation):
    one = stored_segmenter
    return Segmenter(one.description, one.variables, devices=one.one_device)


@pytest.fixture
def folder(make, tmp_path):
    """Four images of two sizes, whose labels hold all classes and pixels that do not count."""
    random = np.random.default_rng(0)
    for kind in ('images', 'labels'):
        (tmp_path / kind / 'val').mkdir(parents=True)
        (tmp_path / kind / 'train').mkdir()
    for index, size in enumerate([(30, 40), (40, 30), (30, 40), (30, 40)]):
        image = make.picture(index, *size)
        labels = random.choice([0, 1, 2, 255], size).astype(np.uint8)
        for split in ('val', 'train'):
            Image.fromarray(image).save(tmp_path / 'images' / split / f'{index}.png')
            Image.fromarray(labels).save(tmp_path / 'labels' / split / f'{index}.png')
    (tmp_path / 'classes.txt').write_text('\n'.join(LABELS))
    return tmp_path


def by_histograms(segmenter, folder, order=(0, 1, 2)):
    """mmsegmentation's `IoUMetric`, written anew: intersections and unions of histograms."""
    intersection, found_area, label_area = np.zeros((3, 3))
    for path in sorted((folder / 'images' / 'val').iterdir()):
        labels = np.asarray(Image.open(folder / 'labels' / 'val' / path.name))
        found = segmenter(path).labels[labels != 255]
        labels = np.array(order)[labels[labels != 255]]
        intersection += np.histogram(found[found == labels], np.arange(4))[0]
        found_area += np.histogram(found, np.arange(4))[0]
        label_area += np.histogram(labels, np.arange(4))[0]
    iou = intersection / (found_area + label_area - intersection)
    accuracy = intersection / label_area
    return iou, accuracy, intersection.sum() / label_area.sum()


def test_figures_are_those_of_histograms(segmenter, folder, tmp_path):
    evaluation = evaluate_segmenter(segmenter, load_segmentation(folder))
    iou, accuracy, pixels = by_histograms(segmenter, folder)
    np.testing.assert_allclose(evaluation.class_iou, iou)
    np.testing.assert_allclose(evaluation.class_accuracy, accuracy)
    assert evaluation.metrics == pytest.approx(
        {'miou': iou.mean(), 'pixel_accuracy': pixels, 'mean_accuracy': accuracy.mean()}
    )
    assert (evaluation.examples, evaluation.skipped) == (4, 0)

    files = write_segmentation(evaluation, tmp_path / 'report')
    report = json.loads(files[0].read_text())
    assert report['miou'] == pytest.approx(iou.mean())
    assert [entry['label'] for entry in report['classes']] == list(LABELS)
    assert np.sum(report['confusion']) == sum(entry['pixels'] for entry in report['classes'])
    assert files[1].stat().st_size > 1000
    text = format_segmentation(evaluation)
    assert f'{iou.mean():.2%}' in text
    assert text.index('IoU') < text.index(LABELS[int(iou.argmin())])


def test_labels_are_paired_by_their_names(segmenter, folder):
    (folder / 'classes.txt').write_text('cat\nant\nbee')
    source = load_segmentation(folder)
    classes = match_labels(segmenter, source)
    assert classes[:3].tolist() == [2, 0, 1]
    assert (classes[3:] == 3).all()
    iou, *_ = by_histograms(segmenter, folder, order=(2, 0, 1))
    evaluation = evaluate_segmenter(segmenter, source)
    np.testing.assert_allclose(evaluation.class_iou, iou)
    assert evaluation.label_names == LABELS


def test_labels_without_names_are_paired_by_their_numbers(segmenter, folder):
    (folder / 'classes.txt').unlink()
    source = load_segmentation(folder)
    assert source.label_names == ('class 0', 'class 1', 'class 2')
    assert match_labels(segmenter, source)[:4].tolist() == [0, 1, 2, 3]
    # The highest class of the network need not occur.
    source.label_names = source.label_names[:2]
    assert match_labels(segmenter, source)[:3].tolist() == [0, 1, 3]
    source.label_names = tuple(f'class {number}' for number in range(4))
    with pytest.raises(DataError, match=r'the checkpoint has 3 classes and .* has 4'):
        match_labels(segmenter, source)


def test_a_network_without_names_takes_those_of_the_set(stored_segmenter, folder):
    description = dataclasses.replace(stored_segmenter.description, label_names=())
    segmenter = Segmenter(
        description, stored_segmenter.variables, devices=stored_segmenter.one_device
    )
    evaluation = evaluate_segmenter(segmenter, load_segmentation(folder))
    assert evaluation.label_names == LABELS


@pytest.mark.parametrize(
    ('names', 'message'),
    [('ant bee cow', "without 'cat', with 'cow'"), ('ant bee cat dog', '3 classes and .* has 4')],
)
def test_other_labels_are_refused(segmenter, folder, names, message):
    (folder / 'classes.txt').write_text(names.replace(' ', '\n'))
    with pytest.raises(DataError, match=message):
        evaluate_segmenter(segmenter, load_segmentation(folder))


def damage(folder, kind):
    image, labels = (folder / part / 'val' / '1.png' for part in ('images', 'labels'))
    if kind == 'image':
        image.write_bytes(image.read_bytes()[:60])
    elif kind == 'labels':
        labels.write_bytes(labels.read_bytes()[:60])
    elif kind == 'size':
        Image.new('L', (30, 41)).save(labels)
    elif kind == 'range':
        Image.new('L', (30, 40), 7).save(labels)


@pytest.mark.parametrize(
    ('kind', 'message'),
    [
        ('image', r'1\.png.*damaged PNG'),
        ('labels', r'1\.png.*damaged PNG'),
        ('size', r'1\.png.*the image has 30 x 40 pixels and its label map 30 x 41'),
        ('range', r'1\.png.*1,200 pixels have a label that is no class, up to 7'),
    ],
)
def test_damage_is_named_or_left_out(segmenter, folder, kind, message):
    damage(folder, kind)
    with pytest.raises(DataError, match=message) as error:
        evaluate_segmenter(segmenter, load_segmentation(folder))
    assert '\n' not in str(error.value)
    evaluation = evaluate_segmenter(segmenter, load_segmentation(folder), skip_damaged=True)
    assert (evaluation.examples, evaluation.skipped) == (3, 1)
    assert '3 images, 1 damaged ones left out' in format_segmentation(evaluation)


def test_a_missing_label_map_and_nothing_at_all_are_refused(segmenter, folder):
    source = load_segmentation(folder)
    for path in (folder / 'labels' / 'val').iterdir():
        path.write_bytes(b'')
    with pytest.raises(DataError, match=r'every image of .* is damaged'):
        evaluate_segmenter(segmenter, source, skip_damaged=True)
    (folder / 'labels' / 'val' / '1.png').unlink()
    with pytest.raises(DataError, match='an image without a label map'):
        load_segmentation(folder)


def test_pixels_are_counted_by_class_and_answer():
    labels = np.array([[0, 1, 1], [2, 3, 255]])
    found = np.array([[0, 1, 2], [0, 1, 1]])
    expected = [[1, 0, 0], [0, 1, 1], [1, 0, 0]]
    np.testing.assert_array_equal(count_pixels(labels, found, 3), expected)


def test_what_does_not_occur_has_no_figure():
    confusion = np.array([[3, 1, 0], [0, 0, 0], [0, 0, 0]])
    evaluation = LabelMapEvaluation('a set', 'val', LABELS, 1, 0, 1.0, confusion)
    report = evaluation.to_json()
    assert [entry['iou'] for entry in report['classes']] == [0.75, 0.0, None]
    assert [entry['accuracy'] for entry in report['classes']] == [0.75, None, None]
    text = format_segmentation(evaluation)
    assert 'cat' not in text
    assert 'ant      75.00%    75.00%   100.00%  most often taken for bee' in text
