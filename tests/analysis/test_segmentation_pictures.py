"""Pictures of label maps: colours, borders, the legend, and the files."""

import numpy as np
import pytest
from PIL import Image

from gcnet_jax.analysis import drawing, segmentation_pictures
from gcnet_jax.analysis.segmentation_pictures import (
    draw_label_map,
    write_label_map,
    write_overlay,
)
from gcnet_jax.data.segmentation_labels import LABEL_SETS, palette
from gcnet_jax.errors import ConfigError, DataError
from gcnet_jax.tasks.label_map import LabelMap

SIZE = (60, 80)


def halves(size=SIZE, names=('left', 'middle', 'right')):
    """Nothing in the middle."""
    labels = np.zeros(size, np.uint8)
    labels[:, size[1] // 2 :] = 2
    return LabelMap(labels, names)


@pytest.fixture
def actual_size(monkeypatch):
    """Small images stay small."""
    monkeypatch.setattr(drawing, 'MIN_SIDE', 1)


@pytest.mark.parametrize('band', [7, 256])
def test_labels_are_blended_over_the_image(make, actual_size, monkeypatch, band):
    monkeypatch.setattr(segmentation_pictures, 'BAND_ROWS', band)
    image = make.picture(0, *SIZE)
    colors = np.array([[200, 0, 0], [9, 9, 9], [0, 0, 200]], np.uint8)
    picture = np.asarray(draw_label_map(image, halves(), colors))
    for columns, color in ((slice(0, 39), colors[0]), (slice(40, 80), colors[2])):
        np.testing.assert_allclose(
            picture[:60, columns],
            0.45 * image[:, columns] + 0.55 * color.astype(float),
            atol=0.51,
        )
    # The border is darker.
    expected = 0.15 * image[:, 39] + 0.85 * 0.45 * colors[0].astype(float)
    np.testing.assert_allclose(picture[:60, 39], expected, atol=0.51)


def test_the_legend_lists_what_occurs(monkeypatch):
    written = []
    text = segmentation_pictures.ImageDraw.ImageDraw.text

    def note(self, place, content, **options):
        written.append(content)
        return text(self, place, content, **options)

    monkeypatch.setattr(segmentation_pictures.ImageDraw.ImageDraw, 'text', note)
    label_map = halves()
    label_map.labels[:15] = 0
    label_map.labels[59, 79] = 1
    image = np.zeros((*SIZE, 3), np.uint8)
    picture = draw_label_map(image, label_map)
    assert written == ['left', '62.5%', 'right', '37.5%', 'middle', '<0.1%']
    assert picture.width == 1040
    legend = np.asarray(picture)[780:].reshape(-1, 3)
    for color in palette(None, 3):
        assert (legend == color).all(axis=1).any()

    written.clear()
    many = np.arange(60 * 80).reshape(SIZE) % 50
    draw_label_map(image, LabelMap(many.astype(np.uint8), tuple(map(str, range(50)))))
    assert written[-2:] == ['10 more', '20.0%']


@pytest.mark.parametrize('size', [(1200, 30), (30, 1200), (1, 1)])
def test_images_of_any_ratio_have_room_for_the_legend(size):
    names = ('left', 'middle', 'a label of any length ' * 5)
    picture = draw_label_map(np.zeros((*size, 3), np.uint8), halves(size, names))
    assert picture.width >= 200


def test_any_label_can_be_drawn():
    names = ('собака', '犬' * 90, 'a\nb\x1b[31m')
    draw_label_map(np.zeros((*SIZE, 3), np.uint8), halves(names=names))


def test_another_image_is_refused():
    with pytest.raises(ConfigError, match=r'uint8 \[60, 80, 3\], as the labels are'):
        draw_label_map(np.zeros((80, 60, 3), np.uint8), halves())


def test_label_maps_are_written_with_their_palette(tmp_path):
    names = LABEL_SETS['cityscapes'].names
    label_map = LabelMap(np.arange(19 * 4, dtype=np.uint8).reshape(4, 19) % 19, names)
    path = write_label_map(label_map, tmp_path / 'map.png')
    with Image.open(path) as stored:
        assert stored.mode == 'P'
        np.testing.assert_array_equal(stored, label_map.labels)
        colours = np.asarray(stored.convert('RGB'))
    np.testing.assert_array_equal(colours[0], LABEL_SETS['cityscapes'].palette)

    names = tuple(map(str, range(300)))
    large = LabelMap(np.arange(300, dtype=np.uint16).reshape(3, 100), names)
    with Image.open(write_label_map(large, tmp_path / 'large.png')) as stored:
        np.testing.assert_array_equal(stored, large.labels)


def test_overlays_are_png_or_jpeg(tmp_path, make):
    image = make.picture(0, *SIZE)
    with pytest.raises(ConfigError, match=r'named \.png or \.jpg'):
        write_overlay(image, halves(), tmp_path / 'a.gif')
    with pytest.raises(DataError, match='cannot write'):
        write_overlay(image, halves(), tmp_path / 'missing' / 'a.png')
    with pytest.raises(DataError, match='cannot write'):
        write_label_map(halves(), tmp_path / 'missing' / 'a.png')
    with Image.open(write_overlay(image, halves(), tmp_path / 'b.jpg')) as picture:
        assert (picture.format, picture.width) == ('JPEG', 1040)
