"""The commands predict and evaluate on a detector: what they print, draw and refuse."""

import json

import numpy as np
import pytest
from PIL import Image

from gcnet_jax.__main__ import main
from gcnet_jax.commands.common import EXIT_SOME_IMAGES_FAILED

pytestmark = pytest.mark.usefixtures('quick_compilation')


@pytest.fixture(scope='module')
def coco(tmp_path_factory):
    """A set of two images and one that is missing; a box outside, and a category of its own."""
    root = tmp_path_factory.mktemp('coco')
    (root / 'val').mkdir()
    (root / 'annotations').mkdir()
    random = np.random.default_rng(0)
    for name in ('a.png', 'b.png'):
        coarse = Image.fromarray(random.integers(0, 256, (4, 5, 3), np.uint8))
        coarse.resize((50, 50), Image.Resampling.BICUBIC).save(root / 'val' / name)

    def annotation(number, image, category, box):
        left, top, width, height = box
        corners = [left, top, left + width, top, left + width, top + height, left, top + height]
        return {
            **{'id': number, 'image_id': image, 'category_id': category, 'bbox': box},
            **{'area': width * height, 'iscrowd': 0, 'segmentation': [corners]},
        }

    contents = {
        'images': [
            {'id': number, 'file_name': name, 'height': 50, 'width': 50}
            for number, name in ((7, 'a.png'), (9, 'b.png'), (11, 'gone.png'))
        ],
        'categories': [{'id': 3, 'name': 'bee'}, {'id': 90, 'name': 'wasp'}],
        'annotations': [
            annotation(1, 7, 3, [5, 5, 20, 30]),
            annotation(2, 9, 3, [40, 40, 30, 30]),
            annotation(3, 9, 90, [0, 0, 10, 10]),
        ],
    }
    (root / 'annotations' / 'instances_val.json').write_text(json.dumps(contents))
    return root


@pytest.fixture
def run(certain_detector, capsys):
    def call(command, *arguments):
        code = main(
            [command, '--checkpoint', str(certain_detector.directory), *map(str, arguments)]
        )
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err.splitlines()

    return call


def test_predict_prints_and_draws_and_goes_on_after_what_it_cannot_read(run, coco, tmp_path):
    (tmp_path / 'cut.png').write_bytes((coco / 'val' / 'a.png').read_bytes()[:100])
    images = (coco / 'val' / 'a.png', tmp_path / 'cut.png')
    code, out, err = run('predict', *images, '--threshold', 0.2, '--draw', tmp_path / 'drawn')
    assert code == EXIT_SOME_IMAGES_FAILED
    (line,) = out
    assert line.startswith(f'{images[0]}: ')
    assert ' objects: ' in line
    assert line.endswith(f': {tmp_path / "drawn" / "a.png"}')
    with Image.open(tmp_path / 'drawn' / 'a.png') as picture:
        assert picture.size == (1000, 1000)
    assert len(err) == 1
    assert 'cut.png: ' in err[0]

    code, out, _ = run('predict', images[0], '--json', '--classes', 'bee')
    assert code == 0
    (answer,) = map(json.loads, out)
    assert answer['image'] == str(images[0])
    for found in answer['objects']:
        assert (found['label'], found['class']) == ('bee', 1)
        assert found['score'] >= 0.3
        assert len(found['box']) == 4
        assert found['mask']['size'] == [50, 50]


def test_evaluate_reports_average_precision_and_what_was_left_out(run, coco, tmp_path):
    code, out, err = run('evaluate', '--data', coco, '--out', tmp_path / 'report')
    assert (code, err) == (0, [])
    text = '\n'.join(out)
    assert '1 of 3 images are missing' in text
    assert 'wasp' in text
    assert 'gone.png' in text
    report = json.loads((tmp_path / 'report' / 'evaluation.json').read_text())
    assert report['examples'] == 2
    assert report['skipped'] == 1
    assert {'AP', 'AP50', 'AP75'} <= report['box'].keys() & report['mask'].keys()
    assert (tmp_path / 'report' / 'precision_recall.png').stat().st_size > 1000


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('predict', 'a.png', '--top-k', 3), '--top-k has no meaning with a detector'),
        (('predict', 'a.png', '--classes', 'ape'), "unknown label 'ape'"),
        (('predict', 'a.png', '--threshold', 2), 'threshold must be from 0 to 1'),
        (('evaluate', '--data', 'nowhere'), 'nowhere'),
        # Before the evaluation, not after hours of it.
        (('evaluate', '--data', 'nowhere', '--out', __file__), 'cannot make the directory'),
        (('evaluate', '--data', '.', '--data-dir', 'x'), '--data-dir has no meaning'),
    ],
)
def test_what_cannot_be_is_one_line(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, (line,) = run(*arguments)
    assert (code, out) == (1, [])
    assert message in line


def test_a_classifier_refuses_what_is_a_detectors(stored, capsys, tmp_path):
    place = ('--checkpoint', str(stored.directory))
    assert main(['predict', 'a.png', '--draw', str(tmp_path), *place]) == 1
    assert '--draw has no meaning with a classifier' in capsys.readouterr().err
