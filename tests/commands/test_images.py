"""The commands predict, evaluate and features: what they print and write, and their exit codes."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from gcnet_jax.__main__ import main
from gcnet_jax.commands.common import EXIT_SOME_IMAGES_FAILED
from gcnet_jax.data import decode, sources
from gcnet_jax.errors import DataError
from gcnet_jax.inference.classifier import Classifier
from gcnet_jax.stored import write_ported

LABELS = ('ant', 'bee', 'cat', 'dog', 'elk', 'fox')


@pytest.fixture
def folder(make, tmp_path):
    (tmp_path / 'photos' / 'more').mkdir(parents=True)
    for name, seed in [('a.png', 0), ('b.jpg', 1), ('more/c.png', 2)]:
        kind = 'JPEG' if name.endswith('jpg') else 'PNG'
        (tmp_path / 'photos' / name).write_bytes(make.encode(make.picture(seed), kind))
    return tmp_path / 'photos'


@pytest.fixture
def run(stored, capsys):
    """Runs a command on the stored network: exit code, lines of stdout, lines of stderr."""

    def call(command, *arguments, checkpoint=stored.directory):
        code = main([command, '--checkpoint', str(checkpoint), *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err.splitlines()

    return call


def test_predict_prints_a_line_an_image(run, stored, folder):
    code, out, err = run('predict', folder, folder / 'a.png', '--top-k', 2)
    names = [folder / 'a.png', folder / 'b.jpg', folder / 'more/c.png', folder / 'a.png']
    assert (code, err, len(out)) == (0, [], 4)
    expected = Classifier.load(stored.directory)([str(name) for name in names], top_k=2)
    assert out == [f'{name}: {answer}' for name, answer in zip(names, expected, strict=True)]


def test_a_checkpoint_that_is_not_the_newest_is_named(run, stored, folder, tmp_path):
    for step, accuracy in ((10, 0.9), (20, 0.5)):
        place = tmp_path / 'run' / 'checkpoints' / str(step)
        shutil.copytree(stored.directory / 'checkpoints' / '0', place)
        (place / 'metrics').mkdir()
        (place / 'metrics' / 'metrics').write_text(json.dumps({'eval/accuracy': accuracy}))
    arguments = ('predict', folder / 'a.png')
    code, out, err = run(*arguments, checkpoint=tmp_path / 'run')
    assert (code, len(out)) == (0, 1)
    assert err == [
        'checkpoint of step 10, the best by its evaluation; the newest is of step 20 '
        '(--choose newest)'
    ]
    _, _, err = run(*arguments, '--choose', 'newest', checkpoint=tmp_path / 'run')
    assert err == []


def test_predict_prints_json(run, folder):
    code, out, _ = run('predict', folder / 'a.png', '--json', '--top-k', 6)
    (answer,) = map(json.loads, out)
    assert (code, answer['image']) == (0, str(folder / 'a.png'))
    assert {row['label'] for row in answer['predictions']} == set(LABELS)
    assert all(LABELS[row['class']] == row['label'] for row in answer['predictions'])
    assert sum(row['probability'] for row in answer['predictions']) == pytest.approx(1)


def test_bad_images_are_named_and_the_others_done(run, folder, tmp_path):
    (folder / 'aa.png').write_bytes(b'no image')
    (tmp_path / 'empty').mkdir()
    missing, empty = tmp_path / 'missing.png', tmp_path / 'empty'
    code, out, err = run('predict', missing, folder, empty)
    assert code == EXIT_SOME_IMAGES_FAILED == 3
    assert [line.partition(':')[0] for line in out] == [
        str(folder / name) for name in ('a.png', 'b.jpg', 'more/c.png')
    ]
    assert [line.partition(': ')[0] for line in err] == ['gcnet_jax predict'] * 3
    assert f'{missing}: no such file' in err[0]
    assert f'{folder / "aa.png"}: not an image of a known format' in err[1]
    assert f'{empty}: a folder that holds no image' in err[2]
    _, out, _ = run('predict', missing, folder / 'a.png', '--json')
    assert json.loads(out[0]) == {'image': str(missing), 'error': f'{missing}: no such file'}


@pytest.mark.parametrize('command', ['predict', 'features', 'attention'])
def test_what_is_left_out_of_folders_is_counted(run, folder, make, tmp_path, command):
    (folder / 'notes.txt').write_text('about')
    (folder / 'more' / 'film.mp4').write_bytes(b'\0\0\0\x18ftypisom')
    (folder / 'photo').write_bytes(make.encode(make.picture(3)))
    (folder / 'phone.heic').write_bytes(b'\0\0\0\x18ftypheic')
    (folder / 'linked').symlink_to(folder / 'more')
    out = {'features': ['--out', tmp_path / 'f.npz'], 'attention': ['--out', tmp_path / 'maps']}
    code, printed, err = run(command, folder, *out.get(command, []))
    assert code == EXIT_SOME_IMAGES_FAILED
    assert len(err) == 2
    assert 'phone.heic: HEIC images are not read' in err[0]
    assert err[1] == (
        f'gcnet_jax {command}: left out 2 files that are no image (first: {folder}/more/film.mp4)'
    ) or err[1].endswith(f'(first: {folder}/linked/film.mp4)')
    if command == 'features':
        assert printed[0].startswith('wrote [4, ')  # One folder is linked, and done once.
    else:
        assert (
            sum('.png: ' in line or 'photo: ' in line or '.jpg: ' in line for line in printed) == 4
        )


def test_names_cannot_write_to_the_terminal(run, stored, folder, make, tmp_path):
    names = [os.fsdecode(b'caf\xe9.png'), 'a\nb.png', '\x1b[31m.png']
    for name in names:
        (folder / 'more' / name).write_bytes(make.encode(make.picture(4)))
    (folder / 'more' / '\x1b]0;title\x07.png').write_bytes(b'damaged')
    (folder / 'more' / '\x1b.txt').write_bytes(b'text')
    labels = ('a\nb', '\x1b[2J', 'x' * 10_000, *LABELS[3:])
    description = dataclasses.replace(stored.description, label_names=labels)
    write_ported(tmp_path / 'network', description, stored.variables)
    network = tmp_path / 'network'
    code, out, err = run('predict', folder, '--top-k', 6, checkpoint=network)
    assert (code, len(out), len(err)) == (3, 6, 2)
    assert all(line.isprintable() and len(line) < 1_500 for line in out + err)
    assert r'caf\udce9.png: ' in ''.join(out)
    _, out, _ = run('predict', folder, '--json', '--top-k', 6, checkpoint=network)
    answers = [json.loads(line) for line in out]
    assert {Path(answer['image']).name for answer in answers} >= set(names)
    assert {row['label'] for row in answers[0]['predictions']} == set(labels)
    code, out, err = run('features', folder, '--out', tmp_path / 'f.npz', checkpoint=network)
    assert (code, len(err)) == (3, 2)
    code, out, err = run('attention', folder, '--out', tmp_path / 'maps', checkpoint=network)
    assert (code, len(out) >= 6, len(err)) == (3, True, 2)
    assert all(line.isprintable() for line in out + err)


def test_pillows_warnings_do_not_come_between(run, make, tmp_path):
    data = bytearray(make.encode(make.picture(0), 'TIFF'))
    place = data.index(b'\x02\x01\x03\x00')  # The number of values of tag 258.
    data[place + 4 : place + 8] = b'\xff\xff\x00\x00'
    (tmp_path / 'tag.tif').write_bytes(data)
    # Here a warning is an error, and ends the reading before it comes to what is wrong.
    with pytest.raises(DataError, match='Tag data larger than file'):
        decode.decode(bytes(data))
    code, _, err = run('predict', tmp_path / 'tag.tif')
    assert (code, len(err)) == (1, 1)
    assert 'damaged TIFF image: unknown pixel mode' in err[0]


def test_nothing_done_is_exit_code_1(run, tmp_path, folder):
    code, out, err = run('predict', tmp_path / 'missing.png')
    assert (code, out, len(err)) == (1, [], 1)
    code, out, err = run('predict', folder / 'a.png', checkpoint=tmp_path / 'nowhere')
    assert (code, out, len(err)) == (1, [], 1)
    assert 'nowhere: no such directory' in err[0]


@pytest.mark.parametrize('ending', ['npz', 'safetensors'])
def test_features_are_written_with_the_names(run, stored, folder, tmp_path, ending):
    (folder / 'aa.png').write_bytes(b'no image')
    out = tmp_path / f'features.{ending}'
    code, printed, err = run('features', folder, '--out', out, '--layer', 'stage1')
    assert (code, len(err)) == (3, 1)
    assert printed == [f'wrote [3, 12, 12, 8] of stage1 of gccnn to {out}']
    names = [str(folder / name) for name in ('a.png', 'b.jpg', 'more/c.png')]
    expected = Classifier.load(stored.directory).features(names, 'stage1')
    if ending == 'npz':
        with np.load(out) as file:
            assert file['names'].tolist() == names
            np.testing.assert_array_equal(file['features'], expected)
    else:
        with safe_open(out, framework='np') as file:
            assert json.loads(file.metadata()['names']) == names
            np.testing.assert_array_equal(file.get_tensor('features'), expected)


def test_features_refuses_before_it_computes(run, folder, tmp_path):
    out = tmp_path / 'features.npz'
    for arguments, message in [
        (['--out', tmp_path / 'f.txt'], 'must end in .npz or .safetensors'),
        (['--out', out, '--layer', 'stage7'], "unknown layer of gccnn 'stage7'"),
    ]:
        code, _, err = run('features', folder, *arguments)
        assert (code, len(err)) == (1, 1)
        assert message in err[0]
    code, _, err = run('features', tmp_path / 'none.png', '--out', out)
    assert code == 1
    assert 'none.png: no such file' in err[0]
    assert not out.exists()


class Source:
    """Six pictures, one a class."""

    name, split, label_names, no_label = 'pictures', 'test', LABELS, 0
    num_classes, is_multilabel = len(LABELS), False

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {'image': self.images[index], 'label': index % 6}

    def describe(self, index):
        return f'picture {index}'


@pytest.fixture
def source(make, monkeypatch):
    images = [make.encode(make.picture(seed)) for seed in range(9)]
    asked = []

    def load_source(name, split, data_dir):
        asked.append((name, split, data_dir))
        return Source(images)

    monkeypatch.setattr(sources, 'load_source', load_source)
    return asked


def test_evaluate_prints_and_writes(run, source, tmp_path):
    out = tmp_path / 'report'
    code, printed, err = run(
        'evaluate', '--data', 'pictures', '--split', 'train[:9]', '--data-dir', '/x', '--out', out
    )
    assert (code, err) == (0, [])
    assert source == [('pictures', 'train[:9]', '/x')]
    assert printed[0] == 'pictures test: 9 images'
    assert printed[-1] == f'wrote {out / "evaluation.json"} and {out / "confusion.png"}'
    _, as_json, _ = run('evaluate', '--data', 'pictures', '--json', '--fold')
    first, second = json.loads((out / 'evaluation.json').read_text()), json.loads(as_json[0])
    assert first['confusion'] == second['confusion']
    assert source[1] == ('pictures', None, None)  # Which split is the source's to choose.


def test_evaluate_is_not_folded_unless_asked(run, source, monkeypatch):
    seen = []
    load = Classifier.load.__func__

    def spy(cls, *arguments, **options):
        seen.append(tuple(map(options.get, ('fold', 'dtype', 'weights', 'batch_size'))))
        return load(cls, *arguments, **options)

    monkeypatch.setattr(Classifier, 'load', classmethod(spy))
    run('evaluate', '--data', 'pictures')
    run(
        *('evaluate', '--data', 'pictures', '--fold', '--dtype', 'bfloat16'),
        *('--weights', 'int8', '--batch-size', '16'),
    )
    assert seen == [(False, None, None, None), (True, 'bfloat16', 'int8', 16)]


def test_a_reader_that_stops_early_is_no_error():
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, '-m', 'gcnet_jax', 'models'],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b''
    assert process.returncode == 141
