"""Tests of the labels and colours of the published segmenters."""

import hashlib

import numpy as np
import pytest

from gcnet_jax.data.segmentation_labels import LABEL_SETS, palette, voc_colours

# Digests of what mmsegmentation 1.2.2 has in its data sets' METAINFO.
DIGESTS = {
    'cityscapes': '0ee8d0fa2697a914890c72caa662cc48f72850f8eae9826048a214266132e582',
    'ade20k': 'ec7819ec5b928fe7864e370f62cb94a07a2c2de89e0d358f9b1ca5dc7beebb9e',
    'voc': '981720e520e29c7024f920b005447e79c8d2c3d2d96e452cda9c140c5ec25c7b',
}


@pytest.mark.parametrize(('name', 'count'), [('cityscapes', 19), ('ade20k', 150), ('voc', 21)])
def test_label_sets_are_mmsegmentations(name, count):
    label_set = LABEL_SETS[name]
    assert len(label_set.names) == len(set(label_set.names)) == len(label_set.palette) == count
    text = repr([*label_set.names, *label_set.palette])
    assert hashlib.sha256(text.encode()).hexdigest() == DIGESTS[name]


def test_a_published_palette_is_found_by_its_names():
    cityscapes = LABEL_SETS['cityscapes']
    np.testing.assert_array_equal(palette(cityscapes.names, 19), cityscapes.palette)
    assert palette(cityscapes.names, 19).dtype == np.uint8
    # The label as mmsegmentation itself spells it.
    names = [name + ' ' * (name == 'bed') for name in LABEL_SETS['ade20k'].names]
    np.testing.assert_array_equal(palette(names, 150), LABEL_SETS['ade20k'].palette)


@pytest.mark.parametrize(
    'names', [None, LABEL_SETS['cityscapes'].names[:5], ['a', 'b', 'c', 'd', 'e']]
)
def test_other_labels_get_the_colours_of_voc(names):
    np.testing.assert_array_equal(palette(names, 5), LABEL_SETS['voc'].palette[1:6])


def test_a_background_alone_is_black():
    names = ['Background', 'b', 'c']
    np.testing.assert_array_equal(palette(names, 3), LABEL_SETS['voc'].palette[:3])


def test_the_colour_map_is_voc_s_and_distinct():
    np.testing.assert_array_equal(voc_colours(21), LABEL_SETS['voc'].palette)
    assert len(np.unique(voc_colours(256), axis=0)) == 256
    assert tuple(voc_colours(256)[255]) == (224, 224, 192)
