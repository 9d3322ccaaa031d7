"""Preparing a folder of images, and reading it back by its name."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from gcnet_jax.data import records
from gcnet_jax.data.folder import PreparedFolder, prepare_folder
from gcnet_jax.data.sources import default_split, load_source
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


@pytest.mark.parametrize(
    ('names', 'message'),
    [
        (['cat\ndog', 'b'], r"'cat\\ndog' cannot name a class: it contains a line break"),
        (['cat\rdog', 'b'], r"'cat\\rdog' .* line break"),
        (['cat\x85dog', 'b'], r"'cat\\x85dog' .* line break"),
        (['cat\u2028dog', 'b'], r"'cat\\u2028dog' .* line break"),
        (['\x1b[31mcat', 'b'], r"'\\x1b\[31mcat' .* control character"),
        ([' ', 'b'], r"' ' cannot name a class: it is blank"),
        (['\u3000', 'b'], r"'\\u3000' cannot name a class: it is blank"),
        (['\ufeff', 'b'], 'it is blank'),
        (['\u200b', 'b'], 'it is blank'),
        (['cat ', 'b'], r"'cat ' .* begins or ends with a blank"),
        (['\xa0cat', 'b'], r"'\\xa0cat' .* begins or ends with a blank"),
        (['\ufeffcat', 'b'], r"'\\ufeffcat' .* begins or ends with a blank"),
        (['sea lion', 'sea  lion'], r"'sea  lion' and 'sea lion' differ only in blanks"),
        (['sea lion', 'sea\xa0lion'], 'differ only in blanks'),
        (['cafe\u0301', 'caf\xe9'], 'how their letters are encoded'),
        ([os.fsdecode(b'caf\xe9'), 'b'], r"'caf\\udce9' cannot name a class: it is not UTF-8"),
    ],
)
def test_class_names_that_label_files_cannot_keep_are_refused(fill, data_dir, names, message):
    root = fill(dict.fromkeys(names, 1))
    with pytest.raises(DataError, match=message) as caught:
        prepare_folder(root, 'letters', data_dir)
    assert str(caught.value).isprintable()
    assert not os.path.exists(data_dir)
    # In a split other than train as well.
    root = fill(
        {'train/a': 1, 'train/b': 1, f'val/{names[0]}': 1, f'val/{names[1]}': 1}, root / 'x'
    )
    with pytest.raises(DataError, match=message):
        prepare_folder(root, 'letters', data_dir)


def test_unusual_class_names_are_kept(fill, data_dir):
    names = ('Sea lion', 'sea lion', '日本', 'a, b', '#1', "d'or", '🐈\u200d⬛', '  '.join('ab'))
    names = tuple(sorted(names))
    prepare_folder(fill(dict.fromkeys(names, 2)), 'letters', data_dir, test_fraction=0)
    source = load_source('letters', 'train', data_dir)
    assert source.label_names == names
    assert {source[index]['label'] for index in range(len(source))} == set(range(len(names)))


def test_file_names_that_are_no_utf8_are_copied_faithfully(fill, data_dir, make):
    root = fill({'train/a': 1, 'train/b': 1})
    name = os.fsdecode(b'caf\xe9\n.png')
    (root / 'train' / 'a' / '0.png').rename(root / 'train' / 'a' / name)
    prepare_folder(root, 'letters', data_dir, test_fraction=0)
    assert contents('letters', 'train', data_dir) == files(root, 'train')
    source = load_source('letters', 'train', data_dir)
    stored = {bytes(source._read(index)['file_name'].bytes_list.value[0]) for index in range(2)}
    assert stored == {b'train/a/caf\xe9\n.png', b'train/b/0.png'}
    described = [source.describe(index) for index in range(2)]
    assert all(text.isprintable() for text in described)
    (root / 'train' / 'a' / name).write_bytes(b'damaged')
    with pytest.raises(DataError, match=r'caf\\udce9\\n\.png') as caught:
        prepare_folder(root, 'letters', data_dir, overwrite=True)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ('train', 'others'),
    [
        ('train', {'val': 'validation', 'test': 'test'}),
        ('Train', {'Test': 'test'}),
        ('TRAIN', {'VAL': 'validation'}),
        ('training', {'validation': 'validation', 'testing': 'test'}),
        ('Training', {'Valid': 'validation'}),
        ('flowers/train', {'flowers/test': 'test'}),
        ('flowers/flowers/Train', {'flowers/flowers/Test': 'test'}),
        ('train/train', {'test/test': 'test'}),
        ('.', {}),
        ('flowers', {}),
        ('flowers/flowers', {}),
        ('train', {}),
    ],
)
def test_layouts_that_archives_have(fill, data_dir, train, others):
    folders = {f'{train}/{label}': 4 for label in 'ab'}
    folders |= {f'{folder}/{label}': 2 for folder in others for label in 'ab'}
    root = fill(folders | {'__MACOSX/flowers/train': 2, '.git/a': 1})
    for place in (root, root / 'flowers', root / 'train'):
        if place.is_dir():
            (place / '.DS_Store').write_bytes(b'x')
            (place / 'Thumbs.db').write_bytes(b'x')
            (place / 'README.txt').write_bytes(b'x')
    (root / train / 'a' / 'Thumbs.db').write_bytes(b'x')
    (root / train / 'a' / 'desktop.ini').write_bytes(b'x')
    result = prepare_folder(root, 'letters', data_dir, test_fraction=0.25 if not others else 0.1)
    assert result.label_names == ('a', 'b')
    assert result.split_sizes['train'] == (8 if others else 6)
    assert {key: size for key, size in result.split_sizes.items() if key != 'train'} == (
        dict.fromkeys(others.values(), 4) if others else {'test': 2}
    )
    assert (result.damaged, result.empty) == ((), ())


def test_a_folder_in_each_class_may_hold_the_images(fill, data_dir):
    root = fill({'train/a/images': 2, 'train/b/images': 3})
    result = prepare_folder(root, 'letters', data_dir, test_fraction=0)
    assert result.split_sizes == {'train': 5}


def test_classes_may_be_called_like_splits(fill, data_dir):
    result = prepare_folder(fill({'train': 2, 'bus': 2, 'plane': 2}), 'traffic', data_dir)
    assert result.label_names == ('bus', 'plane', 'train')


@pytest.mark.parametrize(
    'counts',
    [
        {'train/a': 1, 'train/b': 1, 'test': 3},
        {'train/a': 1, 'train/b': 1, 'models': 3},
        {'train/a': 1, 'train/b': 1, 'Train2/b': 3},
        {'animals/cat': 2, 'animals/dog': 2, 'plants/rose': 2, 'plants/fern': 2},
    ],
)
def test_advice_keeps_the_users_data(fill, data_dir, counts):
    with pytest.raises(DataError) as caught:
        prepare_folder(fill(counts), 'letters', data_dir)
    assert not re.search('remove|delete', str(caught.value))
    assert re.search('links|skip_damaged', str(caught.value))


def test_empty_classes_are_named(fill, data_dir):
    root = fill({'train/a': 2, 'train/b': 2, 'train/c': 0, 'val/a': 1, 'val/b': 0})
    result = prepare_folder(root, 'letters', data_dir)
    assert result.label_names == ('a', 'b')
    assert result.empty == ('train/c', 'val/b')


def test_ninety_images_with_validation_are_trained_on_with_the_settings(fill, data_dir):
    counts = {f'{split}/{label}': n for split, n in (('train', 24), ('val', 6)) for label in 'abc'}
    result = prepare_folder(fill(counts), 'letters', data_dir)
    assert result.split_sizes == {'train': 72, 'validation': 18}
    assert result.train_settings() == ('data.name=letters',)
    assert default_split('letters', data_dir, purpose='selection') == 'validation'
    assert load_source('letters', None, data_dir).split == 'validation'


@pytest.mark.parametrize(
    ('images', 'batch_size', 'fitting'),
    [
        *((64, 64, None), (63, 64, 8), (72, 64, None), (60, 64, 8), (33, 64, 8), (31, 64, 4)),
        *((60, 16, None), (15, 16, 2), (7, 64, 2), (2, 64, 2), (1, 64, 1)),
    ],
)
def test_few_images_get_a_batch_size_that_fits(images, batch_size, fitting):
    prepared = PreparedFolder('x', Path(), (), {'train': images, 'test': 1}, ())
    expected = () if fitting is None else (f'training.batch_size={fitting}',)
    assert prepared.train_settings(batch_size) == ('data.name=x', *expected)


def test_the_batch_size_is_that_for_the_part_that_is_trained_on():
    prepared = PreparedFolder('x', Path(), (), {'train': 70}, ())  # Of which 63 are trained on.
    assert prepared.train_settings(64)[-1] == 'training.batch_size=8'
    assert prepared.train_settings(63)[-1] == 'data.evaluation_split=train[90%:]'


def test_settings_name_splits_that_exist(fill, data_dir):
    root = fill({'a': 10, 'b': 10})
    assert prepare_folder(root, 'one', data_dir).train_settings() == ('data.name=one',)
    settings = prepare_folder(root, 'two', data_dir, test_fraction=0).train_settings()
    for setting in settings[1:]:
        assert len(load_source('two', setting.split('=')[1], data_dir)) in (18, 2)


def test_large_files_are_not_read(fill, data_dir):
    root = fill({'a': 2, 'b': 2})
    with (root / 'a' / 'sparse.png').open('wb') as file:
        file.truncate(3_000_000_000)
    with pytest.raises(DataError, match=r'sparse\.png \(3,000,000,000 bytes are more than'):
        prepare_folder(root, 'letters', data_dir)


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
