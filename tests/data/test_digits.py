"""The embedded data set."""

import concurrent.futures
import multiprocessing
import os

import numpy as np
import pytest
from sklearn.datasets import load_digits

from gcnet_jax.data import digits
from gcnet_jax.data.decode import decode
from gcnet_jax.data.sources import load_source
from gcnet_jax.errors import DataError


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    place = str(tmp_path_factory.mktemp('tfds') / 'made' / 'on demand')
    digits.prepare_digits(place)
    return place


def test_the_splits_are_all_digits_and_share_none(data_dir):
    images, labels = load_digits(return_X_y=True)
    expected = sorted(
        (int(label), np.round(image / 16 * 255).astype(np.uint8).tobytes())
        for image, label in zip(images, labels, strict=True)
    )
    found = {'train': [], 'test': []}
    for split, examples in found.items():
        source = load_source('digits', split, data_dir)
        for index in range(len(source)):
            image = decode(source[index]['image'])
            assert image.shape == (8, 8, 3)
            examples.append((source[index]['label'], image[..., 1].tobytes()))
    assert sorted(found['train'] + found['test']) == expected
    assert (len(found['train']), len(found['test'])) == (1438, 359)
    counts = np.bincount([label for label, _ in found['test']])
    np.testing.assert_allclose(counts, np.bincount(labels) * 0.2, atol=0.5)  # In proportion.


def test_the_split_never_changes(data_dir):
    source = load_source('digits', 'test', data_dir)
    names = {source.describe(index).split('digit ')[1].rstrip(')') for index in range(len(source))}
    assert sum(map(int, names)) == 311827
    assert source.label_names == tuple('0123456789')


def test_a_second_call_changes_nothing(data_dir):
    before = {entry.path: entry.stat().st_mtime_ns for entry in os.scandir(f'{data_dir}/digits')}
    digits.prepare_digits(data_dir)
    after = {entry.path: entry.stat().st_mtime_ns for entry in os.scandir(f'{data_dir}/digits')}
    assert before == after
    assert os.listdir(data_dir) == ['digits']  # Nothing is left beside it.


@pytest.mark.slow
def test_processes_may_prepare_at_once(tmp_path):
    context = multiprocessing.get_context('spawn')
    with concurrent.futures.ProcessPoolExecutor(3, mp_context=context) as pool:
        places = list(pool.map(digits.prepare_digits, [str(tmp_path)] * 3))
    assert set(places) == {tmp_path / 'digits' / '1.0.0'}
    assert os.listdir(tmp_path) == ['digits']
    assert len(load_source('digits', 'train', str(tmp_path))) == 1438


def test_being_second_is_no_error(tmp_path):
    """The race for certain: another process finishes between the check and the renaming."""
    digits.prepare_digits(str(tmp_path))
    place, written = digits.write_image_set(digits.Digits, str(tmp_path))
    assert place == tmp_path / 'digits' / '1.0.0'
    assert not written
    assert os.listdir(tmp_path) == ['digits']


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(DataError, match=r'cannot write .*data_dir'):
        load_source('digits', 'train', str(tmp_path / 'file'))
    assert (tmp_path / 'file').read_text() == ''


@pytest.mark.parametrize(
    'error',
    [
        OSError(28, 'No space left on device'),
        RuntimeError('write() failed: No space left on device; writing digits; at byte 2048'),
    ],
)
def test_a_full_disk_is_named_and_nothing_stays_behind(tmp_path, monkeypatch, error):
    def fail(test):
        yield from list(examples(test=test))[:3]
        raise error

    examples = digits._examples
    monkeypatch.setattr(digits, '_examples', fail)
    with pytest.raises(DataError, match=r'cannot write .*no space left.* has room') as caught:
        digits.prepare_digits(str(tmp_path))
    assert '\n' not in str(caught.value)
    assert os.listdir(tmp_path) == []
