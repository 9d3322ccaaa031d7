"""Feature files as their readers see them, and what they refuse."""

import json

import numpy as np
import pytest
from safetensors import safe_open

from gcnet_jax.errors import ConfigError, DataError
from gcnet_jax.inference.feature_files import write_features


def rows(count, shape=(2, 3)):
    rng = np.random.default_rng(0)
    return [(f'image-{i}.png', rng.normal(size=shape).astype(np.float32)) for i in range(count)]


@pytest.mark.parametrize('shape', [(7,), (2, 3)])
def test_npz_is_read_without_pickle(tmp_path, shape):
    written = rows(5, shape)
    assert write_features(tmp_path / 'f.npz', iter(written), layer='a', source='b') == (5, *shape)
    with np.load(tmp_path / 'f.npz') as file:
        np.testing.assert_array_equal(file['features'], np.stack([row for _, row in written]))
        assert file['features'].dtype == np.float32
        assert file['names'].tolist() == [name for name, _ in written]
        assert (str(file['layer']), str(file['source'])) == ('a', 'b')
    assert [path.name for path in tmp_path.iterdir()] == ['f.npz']


@pytest.mark.parametrize('shape', [(7,), (2, 3)])
def test_safetensors_is_read_by_the_library(tmp_path, shape):
    written = rows(5, shape)
    write_features(tmp_path / 'f.safetensors', iter(written), layer='a', source='b')
    with safe_open(tmp_path / 'f.safetensors', framework='np') as file:
        np.testing.assert_array_equal(
            file.get_tensor('features'), np.stack([row for _, row in written])
        )
        metadata = file.metadata()
    assert json.loads(metadata['names']) == [name for name, _ in written]
    assert (metadata['layer'], metadata['source']) == ('a', 'b')
    assert [path.name for path in tmp_path.iterdir()] == ['f.safetensors']


def test_nothing_is_left_of_a_file_that_was_not_finished(tmp_path):
    def broken():
        yield from rows(2)
        raise ValueError('in the middle')

    for name in ('f.npz', 'f.safetensors'):
        with pytest.raises(ValueError, match='in the middle'):
            write_features(tmp_path / name, broken())
        with pytest.raises(DataError, match='there are no features'):
            write_features(tmp_path / name, [])
        with pytest.raises(DataError, match=r'x: its features are 4, those before 2 x 3; a file'):
            write_features(tmp_path / name, [*rows(1), ('x', np.zeros(4))])
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_only_when_asked(tmp_path):
    out = tmp_path / 'f.npz'
    out.write_bytes(b'mine')
    with pytest.raises(ConfigError, match=r'f.npz exists; .*--overwrite'):
        write_features(out, rows(1))
    assert out.read_bytes() == b'mine'
    write_features(out, rows(1), overwrite=True)
    with np.load(out) as file:
        assert file['features'].shape == (1, 2, 3)


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('f.npy', r'must end in .npz or .safetensors'),
        ('nowhere/f.npz', 'nowhere is not a directory'),
    ],
)
def test_other_places_are_refused_before_anything_is_computed(tmp_path, name, message):
    def never():
        raise AssertionError
        yield

    with pytest.raises(ConfigError, match=message):
        write_features(tmp_path / name, never())


def test_strange_names_do_not_break_the_file(tmp_path):
    strange = [('a\nb.png', np.zeros(2)), ('\udcff.png', np.ones(2))]
    write_features(tmp_path / 'f.safetensors', strange)
    with safe_open(tmp_path / 'f.safetensors', framework='np') as file:
        assert json.loads(file.metadata()['names']) == ['a\\nb.png', '\\udcff.png']


@pytest.mark.parametrize('name', ['f.npz', 'f.safetensors'])
def test_a_read_only_target_is_one_line(tmp_path, read_only, name):
    with pytest.raises(DataError, match=read_only):
        write_features(tmp_path / name, rows(2))
