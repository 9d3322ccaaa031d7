"""Pictures of instances: what is coloured, where labels go, and the files."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from gcnet_jax.analysis import drawing, instance_pictures
from gcnet_jax.analysis.instance_pictures import draw_instances, instance_colors, write_instances
from gcnet_jax.errors import ConfigError
from gcnet_jax.tasks.instances import Instances

SIZE = (60, 80)


def make_instances(boxes, size=SIZE, labels=None, masks=True):
    boxes = np.float32(boxes).reshape(-1, 4)
    count = len(boxes)
    return Instances(
        boxes=boxes,
        scores=np.linspace(0.9, 0.3, count, dtype=np.float32),
        labels=tuple(labels or ['thing'] * count),
        classes=np.zeros(count, int),
        size=size,
        mask_probabilities=np.ones((count, 28, 28), np.float32) if masks else None,
    )


@pytest.fixture
def actual_size(monkeypatch):
    """Small images stay small, and nothing is written on them."""
    monkeypatch.setattr(drawing, 'MIN_SIDE', 1)
    monkeypatch.setattr(instance_pictures, '_draw_labels', lambda *arguments: None)


def test_masks_are_blended_inside_and_nothing_changes_outside(make, actual_size):
    image = make.picture(0, *SIZE)
    instances = make_instances([[10, 20, 50, 45]])
    picture = np.asarray(draw_instances(image, instances))
    color = instance_colors(1)[0].astype(float)
    np.testing.assert_allclose(
        picture[25:40, 15:45], 0.55 * image[25:40, 15:45] + 0.45 * color, atol=0.51
    )
    np.testing.assert_array_equal(picture[20, 10:51], np.tile(color, (41, 1)))  # The box.
    outside = np.ones(SIZE, bool)
    outside[20:46, 10:51] = False
    np.testing.assert_array_equal(picture[outside], image[outside])


def test_small_objects_lie_over_large_ones(actual_size):
    image = np.full((*SIZE, 3), 100, np.uint8)
    large, small = [5, 5, 75, 55], [30, 20, 50, 40]
    for boxes, ours in (([large, small], 1), ([small, large], 0)):
        picture = np.asarray(draw_instances(image, make_instances(boxes)))
        expected = 55 + 0.45 * instance_colors(2)[ours].astype(float)
        np.testing.assert_allclose(picture[30, 40], expected, atol=0.51)


def test_without_masks_only_boxes_are_drawn(actual_size):
    image = np.full((*SIZE, 3), 100, np.uint8)
    picture = np.asarray(draw_instances(image, make_instances([[10, 20, 50, 45]], masks=False)))
    assert (picture[22:44, 12:49] == 100).all()
    assert (picture[20, 10:51] == instance_colors(1)).all()


def test_small_images_are_enlarged(make):
    image = Image.fromarray(make.picture(0, *SIZE))
    assert draw_instances(image, make_instances([[10, 20, 50, 45]])).size == (1040, 780)
    large = make_instances([[10, 20, 50, 45]], size=(40, 1200))
    assert draw_instances(image.resize((1200, 40)), large).size == (1200, 40)


def places(monkeypatch, size, instances):
    """Where labels were put."""
    found = []
    original = instance_pictures._free_place
    monkeypatch.setattr(
        instance_pictures,
        '_free_place',
        lambda *arguments: found.append(original(*arguments)) or found[-1],
    )
    draw_instances(np.zeros((*size, 3), np.uint8), instances)
    return np.array(found)


def test_labels_stay_inside_the_picture(monkeypatch):
    boxes = [[0, 0, 30, 20], [1170, 0, 1200, 20], [0, 780, 9, 800], [1190, 790, 1200, 800]]
    boxes += [[0, 0, 1200, 800], [-50, -60, 2000, 3000], [600, 400, 600, 400]]
    found = places(monkeypatch, (800, 1200), make_instances(boxes, size=(800, 1200)))
    assert len(found) == len(boxes)
    assert (found >= 0).all()
    assert (found < [1200, 800, 1200, 800]).all()


def test_labels_keep_out_of_each_others_way(monkeypatch):
    boxes = [[500, 300, 560 + 9 * i, 330 + 7 * i] for i in range(5)]
    found = places(monkeypatch, (800, 1200), make_instances(boxes, size=(800, 1200)))
    for i, a in enumerate(found):
        for b in found[:i]:
            overlap = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
            assert (overlap <= 0).any()


def test_labels_leave_small_objects_visible(monkeypatch):
    boxes = [[500, 300, 620, 380], [520, 275, 530, 290]]
    found = places(monkeypatch, (800, 1200), make_instances(boxes, size=(800, 1200)))
    for place in found:
        overlap = np.minimum(place[2:], boxes[1][2:]) - np.maximum(place[:2], boxes[1][:2])
        assert (overlap <= 0).any()


def test_colours_differ_and_can_be_written_on():
    colors = instance_colors(12).astype(int)
    distances = np.abs(colors[:, None] - colors).sum(axis=-1)
    assert distances[~np.eye(12, dtype=bool)].min() > 40
    # Contrast of black text by WCAG, which asks for 4.5.
    channels = colors / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    assert ((luminance + 0.05) / 0.05).min() > 4.5


def test_any_label_can_be_drawn(make):
    labels = ['собака', '犬' * 90, 'a\nb\x1b[31m', '$x_1^2$']
    instances = make_instances([[i, i, 40 + i, 30 + i] for i in range(4)], labels=labels)
    draw_instances(make.picture(0, *SIZE), instances)


def test_no_objects_leave_the_image_as_it_is(make, actual_size):
    image = make.picture(0, *SIZE)
    np.testing.assert_array_equal(draw_instances(image, make_instances([])), image)


@pytest.mark.parametrize(
    'image',
    [
        np.zeros((80, 60, 3), np.uint8),
        np.zeros(SIZE, np.uint8),
        np.zeros((*SIZE, 3), np.float32),
        Image.new('RGB', (81, 60)),
    ],
)
def test_another_image_is_refused(image):
    with pytest.raises(ConfigError, match=r'uint8 \[60, 80, 3\]'):
        draw_instances(image, make_instances([]))


def test_files_are_png_or_jpeg(tmp_path, make, read_only, monkeypatch):
    image, instances = make.picture(0, *SIZE), make_instances([[10, 20, 50, 45]])
    with pytest.raises(ConfigError, match=r'named \.png or \.jpg'):
        write_instances(image, instances, tmp_path / 'a.gif')
    with pytest.raises(Exception, match=read_only):
        write_instances(image, instances, tmp_path / 'a.png')
    monkeypatch.undo()
    for name, kind in (('a.png', 'PNG'), ('b.JPG', 'JPEG')):
        path = write_instances(image, instances, tmp_path / name)
        with Image.open(path) as picture:
            assert (picture.format, picture.size) == (kind, (1040, 780))


def test_a_box_that_is_no_box_is_drawn(make):
    instances = make_instances([[5, 5, 5, 5], [-9, -9, -3, -3], [100, 90, 200, 190]])
    draw_instances(make.picture(0, *SIZE), instances)
    draw_instances(make.picture(0, *SIZE), dataclasses.replace(instances, mask_probabilities=None))
