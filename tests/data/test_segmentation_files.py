"""Which label map belongs to which image, and folders of another form."""

import pytest

from gcnet_jax.data.segmentation_files import (
    check_classes,
    find_pairs,
    open_folder,
    read_classes,
)
from gcnet_jax.errors import DataError


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b'')


def pairs(root, split):
    folder = open_folder(root)
    found = find_pairs(folder, split)
    names = [tuple(str(path.relative_to(folder.root)) for path in pair) for pair in found.pairs]
    return names, found.problems


@pytest.mark.parametrize(
    ('images', 'labels'),
    [
        ('images', 'labels'),
        ('Images', 'LABELS'),
        ('images', 'annotations'),
        ('leftImg8bit', 'gtFine'),
    ],
)
@pytest.mark.parametrize(
    'spelling', [('train', 'val'), ('training', 'validation'), ('TRAIN', 'dev')]
)
def test_splits_are_found_however_they_are_spelled(images, labels, spelling, tmp_path):
    train, validation = spelling
    touch(tmp_path, f'{images}/{train}/a.jpg', f'{labels}/{train}/a.png')
    touch(tmp_path, f'{images}/{validation}/b.jpg', f'{labels}/{validation}/b.png')
    touch(tmp_path, f'{images}/.hidden/c.jpg', f'{labels}/{train}/Thumbs.db', 'readme.txt')
    assert open_folder(tmp_path).splits == ['train', 'validation']
    assert pairs(tmp_path, 'train') == (
        [(f'{images}/{train}/a.jpg', f'{labels}/{train}/a.png')],
        [],
    )
    assert pairs(tmp_path, 'validation')[0] == [
        (f'{images}/{validation}/b.jpg', f'{labels}/{validation}/b.png')
    ]


def test_folders_within_folders(tmp_path):
    inner = tmp_path / 'download' / 'set'
    touch(inner, 'images/train/north/a.b.jpg', 'images/train/south/a.b.jpg')
    touch(inner, 'labels/train/north/a.b.png', 'labels/train/south/a.b.png')
    found, problems = pairs(tmp_path, 'train')
    assert not problems
    assert found == [
        (f'images/train/{place}/a.b.jpg', f'labels/train/{place}/a.b.png')
        for place in ('north', 'south')
    ]


def test_cityscapes_as_it_is_downloaded(tmp_path):
    stem = 'aachen/aachen_000000_000019'
    touch(tmp_path, f'leftImg8bit/train/{stem}_leftImg8bit.png')
    for kind in ('color.png', 'instanceIds.png', 'labelIds.png', 'polygons.json'):
        touch(tmp_path, f'gtFine/train/{stem}_gtFine_{kind}')
    with pytest.raises(DataError, match=r"_labelIds\.png holds Cityscapes' raw labels; make "):
        pairs(tmp_path, 'train')
    touch(tmp_path, f'gtFine/train/{stem}_gtFine_labelTrainIds.png')
    expected = (
        f'leftImg8bit/train/{stem}_leftImg8bit.png',
        f'gtFine/train/{stem}_gtFine_labelTrainIds.png',
    )
    assert pairs(tmp_path, 'train') == ([expected], [])


def test_files_without_a_partner_are_named(tmp_path):
    touch(tmp_path, *(f'images/train/{name}' for name in ('a.jpg', 'b.jpg', 'c.jpg', 'c.png')))
    touch(tmp_path, *(f'labels/train/{name}.png' for name in 'acd'))
    found, problems = pairs(tmp_path, 'train')
    assert found == [('images/train/a.jpg', 'labels/train/a.png')]
    assert problems == [
        'images/train/c.png (has the stem of c.jpg)',
        'images/train/c.jpg (its stem is there twice)',
        'images/train/b.jpg (an image without a label map)',
        'labels/train/c.png (a label map without an image)',
        'labels/train/d.png (a label map without an image)',
    ]


REFUSED = {
    'no images': (['labels/train/a.png'], r'has no folder images; it needs images/train'),
    'no labels': (['images/train/a.png'], r'has no folder labels; it needs'),
    'no train': (['images/val/a.png', 'labels/val/a.png'], r"images' has no folder train"),
    'no splits': (['images/a.png', 'labels/a.png'], r"images' has no folder train"),
    'two': (
        ['images/train/a.png', 'labels/train/a.png', 'annotations/train/a.png'],
        "has 'annotations' and 'labels'; rename what does not hold the labels",
    ),
    'twice': (
        ['images/train/a.png', 'images/training/a.png', 'labels/train/a.png'],
        r"images/training' does not fit into '.*images', which holds train",
    ),
    'odd': (
        ['images/train/a.png', 'images/extra/a.png', 'labels/train/a.png'],
        r"images/extra' does not fit into",
    ),
    'val without labels': (
        ['images/train/a.png', 'images/val/a.png', 'labels/train/a.png'],
        r"images/val' has no label maps: there is no folder of that split in labels",
    ),
    'val without images': (
        ['images/train/a.png', 'labels/train/a.png', 'labels/val/a.png'],
        r"labels/val' has no images: there is no folder of that split in images",
    ),
}


@pytest.mark.parametrize('kind', REFUSED)
def test_folders_of_another_form_are_refused(kind, tmp_path):
    names, message = REFUSED[kind]
    touch(tmp_path, *names)
    with pytest.raises(DataError, match=message) as raised:
        open_folder(tmp_path)
    assert '\n' not in str(raised.value)


def test_empty_splits_and_what_is_no_directory(tmp_path):
    with pytest.raises(DataError, match='is not a directory'):
        open_folder(tmp_path / 'absent')
    touch(tmp_path, 'images/train/a.png', 'labels/train/.keep', 'images/val/.keep', 'labels/val/b')
    with pytest.raises(DataError, match=r"labels/train' has no label maps"):
        pairs(tmp_path, 'train')
    with pytest.raises(DataError, match=r"images/val' has no images"):
        pairs(tmp_path, 'validation')


def test_a_loop_of_links_ends(tmp_path):
    touch(tmp_path, 'images/train/a.png', 'labels/train/a.png')
    (tmp_path / 'images' / 'train' / 'again').symlink_to(tmp_path / 'images' / 'train')
    with pytest.raises(DataError, match='lies more than 10 folders deep'):
        pairs(tmp_path, 'train')


def test_a_test_split_may_lack_labels(tmp_path):
    touch(tmp_path, 'images/train/a.png', 'labels/train/a.png', 'images/test/b.png')
    assert open_folder(tmp_path).splits == ['train']


def test_classes_are_read_one_a_line(tmp_path):
    assert read_classes(tmp_path) is None
    (tmp_path / 'classes.txt').write_text('\ufeffroad\r\ntraffic light \r\ncaf\u00e9\n\n')
    assert read_classes(tmp_path) == ('road', 'traffic light', 'caf\u00e9')


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        (b'', 'has 0 classes; 2 to 255 are needed'),
        (b'road\n', 'has 1 classes'),
        (b'a\n' * 300, 'has 300 classes'),
        (b'road\n\nsky\n', 'has no name for the label 1: it is blank'),
        (b'road\nsky\nroad\n', "has the name 'road' for the labels 0 and 2"),
        (b'road\nr\x07d\n', 'contains a line break or another control character'),
        (b'road\n\xff\xfe\n', 'classes.txt'),
        (b'x' * 200_000, 'classes.txt'),
    ],
)
def test_classes_that_cannot_be_are_refused(text, message, tmp_path):
    (tmp_path / 'classes.txt').write_bytes(text)
    with pytest.raises(DataError, match=message) as raised:
        read_classes(tmp_path)
    assert '\n' not in str(raised.value)


def test_names_that_look_alike_are_refused():
    with pytest.raises(DataError, match="the classes 'a b' and 'ab' differ only in blanks"):
        check_classes(['a b', 'ab'], 'the list')
