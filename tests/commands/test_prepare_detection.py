"""The command prepare for detection: what it prints, and what it refuses."""

import json
import re

import pytest

from gcnet_jax.__main__ import main
from gcnet_jax.data.detection_sources import load_detection
from tests.data.detection_folders import annotation, fill


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / 'my coco'
    fill(folder, {'train2017': range(7), 'val2017': range(20, 23)})
    return folder


@pytest.fixture
def run(tmp_path, root, capsys):
    """A function that runs the command with more flags: its code, stdout and stderr, by lines."""

    def run(*flags):
        arguments = ['prepare', str(root), '--task', 'detection', '--name', 'mine']
        code = main([*arguments, '--data-dir', str(tmp_path / 'sets'), *flags])
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err.splitlines()

    return run


def test_a_folder_becomes_a_set(run, tmp_path):
    code, lines, _ = run()
    assert code == 0
    assert lines == [
        'mine: 3 classes, images: train 7, validation 3',
        f'in {tmp_path}/sets/mine/1.0.0',
        'train: objects to train on: 6 (with masks), up to 2 in one image; others: 1 crowds, '
        '0 degenerate; images without objects: 3',
        'validation: objects to train on: 3 (with masks), up to 2 in one image; others: 0 crowds, '
        '0 degenerate; images without objects: 1',
        'not in any training image: person',
        'fine-tune a ported detector: python -m gcnet_jax train detection '
        '--config.training.init_from=DIR '
        f'--config.data.name=mine --config.data.data_dir={tmp_path}/sets --workdir runs/mine',
    ]
    assert len(load_detection('mine', 'train', str(tmp_path / 'sets'))) == 7


def test_what_is_unusual_is_printed(run, root):
    file = root / 'annotations' / 'instances_train2017.json'
    contents = json.loads(file.read_text())
    contents['annotations'].append(annotation(50, 0, box=(1, 1, 0.5, 9), segmentation=None))
    file.write_text(json.dumps(contents))
    (root / 'train2017' / '0004.png').write_bytes(b'\x1b[31m')
    code, _, errors = run()
    assert code == 1
    (error,) = errors
    assert 'train2017/0004.png (not an image of a known format' in error
    code, lines, _ = run('--skip-damaged')
    assert code == 0
    assert lines[0].startswith('left out: train2017/0004.png (not an image of a known format')
    assert lines[1] == 'left out: 1 in all'
    assert lines[4].startswith('train: objects to train on: 5 (with masks), up to 2')
    assert '1 degenerate' in lines[4]
    assert any(re.match('note: .*annotations without segmentation: 1', line) for line in lines)
    assert any(re.match('note: .*not trained on.*annotation 50', line) for line in lines)


@pytest.mark.parametrize(
    'flags',
    [
        *(['--classes', 'a,b'], ['--labels', 'voc'], ['--reduce-zero-label']),
        *(['--seed', '1'], ['--test-fraction', '0.5']),
    ],
)
def test_flags_of_other_tasks_have_no_meaning(run, flags):
    code, lines, errors = run(*flags)
    assert (code, lines) == (1, [])
    assert f'{flags[0]} has no meaning with --task detection' in errors[0]


def test_errors_are_one_line(run, root):
    (root / 'annotations' / 'instances_train2017.json').unlink()
    code, lines, errors = run()
    assert (code, lines) == (1, [])
    (error,) = errors
    assert 'has no annotations/instances_train.json' in error
