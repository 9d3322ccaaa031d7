"""Average precision against cases computed by hand, and against COCOeval run on files."""

import json

import numpy as np
import pytest
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from gcnet_jax.tasks.average_precision import METRICS, average_precision

IMAGES = {1: (100, 200), 2: (300, 400)}


def truth(box, image=1, category=5, crowd=0, number=1):
    left, top, width, height = box
    corners = [left, top, left + width, top, left + width, top + height, left, top + height]
    return {
        'id': number,
        'image_id': image,
        'category_id': category,
        'bbox': box,
        'area': width * height,
        'iscrowd': crowd,
        'segmentation': [corners],
    }


def guess(box, score, image=1, category=5):
    size = IMAGES[image]
    left, top, width, height = box
    mask = np.zeros(size, np.uint8, order='F')
    mask[top : top + height, left : left + width] = 1
    encoded = coco_masks.encode(mask)
    return {
        'image_id': image,
        'category_id': category,
        'score': score,
        'bbox': box,
        'segmentation': {'size': list(size), 'counts': encoded['counts'].decode()},
    }


def run(kind, objects, results, categories=(5,), images=IMAGES):
    objects = [item | {'id': number} for number, item in enumerate(objects, start=1)]
    return average_precision(kind, images, categories, objects, results)


both = pytest.mark.parametrize('kind', ['box', 'mask'])


@both
def test_a_false_detection_between_two_true_ones(kind):
    found = run(
        kind,
        [truth([10, 10, 20, 20]), truth([60, 10, 20, 20])],
        [guess([10, 10, 20, 20], 0.9), guess([110, 60, 20, 20], 0.8), guess([60, 10, 20, 20], 0.7)],
    )
    # Precision 1 up to a recall of a half, 2/3 beyond; 101 recalls.
    expected = (51 + 50 * 2 / 3) / 101
    for name in ('AP', 'AP50', 'AP75', 'AP_small'):
        assert found.metrics[name] == pytest.approx(expected)
    assert np.isnan(found.metrics['AP_medium'])
    assert np.isnan(found.metrics['AR_large'])
    assert found.metrics['AR1'] == 0.5
    assert found.metrics['AR10'] == found.metrics['AR100'] == 1
    assert found.by_category == {
        5: {'AP': pytest.approx(expected), 'AP50': pytest.approx(expected)}
    }
    np.testing.assert_allclose(found.precision, np.tile([1] * 51 + [2 / 3] * 50, (3, 1)))


@both
def test_the_overlap_decides_at_each_threshold(kind):
    # 20 x 20 pixels, of which 18 columns overlap: 360 of 440, an overlap of 0.82.
    found = run(kind, [truth([10, 10, 20, 20])], [guess([12, 10, 20, 20], 0.9)])
    assert found.metrics['AP75'] == pytest.approx(1)
    assert found.metrics['AP'] == pytest.approx(0.7)  # 0.50, 0.55, ..., 0.80.
    np.testing.assert_allclose(found.precision.mean(axis=1), [1, 1, 0.7])


@both
def test_each_object_is_found_once(kind):
    twice = [guess([10, 10, 20, 20], 0.9), guess([10, 10, 20, 20], 0.8)]
    assert run(kind, [truth([10, 10, 20, 20])], twice).metrics['AP'] == pytest.approx(1)
    found = run(kind, [truth([10, 10, 20, 20]), truth([60, 10, 20, 20])], twice)
    assert found.metrics['AP'] == pytest.approx(51 / 101)


@both
def test_crowds_are_neither_objects_nor_mistakes(kind):
    objects = [truth([10, 10, 20, 20]), truth([60, 10, 100, 80], crowd=1)]
    results = [guess([70, 20, 30, 30], 0.9), guess([10, 10, 20, 20], 0.5)]
    assert run(kind, objects, results).metrics['AP'] == pytest.approx(1)
    objects[1]['iscrowd'] = 0
    assert run(kind, objects, results).metrics['AP'] < 0.5


@both
def test_classes_count_alike_and_those_without_objects_do_not(kind):
    objects = [
        truth([10, 10, 20, 20], category=5),
        truth([60, 10, 20, 20], category=7),
        truth([10, 200, 100, 40], image=2, category=7),
    ]
    results = [
        guess([10, 10, 20, 20], 0.9, category=5),
        guess([60, 10, 20, 20], 0.9, category=7),
        guess([60, 10, 20, 20], 0.9, category=9),
    ]
    found = run(kind, objects, results, categories=(5, 7, 9))
    assert found.metrics['AP'] == pytest.approx((1 + 51 / 101) / 2)
    assert found.by_category[7]['AP'] == pytest.approx(51 / 101)
    assert np.isnan(found.by_category[9]['AP'])
    assert found.metrics['AP_medium'] == 0


@both
def test_nothing_annotated_or_nothing_found(kind):
    nothing = run(kind, [], [guess([10, 10, 20, 20], 0.9)])
    assert np.isnan(list(nothing.metrics.values())).all()
    assert np.isnan(nothing.precision).all()
    assert np.isnan(list(run(kind, [], []).metrics.values())).all()
    missed = run(kind, [truth([10, 10, 20, 20])], [])
    assert missed.metrics['AP'] == missed.metrics['AR100'] == 0


def test_an_area_is_that_of_the_mask(capsys):
    # A detection that matches nothing does not count within another range of areas.
    lonely = guess([100, 100, 40, 40], 0.95, image=2)
    lonely['bbox'] = [100, 100, 100, 100]
    objects, results = [truth([10, 10, 20, 20])], [lonely, guess([10, 10, 20, 20], 0.5)]
    assert run('box', objects, results).metrics['AP_small'] == pytest.approx(1)
    lonely['segmentation'] = guess([100, 100, 20, 20], 0.95, image=2)['segmentation']
    assert run('mask', objects, results).metrics['AP_small'] == pytest.approx(0.5)
    assert capsys.readouterr().out == ''


def random_case(seed):
    """Objects in random places, found more or less, with ties of scores and crowds."""
    rng = np.random.default_rng(seed)
    objects, results = [], []
    for image, (height, width) in IMAGES.items():
        for _ in range(40):
            side = int(rng.integers(2, height // 2 + 10))
            left, top = (int(rng.integers(0, length - side)) for length in (width, height))
            category = int(rng.choice([5, 7, 9]))
            box = [left, top, side, side]
            objects.append(truth(box, image, category, int(rng.uniform() < 0.1)))
            for _ in range(rng.integers(0, 3)):
                shift = rng.integers(-3, 4, 2)
                moved = [max(left + int(shift[0]), 0), max(top + int(shift[1]), 0), side, side]
                score = float(rng.integers(1, 20) / 20)
                results.append(guess(moved, score, image, category))
    return [item | {'id': number} for number, item in enumerate(objects, start=1)], results


@both
def test_it_is_cocoeval_on_files(kind, tmp_path, capsys):
    objects, results = random_case(seed=0)
    images = [{'id': number, 'height': h, 'width': w} for number, (h, w) in IMAGES.items()]
    categories = [{'id': number, 'name': str(number)} for number in (9, 5, 7)]
    (tmp_path / 'truth.json').write_text(
        json.dumps({'info': {}, 'images': images, 'annotations': objects, 'categories': categories})
    )
    # As mmdetection writes them: results for masks have no boxes, which give other areas.
    unused = 'segmentation' if kind == 'box' else 'bbox'
    written = [{key: value for key, value in item.items() if key != unused} for item in results]
    (tmp_path / 'results.json').write_text(json.dumps(written))
    coco = COCO(tmp_path / 'truth.json')
    direct = COCOeval(
        coco, coco.loadRes(str(tmp_path / 'results.json')), {'box': 'bbox', 'mask': 'segm'}[kind]
    )
    direct.evaluate()
    direct.accumulate()
    direct.summarize()
    capsys.readouterr()
    found = run(kind, objects, results, categories=(9, 5, 7))
    assert capsys.readouterr().out == ''
    assert list(found.metrics) == list(METRICS)
    assert list(found.metrics.values()) == direct.stats.tolist()
    assert 0.1 < found.metrics['AP'] < found.metrics['AP50'] < 1
    precision = direct.eval['precision'][:, :, :, 0, 2]
    assert found.by_category[9]['AP'] == precision[:, :, 2].mean()
    assert found.by_category[5]['AP50'] == precision[0, :, 0].mean()
    np.testing.assert_allclose(found.precision[1], precision[5].mean(axis=1), rtol=1e-12)
    # Neither the annotations nor the results are changed.
    again = run(kind, objects, results, categories=(9, 5, 7))
    assert again.metrics == found.metrics
    assert isinstance(objects[0]['segmentation'], list)
