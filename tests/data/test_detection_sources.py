"""Sources of images with objects: prepared folders, TFDS's own sets, and what is damaged."""

import io
import json
import pickle

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from gcnet_jax.data.coco import load_coco
from gcnet_jax.data.detection_folder import prepare_detection
from gcnet_jax.data.detection_sources import (
    as_coco,
    count_beyond,
    load_detection,
    read_detection_names,
)
from gcnet_jax.errors import DataError, UnlabelledError
from tests.data import crafted_images as crafted
from tests.data.detection_folders import fill, picture, size_of

# Top, left, bottom, right as shares, label, crowd, area.
BOXES = {
    0: [(0.1, 0.2, 0.5, 0.6, 1, False, 40), (0.0, 0.0, 1.0, 1.0, 0, True, 600)],
    1: [],
    2: [(0.25, 0.5, 0.75, 1.0, 2, False, 0), (0.5, 0.5, 0.51, 1.0, 2, False, 3)],
}


class Boxes(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A set with the features of TFDS's `coco/2017`."""

    VERSION = tfds.core.Version('1.1.0')
    RELEASE_NOTES = None

    def __init__(self, data_dir, name='coco_like', encode=picture):
        self.name, self.encode = name, encode
        super().__init__(data_dir=data_dir, version='1.1.0', file_format='array_record')

    def _info(self):
        objects = {
            'id': np.int64,
            'area': np.int64,
            'bbox': tfds.features.BBoxFeature(),
            'label': tfds.features.ClassLabel(names=['cat', 'dog', 'cow']),
            'is_crowd': np.bool_,
        }
        features = {
            'image': tfds.features.Image(),
            'image/filename': tfds.features.Text(),
            'image/id': np.int64,
            'objects': tfds.features.Sequence(objects),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, unused):
        return {'train': self._examples(BOXES), 'test': self._examples({0: [], 1: []})}

    def _examples(self, boxes):
        for number, found in boxes.items():
            objects = [
                {
                    'id': place,
                    'area': area,
                    'bbox': tfds.features.BBox(*box),
                    'label': label,
                    'is_crowd': crowd,
                }
                for place, (*box, label, crowd, area) in enumerate(found)
            ]
            yield (
                number,
                {
                    'image': self.encode(number),
                    'image/filename': f'{number}.png',
                    'image/id': 2**40 + number,
                    'objects': objects,
                },
            )

    def _generate_examples(self):
        raise NotImplementedError


def write(builder):
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    builder.download_and_prepare(download_config=config)


@pytest.fixture
def data_dir(tmp_path):
    return str(tmp_path / 'sets')


@pytest.fixture
def prepared(tmp_path, data_dir):
    fill(tmp_path / 'coco', {'train': range(9), 'val': range(20, 23)})
    prepare_detection(tmp_path / 'coco', 'mine', data_dir)
    return tmp_path / 'coco'


def number_of(record):
    return Image.open(io.BytesIO(record['image'])).getpixel((0, 0))[0]


def test_boxes_of_a_set_of_tfds(data_dir):
    write(Boxes(data_dir))
    source = load_detection('coco_like', 'train', data_dir)
    assert (
        source.label_names == read_detection_names('coco_like', data_dir) == ('cat', 'dog', 'cow')
    )
    assert not source.has_masks
    for place, record in enumerate(source):
        number = number_of(record)
        height, width = size_of(number)
        assert record['size'] == (height, width) == tuple(source.index.sizes[place])
        assert f'({number}.png)' in source.describe(place)
        for item, stored in zip(record['objects'], BOXES[number], strict=True):
            top, left, bottom, right, label, crowd, area = stored
            expected = [left * width, top * height, (right - left) * width, (bottom - top) * height]
            np.testing.assert_allclose(item['bbox'], expected, rtol=1e-6, atol=1e-5)
            assert (item['label'], item['iscrowd']) == (label, crowd)
            assert item['area'] == max(area, 1)
        counts = {0: 1, 1: 0, 2: 1}
        assert source.index.counts[place] == counts[number]
    assert pickle.loads(pickle.dumps(source)).index.counts.sum() == 2


def test_a_damaged_image_of_tfds_does_not_hinder_the_others(data_dir):
    write(Boxes(data_dir, encode=lambda number: b'damaged' if number == 0 else picture(number)))
    source = load_detection('coco_like', 'train', data_dir)
    assert sorted(source.index.counts) == [0, 0, 1]


def test_a_split_without_objects_is_refused(data_dir):
    write(Boxes(data_dir))
    with pytest.raises(UnlabelledError, match="'coco_like' split 'test' has an object to train on"):
        load_detection('coco_like', 'test', data_dir)
    with pytest.raises(DataError, match='no labelled split to evaluate on'):
        load_detection('coco_like', None, data_dir)


def test_other_sets_are_refused(data_dir):
    class Plain(Boxes):
        def _info(self):
            features = {
                'image': tfds.features.Image(),
                'label': tfds.features.ClassLabel(names=['a']),
            }
            features = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _examples(self, unused):
            yield 0, {'image': picture(0), 'label': 0}

    write(Plain(data_dir, name='plain'))
    with pytest.raises(DataError, match=r"'plain' is no detection set: .*--task detection FOLDER"):
        load_detection('plain', 'train', data_dir)


def test_the_usual_splits_are_found(prepared, data_dir):
    assert load_detection('mine', None, data_dir).split == 'validation'
    assert load_detection('mine', None, data_dir, purpose='selection').split == 'validation'
    assert read_detection_names('mine', data_dir) == ('person', 'dog', 'toothbrush')
    with pytest.raises(DataError, match="'mine' has no split 'tset'"):
        load_detection('mine', 'tset', data_dir)


def test_objects_beyond_a_limit_are_counted(prepared, data_dir):
    source = load_detection('mine', 'train', data_dir)  # Of nine images, three have 1, three 2.
    assert count_beyond(source, 2) == (0, 0)
    assert count_beyond(source, 1) == (3, 3)
    assert count_beyond(source, 0) == (9, 6)


def test_annotations_come_back_for_evaluation(prepared, data_dir):
    source = load_detection('mine', 'train', data_dir)
    there, here = load_coco(prepared, 'train'), as_coco(source)
    assert [image.size for image in here.images] == [r['size'] for r in source]
    assert [item['id'] for item in here.objects] == list(range(1, len(here.objects) + 1))

    def known(data, number):
        """What tells an annotation, beside the ways of numbering."""
        return [
            (
                number(item['image_id']),
                data.categories[item['category_id']],
                *(item['bbox'], item['area'], item['iscrowd'], json.dumps(item['segmentation'])),
            )
            for item in data.objects
        ]

    numbers = [number_of(record) for record in source]
    mine = known(here, lambda place: numbers[place])
    assert sorted(mine) == sorted(known(there, lambda image: image))


@pytest.mark.parametrize(
    'edit',
    [
        lambda parts: parts.pop('sizes'),
        lambda parts: parts['sizes']['train'].pop(),
        lambda parts: parts['objects']['train'].pop(),
        lambda parts: parts['sizes'].update(train='many'),
        lambda parts: parts['sizes']['train'][0].append(3),
        lambda parts: parts['sizes'].update(train=[[0, 0]] * 9),
        lambda parts: parts.clear(),
    ],
)
def test_damaged_descriptions_are_errors(edit, prepared, data_dir):
    file = f'{data_dir}/mine/1.0.0/metadata.json'
    with open(file) as opened:
        parts = json.load(opened)
    edit(parts)
    with open(file, 'w') as opened:
        json.dump(parts, opened)
    with pytest.raises(DataError, match=r"lacks the sizes of the images of split 'train'"):
        load_detection('mine', 'train', data_dir)


def test_exif_is_applied_to_sizes_of_tfds(data_dir):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = crafted.encode(Image.fromarray(np.zeros((10, 30, 3), np.uint8)), 'JPEG', exif=exif)
    write(Boxes(data_dir, encode=lambda number: turned))
    source = load_detection('coco_like', 'train', data_dir)
    assert source.index.sizes.tolist() == [[30, 10]] * 3
