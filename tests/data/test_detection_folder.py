"""From a folder in COCO's format to a prepared set: what is stored, and what is refused."""

import io
import json
import os
import re

import numpy as np
import pytest
from PIL import Image
from tensorflow_datasets.core import shuffle

from gcnet_jax.data.detection_folder import prepare_detection
from gcnet_jax.data.detection_sources import load_detection
from gcnet_jax.data.sources import load_source
from gcnet_jax.errors import ConfigError, DataError
from tests.data import crafted_images as crafted
from tests.data.detection_folders import annotation, contents, fill, picture, size_of, write


@pytest.fixture
def data_dir(tmp_path):
    return str(tmp_path / 'sets')


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / 'coco'
    fill(folder, {'train2017': range(7), 'val2017': range(20, 23)})
    return folder


def stored(split, data_dir, name='mine'):
    """The records of a split by the numbers of their images."""
    source = load_detection(name, split, data_dir)
    return {int(Image.open(io.BytesIO(r['image'])).getpixel((0, 0))[0]): r for r in source}


def change(root, split, edit):
    file = root / 'annotations' / f'instances_{split}.json'
    annotations = json.loads(file.read_text())
    edit(annotations)
    file.write_text(json.dumps(annotations))


def test_everything_is_stored_exactly(root, data_dir):
    prepared = prepare_detection(root, 'mine', data_dir)
    assert prepared.split_sizes == {'train': 7, 'validation': 3}
    assert prepared.label_names == ('person', 'dog', 'toothbrush')
    assert prepared.label_counts == (0, 4, 2)
    train = prepared.objects['train']
    assert train._asdict() == {
        **{'targets': 6, 'crowds': 1, 'degenerate': 0},
        **{'backgrounds': 3, 'most': 2, 'has_masks': True},
    }
    assert prepared.notes == prepared.damaged == ()
    for split, numbers in {'train': range(7), 'validation': range(20, 23)}.items():
        records = stored(split, data_dir)
        assert records.keys() == set(numbers)
        given = contents(numbers)['annotations']
        for number, record in records.items():
            assert record['image'] == picture(number)
            assert record['size'] == size_of(number)
            expected = [
                {
                    key: value
                    for key, value in item.items()
                    if key not in ('image_id', 'category_id')
                }
                | {'label': {1: 0, 18: 1, 90: 2}[item['category_id']]}
                for item in given
                if item['image_id'] == number
            ]
            assert record['objects'] == expected


def test_sizes_and_counts_are_known_for_every_part_of_a_split(root, data_dir):
    prepare_detection(root, 'mine', data_dir)
    for split in ('train', 'train[2:5]', 'train[:30%]+validation[1:]', 'validation+train[6:]'):
        source = load_detection('mine', split, data_dir)
        sizes = [Image.open(io.BytesIO(record['image'])).size[::-1] for record in source]
        assert source.index.sizes.tolist() == [list(size) for size in sizes]
        counts = [sum(not o['iscrowd'] for o in record['objects']) for record in source]
        assert source.index.counts.tolist() == counts


def test_the_order_is_drawn_and_survives_sorting_on_disk(tmp_path, data_dir, monkeypatch):
    fill(tmp_path / 'many', {'train': range(60)})
    prepare_detection(tmp_path / 'many', 'mine', data_dir)
    order = list(stored('train', data_dir))
    assert sorted(order) == list(range(60))
    assert order != sorted(order)
    # TFDS sorts large sets in parts, on the disk.
    monkeypatch.setattr(shuffle, 'MAX_MEM_BUFFER_SIZE', 1000)
    (tmp_path / 'many').rename(tmp_path / 'moved')
    prepare_detection(tmp_path / 'moved', 'again', data_dir)
    assert list(stored('train', data_dir, 'again')) == order
    index = load_detection('again', 'train', data_dir).index
    assert index.sizes.tolist() == [list(size_of(number)) for number in order]


def test_a_single_file_is_the_training_split(tmp_path, data_dir):
    root = tmp_path / 'coco'
    fill(root, {'images': range(5)})
    (root / 'annotations' / 'instances_images.json').rename(root / 'instances.json')
    prepared = prepare_detection(root, 'mine', data_dir)
    assert prepared.split_sizes == {'train': 5}
    assert 'data.evaluation_split=train[90%:]' in prepared.train_settings()


@pytest.mark.parametrize(
    ('names', 'message'),
    [
        (('train', 'minival'), r'instances_minival.json. does not fit into .*, with or without'),
        (
            ('train2014', 'train2017'),
            r'train2017.json. does not fit.*, and .*train2014.json. is that of train; annotations',
        ),
        (('val2017',), r"coco' has no annotations/instances_train.json"),
    ],
)
def test_splits_that_are_unclear_are_refused(names, message, tmp_path, data_dir):
    fill(tmp_path / 'coco', {name: range(3) for name in names})
    with pytest.raises(DataError, match=message):
        prepare_detection(tmp_path / 'coco', 'mine', data_dir)


def test_categories_of_the_splits_are_matched_by_name(root, data_dir):
    def renumber(annotations):
        numbers = {1: 7, 18: 6, 90: 5}
        for item in annotations['categories']:
            item['id'] = numbers[item['id']]
        for item in annotations['annotations']:
            item['category_id'] = numbers[item['category_id']]

    prepare_detection(root, 'before', data_dir)
    change(root, 'val2017', renumber)
    prepare_detection(root, 'after', data_dir)
    before, after = (
        stored('validation', data_dir, 'before'),
        stored('validation', data_dir, 'after'),
    )
    assert before == after
    change(root, 'val2017', lambda a: a['categories'].append({'id': 1, 'name': 'unicorn'}))
    with pytest.raises(DataError, match=r'val2017.json has categories .* lacks: unicorn; all'):
        prepare_detection(root, 'mine', data_dir)


def test_names_that_cannot_be_stored_are_refused(root, data_dir):
    change(root, 'train2017', lambda a: a['categories'][0].update(name='per\nson'))
    with pytest.raises(DataError, match=r"the category name 'per\\nson' cannot name a class"):
        prepare_detection(root, 'mine', data_dir)


def test_degenerate_boxes_are_stored_and_reported(root, data_dir):
    boxes = [(2, 3, 0.5, 8), (2, 3, 8, 0), (29.5, 3, 8, 8), (-9, 2, 9.9, 3), (2, 3, 1, 1)]
    added = [annotation(50 + place, 0, box=box) for place, box in enumerate(boxes)]
    added.append(annotation(60, 0, area=0))
    change(root, 'train2017', lambda a: a['annotations'].extend(added))
    prepared = prepare_detection(root, 'mine', data_dir)
    train = prepared.objects['train']
    assert (train.targets, train.degenerate, train.crowds) == (7, 5, 1)
    assert any(note.endswith('area is 0: 5 (first annotation 50)') for note in prepared.notes)
    assert len(stored('train', data_dir)[0]['objects']) == 6


def test_objects_of_images_that_are_left_out_are_not_counted(root, data_dir):
    change(root, 'train2017', lambda a: a['annotations'].append(annotation(50, 3, area=0)))
    (root / 'train2017' / '0003.png').write_bytes(b'')
    prepared = prepare_detection(root, 'mine', data_dir, skip_damaged=True)
    assert prepared.objects['train'].degenerate == 0
    assert prepared.notes == ()


def test_a_file_of_two_splits_is_reported(root, data_dir):
    (root / 'train2017').rename(root / 'images')
    for number in range(20, 23):
        (root / 'val2017' / f'{number:04}.png').rename(root / 'images' / f'{number:04}.png')
    (root / 'val2017').rmdir()
    assert prepare_detection(root, 'apart', data_dir).notes == ()
    change(root, 'val2017', lambda a: a['images'][0].update(file_name='0004.png'))
    (note,) = prepare_detection(root, 'mine', data_dir).notes
    assert re.match('files that are in train and in validation,.*: 1 .first .*0004.png', note)


def test_objects_without_a_mask_leave_boxes(root, data_dir):
    added = annotation(50, 0, segmentation=None)
    change(root, 'train2017', lambda a: a['annotations'].append(added))
    prepared = prepare_detection(root, 'mine', data_dir)
    assert not prepared.objects['train'].has_masks
    assert prepared.objects['validation'].has_masks
    assert not load_detection('mine', 'train', data_dir).has_masks
    assert not load_detection('mine', 'train[:2]+validation', data_dir).has_masks
    assert any('annotations without segmentation: 1' in note for note in prepared.notes)


@pytest.mark.parametrize(
    ('edit', 'message'),
    [
        (lambda a: a['annotations'][1].update(category_id=3), 'annotation 1020 is of category 3'),
        (lambda a: a['annotations'][1].update(image_id=99), 'annotation 1020 is of image 99'),
        (lambda a: a['annotations'][1].update(bbox=[1, 2, 3]), 'annotation 1020 has no bbox'),
        (
            lambda a: a['annotations'][1].update(segmentation=[[1, 2, 3]]),
            'the segmentation of annotation 1020 has a polygon',
        ),
        (lambda a: a['annotations'].clear(), 'has no object to train on in its 7 images'),
        (
            lambda a: [item.update(iscrowd=1) for item in a['annotations']],
            'has no object to train on in its 7 images',
        ),
    ],
)
def test_wrong_annotations_are_refused_by_file_and_id(edit, message, root, data_dir):
    change(root, 'train2017', edit)
    with pytest.raises(DataError) as raised:
        prepare_detection(root, 'mine', data_dir, skip_damaged=True)
    assert re.search(f'instances_train2017.json:?.* {message}', str(raised.value))
    assert '\n' not in str(raised.value)
    assert not os.path.exists(os.path.join(data_dir, 'mine'))


def test_a_split_without_objects_is_refused(root, data_dir):
    change(root, 'val2017', lambda a: a['annotations'].clear())
    with pytest.raises(DataError, match=r'instances_val2017.json has no object to train on'):
        prepare_detection(root, 'mine', data_dir)


def test_images_that_cannot_be_used_are_refused_or_left_out(root, data_dir):
    place = root / 'train2017'
    (place / '0002.png').unlink()
    (place / '0003.png').write_bytes(picture(3)[:50])
    (place / '0004.png').write_bytes(picture(5))
    with pytest.raises(DataError, match=r"^3 files in '.*' cannot be used: .*--skip-damaged"):
        prepare_detection(root, 'mine', data_dir)
    prepared = prepare_detection(root, 'mine', data_dir, skip_damaged=True)
    assert len(prepared.damaged) == 3
    assert any(p == 'train2017/0002.png (no such file)' for p in prepared.damaged)
    assert any(p.startswith('train2017/0003.png (damaged PNG') for p in prepared.damaged)
    assert any(
        re.search(r'0004.png \(it has 20 x 30 pixels .*, and 30 x 20 by instances_train2017', p)
        for p in prepared.damaged
    )
    assert stored('train', data_dir).keys() == {0, 1, 5, 6}
    for number in (0, 1, 5, 6):
        (place / f'{number:04}.png').write_bytes(b'')
    with pytest.raises(DataError, match='has no image that can be used'):
        prepare_detection(root, 'mine', data_dir, skip_damaged=True, overwrite=True)


def test_sizes_are_those_of_upright_images(tmp_path, data_dir):
    root = tmp_path / 'coco'
    file = write(root, 'train', contents([4]))
    annotations = json.loads(file.read_text())
    annotations['images'][0]['file_name'] = 'turned.jpg'
    file.write_text(json.dumps(annotations))
    exif = Image.Exif()
    exif[0x0112] = 6
    height, width = size_of(4)
    stored_pixels = Image.fromarray(np.zeros((width, height, 3), np.uint8))
    (root / 'train' / 'turned.jpg').write_bytes(crafted.encode(stored_pixels, 'JPEG', exif=exif))
    prepare_detection(root, 'mine', data_dir)
    assert load_detection('mine', 'train', data_dir).index.sizes.tolist() == [[height, width]]


def test_names_of_sets_are_checked_first(root, data_dir):
    with pytest.raises(ConfigError, match='cannot name a data set'):
        prepare_detection('/absent', 'My Set', data_dir)
    with pytest.raises(DataError, match='is not a directory'):
        prepare_detection('/absent', 'mine', data_dir)
    with pytest.raises(DataError, match='no annotations in'):
        prepare_detection(root / 'train2017', 'mine', data_dir)
    prepare_detection(root, 'mine', data_dir)
    with pytest.raises(ConfigError, match='is already in'):
        prepare_detection(root, 'mine', data_dir)


def test_it_is_no_classification_set(root, data_dir):
    prepare_detection(root, 'mine', data_dir)
    with pytest.raises(DataError, match="'mine' is no image classification set"):
        load_source('mine', 'train', data_dir)
