"""COCO sets: where files are looked for, and everything that can be wrong with annotations."""

import json
import os
import re

import pytest

from gcnet_jax.data import coco
from gcnet_jax.data.coco import load_coco
from gcnet_jax.data.coco_labels import COCO_LABELS
from gcnet_jax.errors import ConfigError, DataError

CATEGORIES = ((1, 'person'), (18, 'dog'), (90, 'toothbrush'))


def contents():
    """Annotations of three images of 20 x 30 pixels, one object each."""
    return {
        'info': {'year': 2017},
        'images': [
            {'id': number, 'file_name': f'{number:04}.jpg', 'height': 20, 'width': 30}
            for number in (7, 3, 12)
        ],
        'annotations': [
            {
                'id': 100 + number,
                'image_id': number,
                'category_id': 18,
                'bbox': [2, 3, 10.5, 8],
                'area': 40.5,
                'iscrowd': 0,
                'segmentation': [[2, 3, 12.5, 3, 12.5, 11]],
                'caption': 'unused',
            }
            for number in (3, 7, 12)
        ],
        'categories': [{'id': number, 'name': name} for number, name in CATEGORIES],
    }


def write(root, annotations, file='annotations/instances_val2017.json', folder='val2017'):
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    text = annotations if isinstance(annotations, str) else json.dumps(annotations)
    (root / file).write_text(text)
    (root / folder).mkdir(parents=True, exist_ok=True)
    for number in (3, 7, 12):
        (root / folder / f'{number:04}.jpg').write_bytes(b'an image')
    return root


def refused(root, message, split=None, error=DataError):
    with pytest.raises(error) as caught:
        load_coco(root, split)
    text = str(caught.value)
    assert re.search(message, text), text
    assert '\n' not in text
    assert len(text) < 700


def test_the_labels_are_cocos_80():
    assert len(COCO_LABELS) == len(set(COCO_LABELS)) == 80
    assert [COCO_LABELS[i] for i in (0, 11, 16, 79)] == ['person', 'stop sign', 'dog', 'toothbrush']


def test_a_set_is_its_images_categories_and_objects(tmp_path):
    data = load_coco(write(tmp_path, contents()))
    assert (data.name, data.split) == (str(tmp_path), 'val2017')
    assert data.file == tmp_path / 'annotations/instances_val2017.json'
    assert [image.id for image in data.images] == [7, 3, 12]
    assert data.images[1].path == tmp_path / 'val2017/0003.jpg'
    assert data.images[1].size == (20, 30)
    assert data.categories == dict(CATEGORIES)
    assert len(data) == 3
    assert data.missing == data.notes == ()
    assert data.objects[0] == {
        'id': 1,
        'image_id': 3,
        'category_id': 18,
        'bbox': [2, 3, 10.5, 8],
        'area': 40.5,
        'iscrowd': 0,
        'segmentation': [[2, 3, 12.5, 3, 12.5, 11]],
    }


@pytest.mark.parametrize(
    ('file', 'folder', 'split'),
    [
        ('annotations/instances_val2017.json', 'val2017', 'val2017'),
        ('annotations/instances_val2017.json', 'images/val2017', 'val2017'),
        ('annotations/instances_mine.json', 'images', 'mine'),
        ('instances_val.json', 'val', 'val'),
        ('instances_val.json', '.', 'val'),
        ('instances.json', 'images', ''),
        ('instances.json', '.', ''),
        ('annotations/instances.json', 'images', ''),
    ],
)
def test_layouts(tmp_path, file, folder, split):
    (tmp_path / 'images').mkdir()  # Is there, and empty.
    data = load_coco(write(tmp_path, contents(), file, folder))
    assert data.split == split
    assert data.images[0].path == tmp_path / folder / '0007.jpg'
    if split:
        assert load_coco(tmp_path, split).images == data.images


def test_file_names_may_have_folders(tmp_path):
    annotations = contents()
    for image in annotations['images']:
        image['file_name'] = f'val2017/{image["file_name"]}'
    data = load_coco(write(tmp_path, annotations, 'instances.json'))
    assert data.images[0].path == tmp_path / 'val2017/0007.jpg'


def test_several_splits_need_a_choice(tmp_path):
    write(tmp_path, contents())
    write(tmp_path, contents(), 'annotations/instances_train2017.json', 'train2017')
    refused(tmp_path, 'several splits, train2017, val2017; choose one', error=ConfigError)
    assert load_coco(tmp_path, 'train2017').images[0].path.parent.name == 'train2017'
    refused(tmp_path, "'val'; did you mean 'val2017'", 'val', ConfigError)


def test_no_annotations(tmp_path):
    refused(tmp_path / 'nowhere', 'nowhere is not a directory; give the folder')
    refused(tmp_path, r'no annotations in .*: looked for annotations/instances_\*\.json, ')
    refused(tmp_path, 'neither annotations/instances_val.json nor inst', 'val', ConfigError)
    (tmp_path / 'captions_val2017.json').write_text('{}')
    refused(tmp_path, 'no annotations in')
    refused(tmp_path, 'neither', '../../etc/passwd', ConfigError)
    refused(tmp_path, 'neither', 'a\nb', ConfigError)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('', 'damaged JSON'),
        ('{"images": [', 'instances_val2017.json is damaged JSON: Expecting value'),
        ('[' * 100_000, 'damaged JSON: it is nested too deeply'),
        ('{"images": ' + '9' * 5000 + '}', 'damaged JSON'),
        ('[]', 'no COCO annotation file: it holds no JSON object'),
        ('{}', "no list 'images'"),
        ('{"images": {}}', "no list 'images'"),
        ('{"images": [], "annotations": []}', "no list 'categories'"),
        ('{"images": [], "annotations": [], "categories": []}', 'lists no images'),
    ],
)
def test_files_that_are_no_annotations(tmp_path, text, message):
    refused(write(tmp_path, text), message)


def test_what_is_no_file_or_no_text(tmp_path):
    root = write(tmp_path, contents())
    file = root / 'annotations/instances_val2017.json'
    file.write_bytes(b'\xff\xfe{')
    refused(root, 'not UTF-8 text')
    file.unlink()
    os.mkfifo(file)
    refused(root, 'not a regular file')


def test_large_files_are_refused_before_they_are_parsed(tmp_path, monkeypatch):
    root = write(tmp_path, contents())
    with monkeypatch.context() as patch:
        patch.setattr(coco, 'MAX_ANNOTATION_BYTES', 500)
        refused(root, r'has [\d,]+ bytes; at most 500 are read')
    monkeypatch.setattr(coco, 'MAX_PARSED_BYTES', 20_000_000)
    load_coco(root)
    for value in ('[]', '{}', '0', '""'):
        write(root, '[' + ','.join([value] * 900_000) + ']')
        refused(root, r'would take about 0\.\d GB of memory; at most 0\.0 GB')


def test_the_estimate_of_memory_is_an_upper_bound(tmp_path):
    import tracemalloc

    for value in ('[]', '{}', '123.25', '"abc"', '{"a":1}', '[[1.5,2.5]]', 'null'):
        text = '[' + ','.join([value] * 20_000) + ']'
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        parsed = json.loads(text)
        used = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        assert len(parsed) == 20_000
        estimate = sum(text.count(key) * size for key, size in coco.PARSED_BYTES.items())
        assert used < 1.1 * estimate


def test_missing_images_are_left_out_and_reported(tmp_path):
    root = write(tmp_path, contents())
    (root / 'val2017/0003.jpg').unlink()
    data = load_coco(root)
    assert [image.id for image in data.images] == [7, 12]
    assert data.missing == (root / 'val2017/0003.jpg',)
    (note,) = data.notes
    assert re.search(r'1 of 3 images are missing and left out \(first .*val2017/0003.jpg\)', note)
    for number in (7, 12):
        (root / f'val2017/{number:04}.jpg').unlink()
    refused(root, 'none of the 3 images of .* exists, such as 0007.jpg; looked in .*val2017, ')


@pytest.mark.parametrize(
    'name',
    [
        *('../../etc/passwd', '/etc/passwd', 'a/../../b.jpg', '..', 'C:\\a.jpg', 'C:a.jpg'),
        *('..\\..\\a.jpg', '\\\\host\\share\\a.jpg', '\\a.jpg'),
    ],
)
def test_file_names_that_lead_out_of_the_folder(tmp_path, name):
    annotations = contents()
    annotations['images'][1]['file_name'] = name
    refused(write(tmp_path, annotations), 'image 3 has the file_name .*which leads out of the')


BAD_VALUES = [
    ('images', 'id', None, r'images\[1\] has no id, or one that is no whole number'),
    ('images', 'id', True, r'images\[1\] has no id'),
    ('images', 'id', 3.0, r'images\[1\] has no id'),
    ('images', 'id', 2**80, r'images\[1\] has no id'),
    ('images', 'id', 7, 'image 7 is there twice'),
    ('images', 'height', 0, 'height 0 and width 30'),
    ('images', 'width', -5, 'height 20 and width -5'),
    ('images', 'width', '30', 'image 3 has no width'),
    ('images', 'width', 10**9, 'at most 100,000,000 pixels'),
    ('images', 'file_name', None, 'image 3 has no file_name'),
    ('images', 'file_name', 'a\0b', 'image 3 has no file_name'),
    ('images', 'file_name', ' ', 'image 3 has no file_name'),
    ('images', 'file_name', './0007.jpg', "image 3 has the file_name './0007.jpg' of image 7"),
    ('categories', 'id', 1, 'category 1 is there twice'),
    ('categories', 'id', '18', r'categories\[1\] has no id'),
    ('categories', 'name', 'person', "category 'person' is there twice"),
    ('categories', 'name', '', 'category 18 has no name'),
    ('categories', 'name', 5, 'category 18 has no name'),
    ('annotations', 'id', 103, 'annotation 103 is there twice'),
    ('annotations', 'id', None, r'annotations\[1\] has no id'),
    ('annotations', 'image_id', 99, 'annotation 107 is of image 99, which is not listed'),
    ('annotations', 'image_id', [], 'annotation 107 has no image_id'),
    ('annotations', 'category_id', 2, 'annotation 107 is of category 2, which is not listed'),
    ('annotations', 'bbox', None, 'annotation 107 has no bbox of four numbers'),
    ('annotations', 'bbox', [1, 2, 3], 'annotation 107 has no bbox of four numbers'),
    ('annotations', 'bbox', [1, 2, 3, 'x'], 'annotation 107 has no bbox of four numbers'),
    ('annotations', 'bbox', [1, 2, 3, float('nan')], 'annotation 107 has no bbox of four'),
    ('annotations', 'bbox', [1, 2, 3, float('inf')], 'annotation 107 has no bbox of four'),
    ('annotations', 'bbox', [1, 2, 3, 10**300], 'annotation 107 has no bbox of four'),
    ('annotations', 'area', -1, 'annotation 107 has an area that is no number from 0 on'),
    ('annotations', 'area', '7', 'annotation 107 has an area'),
    ('annotations', 'iscrowd', 2, 'annotation 107 has an iscrowd that is neither 0 nor 1'),
    ('annotations', 'iscrowd', [], 'annotation 107 has an iscrowd'),
    ('annotations', 'segmentation', 5, 'the segmentation of annotation 107 is neither'),
    ('annotations', 'segmentation', [[1, 2]], 'segmentation of annotation 107 has a polygon'),
    (
        'annotations',
        'segmentation',
        {'size': [30, 20], 'counts': [600]},
        r'segmentation of annotation 107 is of size \[30, 20\] in an image of height 20',
    ),
]


@pytest.mark.parametrize(('part', 'key', 'value', 'message'), BAD_VALUES)
def test_bad_values(tmp_path, part, key, value, message):
    annotations = contents()
    annotations[part][1][key] = value
    refused(write(tmp_path, annotations), message)


@pytest.mark.parametrize('part', ['images', 'categories', 'annotations'])
def test_entries_that_are_no_objects(tmp_path, part):
    annotations = contents()
    annotations[part][1] = 'x'
    refused(write(tmp_path, annotations), rf'{part}\[1\] has no id')


def test_what_exports_leave_out_is_filled_in(tmp_path):
    annotations = contents()
    for entry in annotations['annotations']:
        del entry['area'], entry['iscrowd'], entry['segmentation']
    annotations['annotations'][0]['segmentation'] = []
    data = load_coco(write(tmp_path, annotations))
    assert all((item['area'], item['iscrowd']) == (84, 0) for item in data.objects)
    assert not any('segmentation' in item for item in data.objects)
    (note,) = data.notes
    assert note.endswith('annotations without segmentation: 3 (first annotation 103)')


def test_unusual_boxes_are_kept_and_reported(tmp_path):
    annotations = contents()
    boxes = [[-0.5, -0.5, 31, 21], [2, 3, 30, 8], [5, 5, 0, 7]]
    for entry, box in zip(annotations['annotations'], boxes, strict=True):
        entry['bbox'] = box
    data = load_coco(write(tmp_path, annotations))
    assert [item['bbox'] for item in data.objects] == boxes
    assert [re.sub('.*json: ', '', note) for note in data.notes] == [
        'boxes that reach outside their image, used as they are: 1 (first annotation 107)',
        'boxes without area, which count as objects that nothing can match: 1 (first annotation '
        '112)',
    ]


def test_polygons_that_are_not_of_their_box_are_reported(tmp_path):
    """As where boxes are in pixels, and polygons in shares of the image or of another size."""
    annotations = contents()
    shares, aside, touching = annotations['annotations']
    shares['segmentation'] = [[0.1, 0.1, 0.4, 0.1, 0.4, 0.5]]
    aside['segmentation'] = [[13, 12, 20, 12, 20, 19], [0, 0, 1, 0, 1, 1]]
    touching['segmentation'] = [[0, 0, 1, 0, 1, 1], [12, 4, 20, 4, 20, 19]]
    (note,) = load_coco(write(tmp_path, annotations)).notes
    assert note.endswith('polygons that lie outside their box: 2 (first annotation 103)')


def test_crowds_and_run_lengths(tmp_path):
    annotations = contents()
    annotations['annotations'][1] |= {
        'iscrowd': 1,
        'segmentation': {'size': [20, 30], 'counts': [100, 50, 450], 'more': 'unused'},
    }
    item = load_coco(write(tmp_path, annotations)).objects[1]
    assert item['iscrowd'] == 1
    assert item['segmentation'] == {'size': [20, 30], 'counts': [100, 50, 450]}


def test_names_of_strangers_are_shown_escaped(tmp_path):
    annotations = contents()
    annotations['images'][1]['file_name'] = '../\x1b[31m\n\ud800'
    refused(write(tmp_path, annotations), r'\\x1b')
    annotations['images'][1]['file_name'] = 'a\ud800' + 'b' * 5000
    data = load_coco(write(tmp_path, annotations))
    assert len(data.missing) == 1
    assert '\n' not in data.notes[0]
