"""The commands on a segmenter: what they print, draw and refuse."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from gcnet_jax.__main__ import main
from gcnet_jax.commands.common import EXIT_SOME_IMAGES_FAILED

pytestmark = pytest.mark.usefixtures('quick_compilation')


@pytest.fixture
def folder(make, tmp_path):
    for kind in ('images', 'labels'):
        for split in ('train', 'val'):
            (tmp_path / 'set' / kind / split).mkdir(parents=True)
    for index, split in enumerate(('train', 'val', 'val')):
        image = make.picture(index, 32, 40)
        labels = np.random.default_rng(index).integers(0, 3, (32, 40), np.uint8)
        Image.fromarray(image).save(tmp_path / 'set' / 'images' / split / f'{index}.png')
        Image.fromarray(labels).save(tmp_path / 'set' / 'labels' / split / f'{index}.png')
    return tmp_path / 'set'


@pytest.fixture
def run(stored_segmenter, capsys):
    def call(command, *arguments):
        code = main(
            [command, '--checkpoint', str(stored_segmenter.directory), *map(str, arguments)]
        )
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err.splitlines()

    return call


@pytest.mark.parametrize(
    ('images', 'flags', 'error'),
    [
        (
            'images/val',
            ('--maps', 'images/val'),
            'where the images are, .* could be overwritten',
        ),
        ('images/val', ('--draw', 'images/val/drawn'), 'is where the images are'),
        ('images/val/1.png', ('--maps', 'images/val'), 'is where an image is'),
        ('images/val', ('--draw', 'new', '--maps', './new'), '--draw and --maps are one directory'),
    ],
)
def test_no_image_is_overwritten(run, folder, monkeypatch, images, flags, error):
    monkeypatch.chdir(folder)
    before = {path: path.read_bytes() for path in folder.rglob('*.png')}
    code, _, lines = run('predict', images, *flags)
    assert code == 1
    assert re.search(error, lines[-1])
    assert {path: path.read_bytes() for path in folder.rglob('*.png')} == before


def test_predict_prints_draws_and_stores(run, folder, tmp_path):
    image = folder / 'images' / 'val' / '1.png'
    (tmp_path / 'cut.png').write_bytes(image.read_bytes()[:60])
    drawn, maps = tmp_path / 'drawn', tmp_path / 'maps'
    places = ('--draw', drawn, '--maps', maps)
    code, (line,), (error,) = run('predict', image, tmp_path / 'cut.png', *places)
    assert code == EXIT_SOME_IMAGES_FAILED
    assert line.startswith(f'{image}: ')
    assert line.endswith(f'%: {drawn / "1.png"}: {maps / "1.png"}')
    assert 'cut.png: damaged PNG image' in error
    with Image.open(drawn / '1.png') as picture:
        assert picture.width == 1000
    with Image.open(maps / '1.png') as stored:
        assert (stored.mode, stored.size) == ('P', (40, 32))
        labels = np.asarray(stored)

    code, (line,), _ = run('predict', image, '--json', *places)
    answer = json.loads(line)
    assert (answer['image'], answer['map']) == (str(image), str(maps / '1.png'))
    assert (answer['labels']['height'], answer['labels']['width']) == (32, 40)
    counts = {entry['class']: entry['pixels'] for entry in answer['labels']['classes']}
    values, pixels = np.unique(labels, return_counts=True)
    assert counts == dict(zip(values.tolist(), pixels.tolist(), strict=True))


def test_evaluate_reports_and_writes(run, folder, tmp_path):
    code, out, err = run('evaluate', '--data', folder, '--out', tmp_path / 'report')
    assert (code, err) == (0, [])
    assert out[0] == f'{folder} validation: 2 images'
    assert out[1].startswith('  miou ')
    assert out[-1].startswith('wrote ')
    report = json.loads((tmp_path / 'report' / 'evaluation.json').read_text())
    assert report['examples'] == 2
    assert (tmp_path / 'report' / 'confusion.png').stat().st_size > 1000
    code, (line,), _ = run('evaluate', '--data', folder, '--split', 'train', '--json')
    assert json.loads(line)['examples'] == 1


def test_attention_draws_the_block_in_the_head(run, folder, tmp_path):
    code, (line,), _ = run('attention', folder / 'images' / 'val' / '1.png', '--out', tmp_path)
    assert code == 0
    assert '%' in line
    assert (tmp_path / '1_attention.png').stat().st_size > 1000


def test_features_are_the_heads_logits(run, folder, tmp_path):
    out = tmp_path / 'maps.npz'
    code, *_ = run('features', folder / 'images', '--layer', 'head_logits', '--out', out)
    assert code == 0
    assert np.load(out)['features'].shape == (3, 2, 3, 3)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('predict', 'a.png', '--top-k', 3), '--top-k has no meaning with a segmenter'),
        (('predict', 'a.png', '--threshold', 0.5), '--threshold has no meaning'),
        (('predict', 'a.png', '--classes', 'ant'), '--classes has no meaning'),
        (('predict', 'a.png', '--maps', __file__), 'cannot make the directory'),
        (('evaluate', '--data', './'), 'images'),
        (('export', '--out', 'a.onnx'), 'a segmenter cannot become an ONNX file'),
    ],
)
def test_what_cannot_be_is_one_line(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, (line,) = run(*arguments)
    assert (code, out) == (1, [])
    assert message in line


def test_others_refuse_what_is_a_segmenters(stored, capsys, tmp_path):
    place = ('--checkpoint', str(stored.directory))
    assert main(['predict', 'a.png', '--maps', str(tmp_path), *place]) == 1
    assert '--maps has no meaning with a classifier' in capsys.readouterr().err
