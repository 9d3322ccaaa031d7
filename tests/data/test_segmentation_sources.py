"""Sets of images with label maps by their names, and plain folders."""

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from gcnet_jax.data import records
from gcnet_jax.data.segmentation_folder import prepare_segmentation
from gcnet_jax.data.segmentation_labels import LABEL_SETS
from gcnet_jax.data.segmentation_sources import (
    is_folder,
    load_segmentation,
    read_segmentation_names,
)
from gcnet_jax.errors import ConfigError, DataError
from tests.data.segmentation_folders import fill, image_of, labels_of, png

NAMES = ('road', 'sky', 'tree')


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / 'folder'
    fill(folder, {'train': 3, 'val': 2})
    return folder


@pytest.fixture
def data_dir(tmp_path):
    return str(tmp_path / 'sets')


def write(name, features, examples, data_dir, description='some', split='train'):
    """Writes a set as TFDS's own builders do, with any features."""

    class AnySet(records.ImageSet, skip_registration=True):
        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                description=description,
                features=tfds.features.FeaturesDict(features),
            )

    def make(data_dir):
        return AnySet(
            name,
            label_names=(),
            splits={split: lambda: ((str(i), example) for i, example in enumerate(examples))},
            data_dir=data_dir,
            description=description,
        )

    records.write_image_set(make, data_dir)


MAP = tfds.features.Image(shape=(None, None, 1), encoding_format='png')
PICTURE = tfds.features.Image()


def examples(key, count=3, add=0):
    return [{'image': png(image_of(n)), key: png(labels_of(n) + add)} for n in range(count)]


@pytest.mark.parametrize('key', ['label', 'annotation', 'segmentation_label', 'segmentation_mask'])
def test_label_maps_of_tfds_are_found_by_their_names(key, data_dir):
    write('rooms', {'image': PICTURE, key: MAP}, examples(key), data_dir)
    source = load_segmentation('rooms', 'train', data_dir, label_names=NAMES)
    assert (source.name, source.split, source.label_names) == ('rooms', 'train', NAMES)
    assert (len(source), source.num_classes) == (3, 3)
    maps = {source.label_map(index).tobytes() for index in range(3)}
    assert maps == {labels_of(number).tobytes() for number in range(3)}
    with pytest.raises(DataError, match="'rooms' does not say what its classes are called: give"):
        load_segmentation('rooms', 'train', data_dir)


def test_a_labeled_image_brings_its_names(data_dir):
    features = {
        'image': PICTURE,
        'anything': tfds.features.LabeledImage(labels=list(NAMES), encoding_format='png'),
        'depth': MAP,
    }
    made = [example | {'depth': png(image_of(0)[..., 0])} for example in examples('anything')]
    write('rooms', features, made, data_dir)
    assert load_segmentation('rooms', 'train', data_dir).label_names == NAMES
    assert read_segmentation_names('rooms', data_dir) == NAMES


def test_sets_whose_labels_are_known(data_dir):
    write(
        'scene_parse150',
        {'image': PICTURE, 'annotation': PICTURE},
        examples('annotation'),
        data_dir,
    )
    source = load_segmentation('scene_parse150', 'train', data_dir)
    assert source.label_names == LABEL_SETS['ade20k'].names
    assert source.reduce_zero_label
    labels = {source.label_map(index).tobytes() for index in range(3)}
    expected = set()
    for number in range(3):
        stored = labels_of(number).astype(int)
        reduced = np.where((stored == 0) | (stored == 255), 255, stored - 1)
        expected.add(reduced.astype(np.uint8).tobytes())
    assert labels == expected
    plain = load_segmentation('scene_parse150', 'train', data_dir, reduce_zero_label=False)
    assert plain.label_map(0).min() == 0


def test_raw_labels_of_cityscapes_are_refused_with_what_to_do(data_dir):
    features = {'image_left': PICTURE, 'segmentation_label': MAP, 'image_id': tfds.features.Text()}
    made = [
        {'image_left': png(image_of(0)), 'segmentation_label': png(labels_of(0)), 'image_id': 'a'}
    ]
    write('cityscapes', features, made, data_dir)
    place = Path(data_dir) / 'cityscapes'
    (place / 'semantic_segmentation').mkdir()
    (place / '1.0.0').rename(place / 'semantic_segmentation' / '1.0.0')
    with pytest.raises(DataError, match=r'raw labels .*prepare --task segmentation DIR --name'):
        load_segmentation('cityscapes/semantic_segmentation', 'train', data_dir)


def test_other_sets_are_refused_by_what_they_have(data_dir):
    write('photos', {'image': PICTURE}, [{'image': png(image_of(0))}], data_dir)
    with pytest.raises(DataError, match=r"'photos' is no segmentation set: .* has image \(Image\)"):
        load_segmentation('photos', 'train', data_dir)
    with pytest.raises(DataError, match="'photos' is no segmentation set"):
        read_segmentation_names('photos', data_dir)


def test_damaged_maps_name_the_record(data_dir):
    made = examples('label')
    made[0]['label'] = png(image_of(0))
    made[1]['label'] = png(labels_of(0) + 7)
    made[2]['image'] = b''
    features = {'image': PICTURE, 'label': MAP}
    for number, message in enumerate(['is a PNG in RGB', 'label that is no class', 'has no image']):
        write(f'set{number}', features, [made[number]], data_dir)
        with pytest.raises(
            DataError, match=rf"^record 0 of 'set{number}' split 'train'.*{message}"
        ) as raised:
            load_segmentation(f'set{number}', 'train', data_dir, label_names=NAMES).label_map(0)
        assert str(raised.value).count('record 0') == 1


def test_parts_of_splits_and_default_splits(root, data_dir):
    prepare_segmentation(root, 'streets', data_dir, label_names=NAMES)
    assert len(load_segmentation('streets', 'train[:2]', data_dir)) == 2
    for purpose in ('selection', 'evaluation'):
        assert load_segmentation('streets', None, data_dir, purpose=purpose).split == 'validation'
    with pytest.raises(DataError, match="has no split 'tset'; it has train"):
        load_segmentation('streets', 'tset', data_dir)
    with pytest.raises(ConfigError, match="unknown purpose of a split 'fun'"):
        load_segmentation('streets', None, data_dir, purpose='fun')
    with pytest.raises(DataError, match="unknown data set 'street'; did you mean 'streets'"):
        load_segmentation('street', None, data_dir)


def test_a_folder_is_read_as_it_is(root):
    (root / 'classes.txt').write_text('\n'.join(NAMES))
    source = load_segmentation(root, 'train')
    assert (source.split, source.label_names, len(source)) == ('train', NAMES, 3)
    for index in range(3):
        with Image.open(io.BytesIO(source[index]['image'])) as image:
            np.testing.assert_array_equal(np.asarray(image), image_of(index))
        np.testing.assert_array_equal(source.label_map(index), labels_of(index))
    assert source.describe(1) == f"images/train/001.png of '{root}'"
    for split in (None, 'val', 'validation', 'VAL'):
        assert load_segmentation(str(root), split).split == 'validation'
    assert read_segmentation_names(root) == NAMES
    with pytest.raises(IndexError, match='has no record 3'):
        source[3]


def test_a_folder_without_names_gets_those_of_all_splits(root):
    labels = labels_of(0)
    labels[4, 4] = 4
    (root / 'labels' / 'train' / '000.png').write_bytes(png(labels))
    for split in ('train', 'val'):
        assert load_segmentation(root, split).label_names == tuple(f'class {n}' for n in range(5))
    assert load_segmentation(root, 'val', label_names=NAMES).label_names == NAMES
    reduced = load_segmentation(root, 'train', reduce_zero_label=True)
    assert reduced.num_classes == 4
    assert reduced.label_map(0)[4, 4] == 3


def test_folders_that_cannot_be_used(root):
    with pytest.raises(DataError, match=r"unknown split of '.*' 'tset'"):
        load_segmentation(root, 'tset')
    with pytest.raises(DataError, match=r'parts of a split need a prepared set'):
        load_segmentation(root, 'train[:90%]')
    (root / 'labels' / 'val' / '003.png').unlink()
    with pytest.raises(
        DataError, match=r"^1 file of '.*' split 'validation' .*images/val/003\.png"
    ):
        load_segmentation(root)
    source = load_segmentation(root, 'train')
    (root / 'images' / 'train' / '001.png').unlink()
    with pytest.raises(DataError, match=r'001\.png cannot be read \(no such file\)'):
        source[1]
    for split in ('images', 'labels'):
        for file in (root / split / 'val').iterdir():
            file.unlink()
        (root / split / 'val').rmdir()
    with pytest.raises(DataError, match=r'has no split to evaluate on beside train; it needs'):
        load_segmentation(root)


def test_what_counts_as_a_folder(root, monkeypatch):
    monkeypatch.chdir(root.parent)
    absent = ('/absent', './absent', '~/absent')
    for name in (root, str(root), './folder', 'folder/', '.', '../' + root.parent.name, *absent):
        assert is_folder(name), name
    for name in ('folder', 'voc/2012', 'absent', 'voc:1.0.0'):
        assert not is_folder(name), name
    with pytest.raises(DataError, match=r"^'/absent' is not a directory"):
        load_segmentation('/absent')


def test_sources_can_be_pickled(root, data_dir):
    prepare_segmentation(root, 'streets', data_dir, label_names=NAMES)
    for source in (load_segmentation('streets', 'train', data_dir), load_segmentation(root, 'val')):
        again = pickle.loads(pickle.dumps(source))
        assert again[1] == source[1]
        assert again.describe(1) == source.describe(1)
        assert again.label_names == source.label_names
