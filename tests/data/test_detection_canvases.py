"""Canvases: their sizes by default, which image goes where, and what is refused."""

import types

import numpy as np
import pytest

from gcnet_jax.data.detection_canvases import make_canvases
from gcnet_jax.data.keep_ratio import shape_within
from gcnet_jax.data.preprocessing import KeepRatio
from gcnet_jax.errors import ConfigError, DataError

COCO = KeepRatio(short_side=800, long_side=1333, multiple_of=32)
MULTISCALE = [(short, 1333) for short in (640, 672, 704, 736, 768, 800)]


def source(*sizes):
    index = types.SimpleNamespace(sizes=np.array(sizes, np.int32))
    return types.SimpleNamespace(index=index, describe='record {}'.format)


def test_by_default_there_is_one_for_landscapes_and_one_for_portraits():
    for scales in (None, [(800, 1333)], MULTISCALE):
        assert make_canvases(COCO, scales).sizes == ((800, 1344), (1344, 800))
    assert make_canvases(COCO, [(400, 1000), (512, 600)]).sizes == ((512, 1024), (1024, 512))
    assert make_canvases(KeepRatio(short_side=90, long_side=90)).sizes == ((96, 96),)


def test_the_smallest_that_fits_is_taken():
    canvases = make_canvases(COCO, None, [(800, 1344), (1344, 800), (800, 1088), 1088])
    assert [
        canvases.choose(*size) for size in ((480, 640), (640, 480), (427, 640), (500, 500))
    ] == [*(2, 1, 0, 2)]
    images = source((480, 640), (427, 640), (480, 640), (640, 480))
    assert canvases.choose_all(images).tolist() == [2, 0, 2, 1]


def test_images_fit_at_every_scale():
    rng = np.random.default_rng(0)
    canvases = make_canvases(COCO, MULTISCALE, [(704, 1344), (800, 1344), (1344, 800), (800, 1088)])
    for height, width in rng.integers(10, 2000, (200, 2)):
        chosen = canvases.sizes[canvases.choose(int(height), int(width))]
        for limits in MULTISCALE:
            shape = shape_within(int(height), int(width), *limits)
            assert shape[0] <= chosen[0]
            assert shape[1] <= chosen[1]


def test_an_image_that_fits_nowhere_is_named():
    canvases = make_canvases(COCO, None, [(800, 1088), (1088, 800)])
    with pytest.raises(
        DataError,
        match=r'^record 1: an image of 640 x 400 pixels becomes up to 1280 x 800, which fits on no '
        r'canvas; canvases, as height x width, are 800x1088, 1088x800; choose larger limits or '
        r'canvases, or prepare the data set without this image$',
    ):
        canvases.choose_all(source((480, 640), (400, 640)))
    with pytest.raises(DataError, match=r'record 0: an image of 5000 x 1 pixels is too elongated'):
        make_canvases(COCO).choose_all(source((1, 5000)))


@pytest.mark.parametrize(
    ('scales', 'sizes', 'message'),
    [
        ([], None, 'scales is empty'),
        ([(800, 600)], None, r'scales holds limits \(short side, long side\).*got \(800, 600\)'),
        ([800], None, 'got 800'),
        ([(0, 600)], None, r'got \(0, 600\)'),
        ([(True, 600)], None, 'got'),
        ([(100, 5000)], None, 'got'),
        (None, [], 'canvases is empty'),
        (None, [(800, 1333)], r'multiples of 32 pixels up to 4096, got \(800, 1333\)'),
        (None, [(0, 32)], 'got'),
        (None, ['large'], "got 'large'"),
        (None, [(32, 64, 96)], 'got'),
        (None, [(8192, 64)], 'got'),
    ],
)
def test_what_cannot_be_is_refused(scales, sizes, message):
    with pytest.raises(ConfigError, match=message):
        make_canvases(COCO, scales, sizes)
