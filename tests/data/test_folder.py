"""Preparing a folder of images, and reading it back by its name."""

import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from gcnet_jax.data import records
from gcnet_jax.data.folder import prepare_folder
from gcnet_jax.data.sources import load_source
from gcnet_jax.errors import ConfigError, DataError


@pytest.fixture
def data_dir(tmp_path):
    return str(tmp_path / 'prepared')


@pytest.fixture
def fill(make, tmp_path):
    """A function that writes images of their own into folders, as `{'train/cat': 3}`."""

    def write(counts, root=tmp_path / 'images'):
        number = 0
        for folder, count in counts.items():
            (root / folder).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                number += 1
                pixels = np.full((4, 5), number, np.uint8)
                (root / folder / f'{index}.png').write_bytes(make.encode(pixels))
        return root

    return write


def contents(name, split, data_dir):
    """Returns the images of a split with their class names."""
    source = load_source(name, split, data_dir)
    examples = [source[index] for index in range(len(source))]
    return {(example['image'], source.label_names[example['label']]) for example in examples}


def files(root, *folders):
    """Returns the same, straight from the folder."""
    return {
        (path.read_bytes(), path.parent.name)
        for folder in folders
        for path in (root / folder).glob('*/*.png')
    }


def test_train_and_validation_folders_become_splits(fill, data_dir):
    root = fill({'train/dog': 3, 'train/cat': 2, 'val/cat': 1, 'val/dog': 2, 'test/dog': 1})
    result = prepare_folder(root, 'pets', data_dir)
    assert result.label_names == ('cat', 'dog')
    assert result.split_sizes == {'train': 5, 'validation': 3, 'test': 1}
    assert result.damaged == ()
    assert result.path == root.parent / 'prepared' / 'pets' / '1.0.0'
    assert contents('pets', 'train', data_dir) == files(root, 'train')
    assert contents('pets', 'validation', data_dir) == files(root, 'val')
    assert contents('pets', 'test', data_dir) == files(root, 'test')
    assert load_source('pets', 'train', data_dir).label_names == ('cat', 'dog')


def test_a_folder_without_splits_is_divided_in_proportion(fill, data_dir):
    root = fill({'a': 20, 'b': 10, 'c': 2, 'd': 1})
    result = prepare_folder(root, 'letters', data_dir, test_fraction=0.1)
    assert result.split_sizes == {'train': 29, 'test': 4}
    train, test = (contents('letters', split, data_dir) for split in ('train', 'test'))
    assert train | test == files(root, '.')
    assert not train & test
    assert sorted(label for _, label in test) == ['a', 'a', 'b', 'c']  # d has but one image.


def test_the_division_is_a_function_of_the_seed(fill, data_dir):
    root = fill({'a': 20, 'b': 10})
    tests = []
    for name, seed in (('one', 0), ('two', 0), ('three', 1)):
        prepare_folder(root, name, data_dir, test_fraction=0.3, seed=seed)
        tests.append(contents(name, 'test', data_dir))
    assert tests[0] == tests[1] != tests[2]
    (root / 'aa').mkdir()
    fill({'aa': 2})
    prepare_folder(root, 'four', data_dir, test_fraction=0.3)
    assert {example for example in contents('four', 'test', data_dir) if example[1] == 'b'} == {
        example for example in tests[0] if example[1] == 'b'
    }


def test_no_test_split_where_none_is_wanted(fill, data_dir):
    result = prepare_folder(fill({'a': 2, 'b': 2}), 'letters', data_dir, test_fraction=0)
    assert result.split_sizes == {'train': 4}


def test_another_process_reads_it_with_tfds_alone(fill, data_dir):
    root = fill({'train/a': 2, 'train/b': 1, 'test/b': 1})
    place = prepare_folder(root, 'letters', data_dir).path
    script = (
        'import tensorflow_datasets as tfds\n'
        f'builder = tfds.builder_from_directory({str(place)!r})\n'
        'print(builder.info.features["label"].names, builder.info.splits["train"].num_examples)'
    )
    result = subprocess.run(
        [sys.executable, '-c', script], capture_output=True, text=True, check=True
    )
    assert result.stdout == "['a', 'b'] 3\n"
    assert tfds.builder_from_directory(place).info.file_format.value == 'array_record'


def test_records_know_their_files(fill, data_dir):
    prepare_folder(fill({'train/a': 1, 'train/b': 1}), 'letters', data_dir)
    source = load_source('letters', 'train', data_dir)
    described = {source.describe(index).split('(')[1] for index in range(2)}
    assert described == {'train/a/0.png)', 'train/b/0.png)'}


def test_hidden_files_are_ignored_and_links_are_followed(fill, data_dir, tmp_path):
    root = fill({'a': 1, 'b': 1, '.cache': 3})
    (root / 'a' / '.DS_Store').write_text('nothing')
    (root / 'README.md').write_text('about')
    elsewhere = fill({'more': 2}, tmp_path / 'elsewhere') / 'more'
    (root / 'c').symlink_to(elsewhere)
    (root / 'a' / 'link.png').symlink_to(elsewhere / '1.png')
    result = prepare_folder(root, 'letters', data_dir, test_fraction=0)
    assert result.label_names == ('a', 'b', 'c')
    assert result.split_sizes == {'train': 5}


def test_damaged_files_are_refused_all_at_once_or_left_out(fill, make, data_dir, noise):
    root = fill({'a': 3, 'b': 3})
    (root / 'a' / 'cut.png').write_bytes(make.encode(noise)[:-300])
    (root / 'a' / 'cut.jpg').write_bytes(make.encode(noise, 'JPEG')[:-300])
    (root / 'b' / 'notes.txt').write_text('nothing to see')
    (root / 'b' / 'empty.png').write_bytes(b'')
    (root / 'b' / 'lost.png').symlink_to(root / 'nowhere.png')
    (root / 'b' / 'deeper').mkdir()
    os.mkfifo(root / 'b' / 'pipe.png')
    with pytest.raises(DataError, match=r'7 files .*a/cut\.jpg.* and 2 more') as caught:
        prepare_folder(root, 'letters', data_dir)
    assert '\n' not in str(caught.value)
    assert not os.path.exists(data_dir)
    result = prepare_folder(root, 'letters', data_dir, skip_damaged=True, test_fraction=0)
    assert result.split_sizes == {'train': 6}
    listed = sorted(text.split(' ')[0] for text in result.damaged)
    assert listed == [
        'a/cut.jpg', 'a/cut.png', 'b/deeper', 'b/empty.png', 'b/lost.png', 'b/notes.txt',
        'b/pipe.png',
    ]  # fmt: skip


def test_pngs_named_jpeg_are_fine(fill, data_dir):
    root = fill({'a': 2, 'b': 2})
    (root / 'a' / '0.png').rename(root / 'a' / '0.JPEG')
    assert prepare_folder(root, 'letters', data_dir).split_sizes == {'train': 2, 'test': 2}


@pytest.mark.parametrize(
    ('counts', 'message'),
    [
        ({'train/a': 1, 'train/b': 1, 'val/c': 1}, 'validation .*train lacks: c'),
        ({'train/a': 1, 'train/b': 1, 'vall/a': 1}, 'vall.*does not fit beside train'),
        ({'train/a': 1, 'train/b': 1, 'val/a': 1, 'validation/a': 1}, 'does not fit beside'),
        ({'val/a': 1, 'test/a': 1}, 'no train'),
        ({'a': 3}, "one class, 'a'"),
        ({'a': 0, 'b': 0}, 'has no images'),
        ({'train/a': 1, 'train/b': 1, 'val/a': 0}, 'val.*has no images'),
        ({}, 'is not a directory'),
    ],
)
def test_folders_of_another_form_are_refused(fill, data_dir, counts, message):
    with pytest.raises(DataError, match=message):
        prepare_folder(fill(counts), 'letters', data_dir)
    assert not os.path.exists(data_dir)


def test_a_class_that_is_damaged_altogether_is_refused(fill, data_dir):
    root = fill({'a': 2, 'b': 1})
    (root / 'b' / '0.png').write_bytes(b'')
    with pytest.raises(DataError, match='no readable image of b'):
        prepare_folder(root, 'letters', data_dir, skip_damaged=True)


@pytest.mark.parametrize('name', ['', 'Pets', 'my pets', '../pets', '1st', 'cifar10', 'digits'])
def test_names_that_cannot_be_used(fill, data_dir, name):
    with pytest.raises(ConfigError, match=repr(name)):
        prepare_folder(fill({'a': 1, 'b': 1}), name, data_dir)


@pytest.mark.parametrize('fraction', [-0.1, 1.0, float('nan')])
def test_fractions_that_cannot_be_used(fill, data_dir, fraction):
    with pytest.raises(ConfigError, match='test_fraction'):
        prepare_folder(fill({'a': 1, 'b': 1}), 'letters', data_dir, test_fraction=fraction)


def test_an_existing_set_is_replaced_only_on_demand(fill, data_dir):
    root = fill({'a': 2, 'b': 2})
    prepare_folder(root, 'letters', data_dir)
    fill({'c': 2})
    with pytest.raises(ConfigError, match=r'already in .*overwrite'):
        prepare_folder(root, 'letters', data_dir)
    assert load_source('letters', 'train', data_dir).num_classes == 2
    prepare_folder(root, 'letters', data_dir, overwrite=True)
    assert load_source('letters', 'train', data_dir).num_classes == 3
    assert os.listdir(data_dir) == ['letters']
    assert os.listdir(f'{data_dir}/letters') == ['1.0.0']


def test_a_stranger_in_the_place_is_not_overwritten(fill, data_dir):
    os.makedirs(f'{data_dir}/letters/precious')
    with pytest.raises(ConfigError, match='no prepared folder'):
        prepare_folder(fill({'a': 1, 'b': 1}), 'letters', data_dir, overwrite=True)
    assert os.path.isdir(f'{data_dir}/letters/precious')


def test_a_failure_keeps_the_old_set_and_leaves_nothing(fill, data_dir, monkeypatch):
    root = fill({'a': 2, 'b': 2})
    prepare_folder(root, 'letters', data_dir)
    expected = contents('letters', 'train', data_dir)

    def fail(self, **options):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(records.ImageSet, 'download_and_prepare', fail)
    with pytest.raises(DataError, match='no space left'):
        prepare_folder(root, 'letters', data_dir, overwrite=True)
    assert contents('letters', 'train', data_dir) == expected
    assert os.listdir(data_dir) == ['letters']


def test_the_screen_stays_clean(fill, data_dir, capfd):
    prepare_folder(fill({'a': 2, 'b': 2}), 'letters', data_dir)
    assert capfd.readouterr() == ('', '')


def test_a_place_that_cannot_be_written(fill, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(DataError, match='cannot write'):
        prepare_folder(fill({'a': 1, 'b': 1}), 'letters', str(tmp_path / 'file'))
