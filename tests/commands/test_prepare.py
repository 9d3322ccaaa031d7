"""The command prepare for segmentation, from a folder to batches."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from gcnet_jax.__main__ import main
from gcnet_jax.commands import prepare
from gcnet_jax.commands.config_files import read_flags
from gcnet_jax.data.preprocessing import KeepRatio
from gcnet_jax.data.segmentation_labels import LABEL_SETS
from gcnet_jax.data.segmentation_loader import evaluation_batches, train_batches
from gcnet_jax.data.segmentation_sources import load_segmentation
from tests.data.segmentation_folders import fill, image_of, png


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / 'my streets'
    fill(folder, {'train': 5, 'val': 2})
    return folder


@pytest.fixture
def run(tmp_path, root, capsys):
    """A function that runs the command with more flags: its code, stdout and stderr, by lines."""

    def run(*flags, name='streets'):
        arguments = ['prepare', str(root), '--task', 'segmentation', '--name', name]
        code = main([*arguments, '--data-dir', str(tmp_path / 'my sets'), *flags])
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err.splitlines()

    return run


def test_from_a_folder_to_batches(run, tmp_path):
    data_dir = str(tmp_path / 'my sets')
    code, lines, _ = run('--classes', 'road,sky,traffic light')
    assert code == 0
    assert lines[0] == 'streets: 3 classes, images: train 5, validation 2'
    assert lines[1] == f'in {data_dir}/streets/1.0.0'
    shares = [re.fullmatch(r' *(\d+\.\d\d)%  (.+)', line).groups() for line in lines[3:7]]
    names = ['road', 'sky', 'traffic light', '255, which does not count']
    assert [name for _, name in shares] == names
    assert sum(float(share) for share, _ in shares) == pytest.approx(100, abs=0.02)
    assert f"'--config.data.data_dir={data_dir}'" in lines[7]
    assert len(lines) == 8
    options = {'global_batch_size': 2, 'image_size': (6, 8)}
    limits = KeepRatio(short_side=6, long_side=8, multiple_of=1)
    with train_batches(
        load_segmentation('streets', 'train', data_dir), seed=0, preprocessing=limits, **options
    ) as batches:
        batch = next(batches)
    assert batch['image'].shape == (2, 6, 8, 3)
    assert set(np.unique(batch['label'])) <= {0, 1, 2, 255}
    with evaluation_batches(load_segmentation('streets', None, data_dir), **options) as batches:
        (batch,) = batches
    assert sorted(batch['image'][:, 0, 0, 0]) == [5, 6]


def test_the_command_for_training_is_one_that_is_read(run):
    _, lines, _ = run()
    words = shlex.split(lines[-1].removeprefix('train on it: '))
    assert words[:5] == ['python', '-m', 'gcnet_jax', 'train', 'segmentation']
    config, name, workdir = read_flags(['train', '--config', *words[4:]], Path('segmentation'))
    assert config.data.name == 'streets'
    assert config.training.batch_size == 2
    assert (name, workdir) == ('segmentation', Path('runs/streets'))


def test_names_that_are_unknown_are_asked_for(run):
    code, lines, _ = run()
    assert code == 0
    assert '  class 2' in lines[5]
    assert lines[7].startswith('the classes are numbered up to the largest label: for names put')


def test_known_names_and_classes_without_a_pixel(run):
    code, lines, _ = run('--labels', 'voc')
    assert code == 0
    assert lines[0].startswith('streets: 21 classes')
    assert '  background' in lines[3]
    absent = next(line for line in lines if line.startswith('not in any training image: '))
    assert absent.endswith('train, tvmonitor')
    assert sorted(LABEL_SETS) == list(prepare.LABEL_SETS)


def test_the_zero_label_is_reduced(run):
    code, lines, _ = run('--classes', 'a,b', '--reduce-zero-label')
    assert code == 0
    assert lines[0].startswith('streets: 2 classes')


def test_what_is_left_out_is_listed_and_counted(run, root):
    (root / 'labels' / 'train' / '000.png').write_bytes(b'\x1b[31m')
    (root / 'images' / 'train' / 'a\x1bb.png').write_bytes(png(image_of(3)))
    (root / 'images' / 'test').mkdir()
    (root / 'images' / 'test' / 'c.png').write_bytes(png(image_of(3)))
    code, _, errors = run()
    assert code == 1
    (error,) = errors
    assert "2 files in '" in error
    assert r'a\x1bb.png (an image without a label map)' in error
    code, lines, _ = run('--skip-damaged')
    assert code == 0
    assert lines[0] == r'left out: images/train/a\x1bb.png (an image without a label map)'
    assert lines[1].startswith('left out: labels/train/000.png (label map: is no image; ')
    assert lines[2] == 'left out: 2 in all'
    assert lines[3] == 'left out: 1 images of the split test, without label maps'
    assert lines[4] == 'streets: 3 classes, images: train 4, validation 2'


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--classes', 'a,b'], 'labels are 0 to 1, and 255'),
        (['--classes', 'a'], 'the list of classes has 1 classes; 2 to 255 are needed'),
        (['--classes', 'a,b,a'], "the list of classes has the name 'a' for the labels 0 and 2"),
        (['--test-fraction', '0'], '--test-fraction has no meaning with --task segmentation'),
        (['--seed', '0'], '--seed has no meaning with --task segmentation'),
    ],
)
def test_flags_that_cannot_be_are_refused_in_one_line(flags, message, run):
    code, lines, errors = run(*flags)
    assert code == 1
    assert lines == []
    (error,) = errors
    assert re.search(message, error)


def test_flags_of_segmentation_have_no_meaning_for_classes(root, capsys):
    for flags in (['--classes', 'a,b'], ['--labels', 'voc'], ['--reduce-zero-label']):
        assert main(['prepare', str(root), '--name', 'streets', *flags]) == 1
        error = capsys.readouterr().err
        assert f'{flags[0]} has no meaning with --task classification' in error


def test_one_source_of_names(root):
    with pytest.raises(SystemExit, match='2'):
        main(['prepare', str(root), '--name', 'streets', '--labels', 'voc', '--classes', 'a,b'])
