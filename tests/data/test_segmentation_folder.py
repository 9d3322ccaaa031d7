"""Preparing a folder of images and label maps, and what is refused or left out."""

import io
import os
import tracemalloc

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from gcnet_jax.data import records
from gcnet_jax.data.segmentation_files import find_pairs, open_folder
from gcnet_jax.data.segmentation_folder import _examples, check_pairs, prepare_segmentation
from gcnet_jax.data.segmentation_sources import load_segmentation
from gcnet_jax.data.sources import load_source
from gcnet_jax.errors import ConfigError, DataError
from tests.data import crafted_images as crafted
from tests.data.segmentation_folders import fill, image_of, labels_of, palette_png, png

NAMES = ('road', 'sky', 'tree')


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / 'folder'
    fill(folder, {'train': 4, 'val': 2})
    return folder


@pytest.fixture
def data_dir(tmp_path):
    return str(tmp_path / 'sets')


def stored(name, split, data_dir):
    """Returns the bytes of a split, and the file each pair comes from."""
    source = load_segmentation(name, split, data_dir)
    examples = [source[index] for index in range(len(source))]
    return {(example['image'], example['label']) for example in examples}


def files(root, split):
    images = sorted((root / 'images' / split).iterdir())
    labels = sorted((root / 'labels' / split).iterdir())
    return {(a.read_bytes(), b.read_bytes()) for a, b in zip(images, labels, strict=True)}


def test_a_folder_becomes_a_set_with_the_files_as_they_are(root, data_dir):
    prepared = prepare_segmentation(root, 'streets', data_dir, label_names=NAMES)
    assert prepared.split_sizes == {'train': 4, 'validation': 2}
    assert prepared.label_names == NAMES
    assert prepared.are_named
    assert prepared.damaged == ()
    assert prepared.train_settings(16) == ('data.name=streets', 'training.batch_size=2')
    assert stored('streets', 'train', data_dir) == files(root, 'train')
    assert stored('streets', 'validation', data_dir) == files(root, 'val')
    source = load_segmentation('streets', 'train', data_dir)
    assert source.label_names == NAMES
    for index in range(4):
        number = number_of(source, index)
        np.testing.assert_array_equal(source.label_map(index), labels_of(number))
        assert f'images/train/{number:03}.png' in source.describe(index)


def number_of(source, index):
    """Returns the number of an image of `fill`, from its colour."""
    with Image.open(io.BytesIO(source[index]['image'])) as image:
        return int(np.asarray(image)[0, 0, 0])


def test_tfds_itself_reads_it(root, data_dir):
    prepare_segmentation(root, 'streets', data_dir, label_names=NAMES)
    builder = tfds.builder('streets', data_dir=data_dir)
    assert builder.info.supervised_keys == ('image', 'label')
    assert tuple(builder.info.features['label'].names) == NAMES
    for example in builder.as_data_source('train'):
        number = int(example['image'][0, 0, 0])
        if number % 2 == 0:  # Of a palette TFDS returns the colours.
            np.testing.assert_array_equal(example['label'][..., 0], labels_of(number))


def test_pixels_are_counted(root, data_dir):
    prepared = prepare_segmentation(root, 'streets', data_dir, label_names=NAMES)
    counts = np.bincount(np.concatenate([labels_of(n).ravel() for n in range(4)]), minlength=256)
    assert prepared.pixels == tuple(counts)
    shares, ignored = prepared.shares()
    assert shares == pytest.approx(counts[:3] / counts.sum())
    assert ignored == pytest.approx(counts[255] / counts.sum())


def test_classes_come_from_the_file_or_from_the_largest_label(root, data_dir):
    labels = labels_of(9)
    labels[5, 5] = 6
    (root / 'labels' / 'val' / '004.png').write_bytes(png(labels))
    prepared = prepare_segmentation(root, 'numbered', data_dir)
    assert prepared.label_names == tuple(f'class {number}' for number in range(7))
    assert not prepared.are_named
    (root / 'classes.txt').write_text('\n'.join('abcdefgh') + '\n')
    assert prepare_segmentation(root, 'read', data_dir).label_names == tuple('abcdefgh')
    given = prepare_segmentation(root, 'given', data_dir, label_names=list('ABCDEFG'))
    assert given.label_names == tuple('ABCDEFG')


def test_the_zero_label_is_reduced_in_what_is_stored(root, data_dir):
    prepared = prepare_segmentation(
        root, 'scenes', data_dir, label_names=NAMES[:2], reduce_zero_label=True
    )
    source = load_segmentation('scenes', 'train', data_dir)
    assert not source.reduce_zero_label
    for index in range(4):
        labels = labels_of(number_of(source, index)).astype(int)
        expected = np.where((labels == 0) | (labels == 255), 255, labels - 1)
        np.testing.assert_array_equal(source.label_map(index), expected)
    assert prepared.pixels[0] > 0
    assert prepared.pixels[2] == 0


def spoil(root):
    """Makes one file of each kind that cannot be used; returns what is said of it."""
    fill(root, {'train': 14})
    place = root / 'labels' / 'train'
    (place / '000.png').unlink()
    (root / 'images' / 'train' / '001.png').unlink()
    (place / '002.png').write_bytes(png(labels_of(2, 7, 8)))
    (place / '003.png').write_bytes(png(labels_of(3))[:60])
    (place / '004.png').write_bytes(png(image_of(4)))
    (place / '005.png').write_bytes(b'')
    (place / '006.png').unlink()
    (place / '006.png').mkdir()
    (place / '007.png').write_bytes(png(np.full((6, 8), 9, np.uint8)))
    (root / 'images' / 'train' / '008.png').write_bytes(png(image_of(8))[:40])
    (place / '009.png').write_bytes(crafted.png(2**30, 2**30, colour=0))
    (place / '010.png').unlink()
    os.mkfifo(place / '010.png')
    return [
        'images/train/000.png (an image without a label map)',
        'labels/train/001.png (a label map without an image)',
        'images/train/006.png (an image without a label map)',
        'images/train/002.png (the image has 8 x 6 pixels and its label map 8 x 7; they must',
        'labels/train/003.png (label map: damaged PNG image',
        'labels/train/004.png (label map: is a PNG in RGB of 8 bits per value',
        'labels/train/005.png (label map: is no image; a label map is',
        'labels/train/007.png (label map: 48 pixels have a label that is no class, up to 9; labels',
        'images/train/008.png (damaged PNG image',
        'labels/train/009.png (label map: image of 1073741824x1073741824 pixels, more than',
        'labels/train/010.png (not a file)',
    ]


def test_files_that_cannot_be_used_are_refused_by_name(root, data_dir):
    expected = spoil(root)
    with pytest.raises(DataError, match=r'^11 files in .* cannot be used: ') as raised:
        prepare_segmentation(root, 'streets', data_dir, label_names=NAMES)
    message = str(raised.value)
    assert '\n' not in message
    assert 'and 6 more; ' in message
    assert '--skip-damaged' in message
    assert expected[0] in message
    assert not os.path.exists(os.path.join(data_dir, 'streets'))


def test_they_can_be_left_out_and_are_named(root, data_dir):
    expected = spoil(root)
    prepared = prepare_segmentation(root, 'streets', data_dir, label_names=NAMES, skip_damaged=True)
    assert prepared.split_sizes == {'train': 3, 'validation': 2}
    assert len(prepared.damaged) == len(expected)
    for problem, beginning in zip(prepared.damaged, expected, strict=True):
        assert problem.startswith(beginning)
        assert '\n' not in problem
    assert len(stored('streets', 'train', data_dir)) == 3


def test_nothing_left_of_a_split_is_an_error(root, data_dir):
    for file in (root / 'labels' / 'val').iterdir():
        file.write_bytes(b'no PNG')
    with pytest.raises(DataError, match=r"^validation of '.*' has no image with a label map"):
        prepare_segmentation(root, 'streets', data_dir, label_names=NAMES, skip_damaged=True)


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ([0, 255], r'no label but 0 and 255, and two classes are needed.* write that as 1\)'),
        ([255, 255], 'no label but 255, and'),
        ([0, 0], 'no label but 0, and'),
    ],
)
def test_one_class_is_too_few(values, message, root, data_dir):
    for split in ('train', 'val'):
        for file in (root / 'labels' / split).iterdir():
            file.write_bytes(palette_png(np.resize(np.array(values, np.uint8), (6, 8))))
    with pytest.raises(DataError, match=message):
        prepare_segmentation(root, 'streets', data_dir)


def test_names_of_sets_are_checked_first(root, data_dir):
    with pytest.raises(ConfigError, match='cannot name a data set'):
        prepare_segmentation('/absent', 'My Streets', data_dir)
    prepare_segmentation(root, 'streets', data_dir)
    with pytest.raises(ConfigError, match='is already in'):
        prepare_segmentation(root, 'streets', data_dir)
    fill(root, {'train': 6})
    again = prepare_segmentation(root, 'streets', data_dir, overwrite=True)
    assert again.split_sizes['train'] == 6
    assert len(load_segmentation('streets', 'train', data_dir)) == 6


def test_a_test_split_without_labels_is_left_out_and_counted(root, data_dir):
    (root / 'images' / 'test').mkdir()
    for number in range(3):
        (root / 'images' / 'test' / f'{number}.png').write_bytes(png(image_of(number)))
    prepared = prepare_segmentation(root, 'streets', data_dir)
    assert prepared.unlabelled == 3
    assert prepared.split_sizes == {'train': 4, 'validation': 2}


def test_a_failure_leaves_nothing_behind(root, data_dir, monkeypatch):
    def fail(*unused, **options):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(records.ImageSet, 'download_and_prepare', fail)
    with pytest.raises(DataError, match='no space left'):
        prepare_segmentation(root, 'streets', data_dir)
    assert os.listdir(data_dir) == []


def test_memory_does_not_grow_with_the_set(tmp_path):
    rng = np.random.default_rng(0)
    fill(tmp_path, {'train': 30})
    for number, file in enumerate((tmp_path / 'images' / 'train').iterdir()):
        file.write_bytes(png(rng.integers(0, 256, (300, 300, 3), dtype=np.uint8)))
        labels = png(labels_of(number, 300, 300))
        (tmp_path / 'labels' / 'train' / file.name).write_bytes(labels)
    folder = open_folder(tmp_path)
    pairs = find_pairs(folder, 'train').pairs
    assert sum(file.stat().st_size for pair in pairs for file in pair) > 8_000_000
    tracemalloc.start()
    checked = check_pairs(folder.root, pairs, NAMES)
    for _, example in _examples(folder.root, pairs, 3, reduce_zero_label=False):
        assert len(example) == 3
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not checked.problems
    assert checked.counts.sum() == 30 * 300 * 300
    assert peak < 4_000_000


def test_it_is_no_classification_set(root, data_dir):
    prepare_segmentation(root, 'streets', data_dir)
    with pytest.raises(DataError, match="'streets' is no image classification set"):
        load_source('streets', 'train', data_dir)
