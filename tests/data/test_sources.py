"""Sources by name: what they read, what they refuse, and that TensorFlow stays out."""

import functools
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from gcnet_jax.data import records, sources
from gcnet_jax.data.decode import decode
from gcnet_jax.data.sources import default_split, load_source, read_label_names
from gcnet_jax.errors import ConfigError, DataError


class AnySet(records.ImageSet, skip_registration=True):
    """An image set with other features than ours."""

    def __init__(self, features, examples, data_dir, supervised_keys=None):
        self._features, self._supervised = features, supervised_keys
        super().__init__(
            'any_set',
            label_names=(),
            splits={'train': lambda: list(enumerate(examples))},
            data_dir=str(data_dir),
            description='',
        )

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(self._features),
            supervised_keys=self._supervised,
        )


def prepare(builder):
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
    return str(builder.data_dir)


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    """Holds a set `greys` of 10 train and 4 test images, image i all of grey i."""
    place = tmp_path_factory.mktemp('tfds')

    def examples(numbers):
        import io

        from PIL import Image

        for number in numbers:
            data = io.BytesIO()
            Image.new('L', (4, 4), number).save(data, 'PNG')
            label = ('low', 'high')[number % 2]
            yield str(number), {'image': data.getvalue(), 'label': label, 'file_name': f'{number}'}

    prepare(
        records.ImageSet(
            'greys',
            label_names=('low', 'high'),
            splits={'train': lambda: examples(range(10)), 'test': lambda: examples(range(10, 14))},
            data_dir=str(place),
            description='',
        )
    )
    return str(place)


@pytest.fixture
def with_splits(tmp_path, make):
    """A function that prepares a set `any_set` of given splits, each with one label or none."""

    def write(**labels):
        image = make.encode(np.zeros((4, 4), np.uint8))
        features = {
            'image': tfds.features.Image(),
            'label': tfds.features.ClassLabel(names=('a', 'b')),
        }
        builder = AnySet(features, [], tmp_path)
        builder._splits = {
            split: functools.partial(enumerate, [{'image': image, 'label': label}] * 2)
            for split, label in labels.items()
        }
        prepare(builder)
        return str(tmp_path)

    return write


@pytest.mark.parametrize(
    ('splits', 'selection', 'evaluation'),
    [
        ({'test': 1}, 'test', 'test'),
        ({'validation': 1}, 'validation', 'validation'),
        ({'validation': 1, 'test': 0}, 'validation', 'test'),
        ({'validation': 1, 'test': -1}, 'validation', 'validation'),  # ImageNet's has no labels.
    ],
)
def test_the_split_to_measure_on_is_one_that_exists(with_splits, splits, selection, evaluation):
    place = with_splits(train=0, **splits)
    assert default_split('any_set', place, purpose='selection') == selection
    assert default_split('any_set', place, purpose='evaluation') == evaluation
    assert load_source('any_set', None, place).split == evaluation
    assert load_source('any_set', None, place, purpose='selection').split == selection


def test_without_such_a_split_a_part_of_train_is_advised(with_splits):
    place = with_splits(train=0)
    with pytest.raises(DataError, match=r"no labelled split .*train \(2\).*'train\[90%:\]'"):
        default_split('any_set', place)
    with pytest.raises(ConfigError, match="unknown purpose of a split 'selektion'"):
        default_split('any_set', place, purpose='selektion')


def greys(source):
    return [int(decode(source[index]['image'])[0, 0, 0]) for index in range(len(source))]


def test_a_split_holds_each_of_its_examples_once(data_dir):
    train, test = (load_source('greys', split, data_dir) for split in ('train', 'test'))
    assert sorted(greys(train)) == list(range(10))
    assert sorted(greys(test)) == [10, 11, 12, 13]
    for source in (train, test):
        labels = [source[index]['label'] for index in range(len(source))]
        assert labels == [grey % 2 for grey in greys(source)]
        assert isinstance(source[0]['image'], bytes)
        assert isinstance(source[0]['label'], int)
    assert train.label_names == ('low', 'high')
    assert train.num_classes == 2
    assert (train.name, train.split) == ('greys', 'train')


def test_sub_splits(data_dir):
    whole = greys(load_source('greys', 'train', data_dir))
    assert greys(load_source('greys', 'train[:90%]', data_dir)) == whole[:9]
    assert greys(load_source('greys', 'train[90%:]', data_dir)) == whole[9:]
    assert greys(load_source('greys', 'train[2:5]', data_dir)) == whole[2:5]
    test = greys(load_source('greys', 'test', data_dir))
    assert greys(load_source('greys', 'train+test', data_dir)) == whole + test
    assert greys(load_source('greys', 'test[1:3]+train[:2]', data_dir)) == test[1:3] + whole[:2]


def test_a_source_survives_pickling(data_dir):
    source = load_source('greys', 'train[3:]', data_dir)
    copy = pickle.loads(pickle.dumps(source))
    assert greys(copy) == greys(source)
    assert copy.describe(2) == source.describe(2)


def test_a_record_is_described_with_its_file(data_dir):
    source = load_source('greys', 'test', data_dir)
    assert source.describe(1) == f"record 1 of 'greys' split 'test' ({greys(source)[1]})"


def test_indices_beyond_the_end_are_refused(data_dir):
    source = load_source('greys', 'test', data_dir)
    for index in (-1, 4):
        with pytest.raises(IndexError, match=f'no record {index}'):
            source[index]


@pytest.mark.parametrize(
    'split', ['tain', 'train[:200%]', 'train[a:]', '', 'train[5]', 'train[:99]']
)
def test_a_wrong_split_lists_the_splits(data_dir, split):
    with pytest.raises(
        DataError, match=r"'greys' has no split .*train \(10\), test \(4\)"
    ) as caught:
        load_source('greys', split, data_dir)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('split', ['train[:0]', 'train[5:5]', 'test[3:1]'])
def test_an_empty_split_is_refused(data_dir, split):
    with pytest.raises(DataError, match='is empty'):
        load_source('greys', split, data_dir)


def test_unknown_names_get_the_nearest(data_dir):
    with pytest.raises(DataError, match=r"unknown data set 'cifa10'; did you mean 'cifar10'"):
        load_source('cifa10', 'train', data_dir)
    with pytest.raises(DataError, match=r"did you mean .*'greys'"):
        load_source('grays', 'train', data_dir)
    advice = r"unknown data set 'qqqq'.*gcnet_jax prepare FOLDER .*--task segmentation or detection"
    with pytest.raises(DataError, match=advice) as caught:
        load_source('qqqq', 'train', data_dir)
    assert len(str(caught.value)) < 400  # Not a list of everything.
    for name in ('a b', ''):
        with pytest.raises(DataError, match='cannot be opened'):
            load_source(name, 'train', data_dir)


def test_a_set_that_is_not_prepared_says_how(data_dir):
    with pytest.raises(DataError, match='not prepared') as caught:
        load_source('cifar10', 'train', data_dir)
    message = str(caught.value)
    assert 'pip install tensorflow-cpu' in message
    code = message.split('python -c "')[1].rstrip('"')
    assert f"builder('cifar10', file_format='array_record', data_dir='{data_dir}')" in code
    compile(code, 'command', 'exec')


def test_a_set_that_is_downloaded_by_hand_says_what_goes_where(tmp_path):
    with pytest.raises(DataError, match='downloaded by hand') as caught:
        load_source('imagenet2012', 'train', str(tmp_path))
    message = str(caught.value)
    assert f'{tmp_path}/downloads/manual' in message
    assert 'ILSVRC2012_img_train.tar' in message
    assert message.isprintable()
    assert 'pip install tensorflow-cpu' in message


def test_a_data_dir_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match='is not a directory'):
        load_source('greys', 'train', str(tmp_path / 'nowhere'))


def test_the_default_place_is_tfds_own(data_dir, monkeypatch):
    monkeypatch.setattr(tfds.core.constants, 'DATA_DIR', data_dir)
    assert len(load_source('greys', 'train')) == 10


def test_another_file_format_says_how_to_convert(data_dir, tmp_path):
    import shutil

    place = tmp_path / 'greys'
    shutil.copytree(f'{data_dir}/greys', place)
    info = place / '1.0.0' / 'dataset_info.json'
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(DataError, match='tfrecord') as caught:
        load_source('greys', 'train', str(tmp_path))
    assert (
        f'tfds convert_format --dataset_version_dir={place}/1.0.0 --out_file_format=array_record'
        in str(caught.value)
    )


def test_missing_and_damaged_files_are_named(data_dir, tmp_path):
    import shutil

    place = tmp_path / 'greys'
    shutil.copytree(f'{data_dir}/greys', place)
    (train,) = (place / '1.0.0').glob('greys-train*')
    whole = train.read_bytes()
    train.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match='damaged'):
        load_source('greys', 'train', str(tmp_path))
    train.unlink()
    with pytest.raises(DataError, match=train.name):
        load_source('greys', 'train', str(tmp_path))
    assert len(load_source('greys', 'test', str(tmp_path))) == 4
    (place / '1.0.0' / 'dataset_info.json').write_text('{')
    with pytest.raises(DataError, match='cannot be opened'):
        load_source('greys', 'test', str(tmp_path))


def test_damaged_records_are_errors(make):
    good = make.serialize(b'image', 0)
    source = sources.Source('some', 'train', ('a',), [good, good[:-3], b'', b'\xff' * 9])
    assert source[0] == {'image': b'image', 'label': 0}
    for index in (1, 2, 3):
        with pytest.raises(DataError, match=f'record {index} of .*damaged'):
            source[index]


@pytest.mark.parametrize('label', [-1, 1])
def test_an_absent_label_is_an_error(make, label):
    source = sources.Source('some', 'test', ('a',), [make.serialize(b'image', label)])
    with pytest.raises(DataError, match=f'record 0 .* label {label}'):
        source[0]


def test_an_unlabelled_split_is_refused_when_it_is_loaded(make, tmp_path):
    features = {'image': tfds.features.Image(), 'label': tfds.features.ClassLabel(num_classes=2)}
    image = make.encode(np.zeros((2, 2), np.uint8))
    prepare(AnySet(features, [{'image': image, 'label': -1}], tmp_path))
    with pytest.raises(DataError, match='stands for no label'):
        load_source('any_set', 'train', str(tmp_path))


def test_the_features_may_have_any_name(make, tmp_path):
    features = {
        'picture': tfds.features.Image(),
        'kind': tfds.features.ClassLabel(names=['x', 'y']),
        'note': tfds.features.Text(),
    }
    image = make.encode(np.zeros((2, 2), np.uint8))
    prepare(AnySet(features, [{'picture': image, 'kind': 'y', 'note': 'n'}], tmp_path))
    source = load_source('any_set', 'train', str(tmp_path))
    assert source[0] == {'image': image, 'label': 1}
    assert source.describe(0) == "record 0 of 'any_set' split 'train'"


def test_two_label_features_are_told_apart_by_the_supervised_keys(make, tmp_path):
    features = {
        'image': tfds.features.Image(),
        'coarse': tfds.features.ClassLabel(num_classes=2),
        'fine': tfds.features.ClassLabel(num_classes=5),
    }
    example = {'image': make.encode(np.zeros((2, 2), np.uint8)), 'coarse': 1, 'fine': 4}
    prepare(AnySet(features, [example], tmp_path / 'keys', ('image', 'fine')))
    source = load_source('any_set', 'train', str(tmp_path / 'keys'))
    assert source[0]['label'] == 4
    assert source.label_names == ('0', '1', '2', '3', '4')
    prepare(AnySet(features, [example], tmp_path / 'none'))
    with pytest.raises(DataError, match=r'needs one Image .*coarse \(ClassLabel\)'):
        load_source('any_set', 'train', str(tmp_path / 'none'))


def test_a_set_without_labels_is_refused(make, tmp_path):
    features = {'image': tfds.features.Image(), 'caption': tfds.features.Text()}
    image = make.encode(np.zeros((2, 2), np.uint8))
    prepare(AnySet(features, [{'image': image, 'caption': ''}], tmp_path))
    with pytest.raises(DataError, match=r'no image classification set.*caption \(Text\)'):
        load_source('any_set', 'train', str(tmp_path))


def test_tensorflow_is_never_imported_where_it_is_installed(tmp_path):
    (tmp_path / 'tensorflow').mkdir()
    (tmp_path / 'tensorflow' / '__init__.py').write_text('raise AssertionError("imported")')
    script = f"""
import importlib.util, sys
sys.path.insert(0, {str(tmp_path)!r})
assert importlib.util.find_spec('tensorflow').origin.startswith({str(tmp_path)!r})
from PIL import Image
from gcnet_jax.data.folder import prepare_folder
from gcnet_jax.data.loader import evaluation_batches, train_batches
from gcnet_jax.data.sources import load_source
for label in 'ab':
    for index in range(5):
        path = __import__('pathlib').Path({str(tmp_path)!r}, 'images', label, f'{{index}}.png')
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('L', (8, 8), index).save(path)
prepare_folder({str(tmp_path / 'images')!r}, 'mine', {str(tmp_path)!r})
for name in ('digits', 'mine'):
    source = load_source(name, 'train', {str(tmp_path)!r})
    batch = next(train_batches(source, global_batch_size=4, image_size=8, seed=0))
    assert batch['image'].shape == (4, 8, 8, 3)
    assert next(evaluation_batches(source, global_batch_size=4, image_size=8))['mask'].all()
assert 'tensorflow' not in sys.modules
print('done')
"""
    result = subprocess.run(
        [sys.executable, '-W', 'error', '-c', script], capture_output=True, text=True, check=False
    )
    assert result.stdout == 'done\n', result.stderr


def test_label_names_of_a_prepared_set(data_dir):
    assert sources.read_label_names('greys', data_dir) == ('low', 'high')


@pytest.mark.parametrize(
    ('name', 'count'), [('imagenet2012', 1000), ('cifar100', 100), ('cifar10:3.0.2', 10)]
)
def test_label_names_of_a_set_that_is_not_here(name, count, tmp_path):
    names = sources.read_label_names(name, str(tmp_path))
    assert len(set(names)) == count
    assert list(tmp_path.iterdir()) == []


def test_label_names_of_the_digits_prepare_nothing(tmp_path):
    assert sources.read_label_names('digits', str(tmp_path)) == tuple('0123456789')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ('name', 'message'),
    [('cifar1', "did you mean 'cifar10'"), ('lsun', 'is no image classification set')],
)
def test_label_names_of_what_has_none(name, message, tmp_path):
    with pytest.raises(DataError, match=message):
        sources.read_label_names(name, str(tmp_path))


@pytest.mark.parametrize('name', ['../photos', '/home/me/my photos', './photos', '~/photos', '.'])
@pytest.mark.parametrize('read', [lambda name: load_source(name, 'train'), read_label_names])
def test_a_path_is_to_be_prepared_first(name, read):
    folder = "'/home/me/my photos'" if ' ' in name else name
    with pytest.raises(DataError) as caught:
        read(name)
    assert str(caught.value) == (
        f"data set '{name}' is a path, and a data set goes by its name; a folder of images becomes "
        f'one by `python -m gcnet_jax prepare {folder} --name NAME`, then give that NAME'
    )
