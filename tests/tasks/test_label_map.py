"""Label maps: what is counted, printed and written as JSON."""

import json

import numpy as np
import pytest

from gcnet_jax.tasks.label_map import LabelMap


@pytest.fixture
def label_map():
    labels = np.array([[2, 2, 0, 2], [2, 2, 0, 3]], np.uint8)
    return LabelMap(labels, ('sky', 'road', 'tree', 'c\x1b[31mar'))


def test_pixels_are_counted(label_map):
    assert label_map.size == (2, 4)
    np.testing.assert_array_equal(label_map.pixel_counts, [2, 0, 5, 1])
    np.testing.assert_array_equal(label_map.shares, [0.25, 0, 0.625, 0.125])
    assert label_map.found() == [(2, 5), (0, 2), (3, 1)]


def test_the_text_lists_labels_by_their_shares(label_map):
    assert str(label_map) == 'tree 62.5%, sky 25.0%, c\\x1b[31mar 12.5%'
    many = LabelMap(np.arange(300, dtype=np.uint16)[None], tuple(map(str, range(300))))
    assert str(many).endswith(', 9 0.3% and 290 more')


def test_json_has_what_occurs(label_map):
    fields = json.loads(json.dumps(label_map.to_json()))
    assert (fields['height'], fields['width']) == (2, 4)
    assert fields['classes'][0] == {'label': 'tree', 'class': 2, 'share': 0.625, 'pixels': 5}
    assert [entry['class'] for entry in fields['classes']] == [2, 0, 3]
