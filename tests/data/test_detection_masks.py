"""Crops of masks against mmdetection's whole bitmaps: pixel by pixel, and as RoIAlign sees them."""

import warnings

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_masks

from gcnet_jax.data.detection_masks import crop_mask, draw_mask, resized_grid
from gcnet_jax.errors import DataError

SIZE = (45, 70)


def polygon(rng, size, low=0.1, high=0.9):
    """A random star around the middle, and the box around it."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, 12))
    radius = rng.uniform(low, high, 12) / 2
    x = size[1] * (0.5 + radius * np.cos(angles))
    y = size[0] * (0.5 + radius * np.sin(angles))
    points = np.stack([x, y], axis=-1).round(2)
    return [points.ravel().tolist()], [*points.min(axis=0), *points.max(axis=0)]


def their_bitmap(segmentation, size, resized, mirrored, canvas):
    """mmdetection's: `poly2mask`, `imrescale` with `nearest`, flip and pad."""
    lengths = coco_masks.frPyObjects(segmentation, *size)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # pycocotools is compiled against an older numpy.
        bitmap = coco_masks.decode(coco_masks.merge(lengths))
    bitmap = cv2.resize(bitmap, resized[::-1], interpolation=cv2.INTER_NEAREST)
    if mirrored:
        bitmap = np.flip(bitmap, axis=1)
    padding = [(0, canvas[0] - resized[0]), (0, canvas[1] - resized[1])]
    return np.pad(bitmap, padding)


def roi_align(bitmap, box, out=7):
    """mmcv's RoIAlign (aligned, adaptive) of one box, sample by sample; outside of a map is 0."""
    height, width = bitmap.shape
    left, top, right, bottom = np.array(box) - 0.5

    def value(y, x):
        total = 0.0
        for row in (int(np.floor(y)), int(np.floor(y)) + 1):
            for column in (int(np.floor(x)), int(np.floor(x)) + 1):
                if 0 <= row < height and 0 <= column < width:
                    weight = (1 - abs(y - row)) * (1 - abs(x - column))
                    total += weight * bitmap[row, column]
        return total

    step_y, step_x = (bottom - top) / out, (right - left) / out
    rows, columns = int(np.ceil(step_y)), int(np.ceil(step_x))
    result = np.zeros((out, out))
    for i in range(out):
        for j in range(out):
            for r in range(rows):
                for c in range(columns):
                    y = top + (i + (r + 0.5) / rows) * step_y
                    x = left + (j + (c + 0.5) / columns) * step_x
                    result[i, j] += value(y, x) / (rows * columns)
    return result


def scaled(box, size, resized, mirrored):
    box = np.array(box) * np.array([resized[1] / size[1], resized[0] / size[0]] * 2)
    if mirrored:
        box[[0, 2]] = resized[1] - box[[2, 0]]
    return box


@pytest.mark.parametrize('mirrored', [False, True])
@pytest.mark.parametrize('resized', [(45, 70), (51, 80), (30, 47), (60, 93)])
@pytest.mark.parametrize('cells', [64, 112])
def test_small_boxes_keep_every_pixel(resized, mirrored, cells):
    canvas = (64, 128)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        segmentation, box = polygon(rng, SIZE, high=0.6)
        box = scaled(box, SIZE, resized, mirrored)
        whole = their_bitmap(segmentation, SIZE, resized, mirrored, canvas)
        grid = resized_grid(SIZE, resized, mirrored)
        crop, region = crop_mask(draw_mask(segmentation, SIZE), box, grid, canvas, cells)
        assert (crop.dtype, region.dtype) == (np.uint8, np.float32)
        left, top, right, bottom = region.astype(int)
        assert (right - left, bottom - top) == (cells, cells)
        np.testing.assert_array_equal(region, (left, top, right, bottom))
        expected = np.zeros((cells, cells), np.uint8)
        part = whole[top : top + cells, left : left + cells]
        expected[: part.shape[0], : part.shape[1]] = part
        np.testing.assert_array_equal(crop, expected)
        # Nothing is lost, and the canvas is left only where it is smaller than the crop.
        assert crop.sum() == whole.sum() > 0
        assert left >= 0
        assert top >= 0
        assert right <= max(canvas[1], cells)
        assert bottom <= max(canvas[0], cells)


def test_roi_align_of_a_crop_is_that_of_the_whole_bitmap():
    resized, canvas, cells = (48, 75), (64, 96), 40
    rng = np.random.default_rng(3)
    for mirrored in (False, True):
        segmentation, box = polygon(rng, SIZE, high=0.45)
        box = scaled(box, SIZE, resized, mirrored)
        whole = their_bitmap(segmentation, SIZE, resized, mirrored, canvas)
        grid = resized_grid(SIZE, resized, mirrored)
        crop, region = crop_mask(draw_mask(segmentation, SIZE), box, grid, canvas, cells)
        origin = np.tile(region[:2], 2)
        for _ in range(4):
            proposal = np.clip(box + rng.normal(0, 4, 4), 0, np.tile((75, 48), 2))
            there, here = roi_align(whole, proposal), roi_align(crop, proposal - origin)
            np.testing.assert_allclose(here, there, atol=1e-6)
            assert there.max() > 0


@pytest.mark.parametrize(
    ('box', 'expected'),
    [
        ((10, 5, 20, 15), (7, 2, 23, 18)),  # In the middle.
        ((0, 0, 10, 10), (0, 0, 16, 16)),
        ((60.5, 40, 69.5, 45), (57, 34, 73, 50)),  # The canvas goes on where the image ends.
        ((70, 41, 79, 45), (64, 34, 80, 50)),
        ((10.2, 5.9, 26, 21), (10, 5, 26, 21)),  # Just fits.
        ((10.2, 5.9, 26.1, 21), (10, 5, 27, 21)),  # One pixel too wide.
        ((3.3, 1.5, 60.2, 44.9), (3, 1, 61, 45)),
    ],
)
def test_regions(box, expected):
    mask = np.ones(SIZE, np.uint8)
    grid = resized_grid(SIZE, SIZE, mirrored=False)
    crop, region = crop_mask(mask, np.array(box, np.float32), grid, (50, 80), 16)
    np.testing.assert_array_equal(region, expected)
    assert crop.shape == (16, 16)


def test_large_boxes_are_sampled_at_a_lower_resolution():
    rng = np.random.default_rng(5)
    segmentation, box = polygon(rng, SIZE, low=0.6)
    resized, canvas, cells = (400, 622), (416, 640), 56
    box = scaled(box, SIZE, resized, mirrored=False)
    whole = their_bitmap(segmentation, SIZE, resized, False, canvas).astype(float)
    grid = resized_grid(SIZE, resized, mirrored=False)
    crop, region = crop_mask(draw_mask(segmentation, SIZE), box, grid, canvas, cells)
    assert set(np.unique(crop)) == {0, 1}
    # Each cell says what most of its pixels say.
    left, top, right, bottom = region
    ys = (np.arange(cells * 20) + 0.5) / 20 * (bottom - top) / cells + top
    xs = (np.arange(cells * 20) + 0.5) / 20 * (right - left) / cells + left
    fine = whole[ys.astype(int)][:, xs.astype(int)].reshape(cells, 20, cells, 20).mean(axis=(1, 3))
    clear = np.abs(fine - 0.5) > 0.1
    np.testing.assert_array_equal(crop[clear], fine[clear] > 0.5)
    assert clear.mean() > 0.95
    area = crop.sum() * (right - left) * (bottom - top) / cells**2
    assert area == pytest.approx(whole.sum(), rel=0.02)


def test_one_axis_may_fit_where_the_other_does_not():
    rng = np.random.default_rng(6)
    mask = rng.integers(0, 2, (200, 30), dtype=np.uint8)
    grid = resized_grid((200, 30), (200, 30), mirrored=False)
    box = np.array((4, 10, 24, 190), np.float32)
    crop, region = crop_mask(mask, box, grid, (224, 32), 30)
    np.testing.assert_array_equal(region, (0, 10, 30, 190))
    shares = mask[10:190].reshape(30, 6, 30).mean(axis=1)
    np.testing.assert_array_equal(crop, shares >= 0.5)


def test_every_form_of_a_segmentation_is_drawn():
    rng = np.random.default_rng(7)
    mask = np.asfortranarray(rng.integers(0, 2, SIZE, dtype=np.uint8))
    lengths = coco_masks.encode(mask)
    compressed = {'size': list(SIZE), 'counts': lengths['counts'].decode()}
    changes = np.flatnonzero(np.diff(mask.ravel(order='F'), prepend=0))
    counts = np.diff(changes, prepend=0, append=mask.size).tolist()
    np.testing.assert_array_equal(draw_mask(compressed, SIZE), mask)
    np.testing.assert_array_equal(draw_mask({'size': list(SIZE), 'counts': counts}, SIZE), mask)
    two = [[5, 5, 20, 5, 20, 20, 5, 20], [15, 15, 40, 15, 40, 40, 15, 40]]
    expected = np.zeros(SIZE, np.uint8)
    expected[5:20, 5:20] = expected[15:40, 15:40] = 1
    np.testing.assert_array_equal(draw_mask(two, SIZE), expected)


@pytest.mark.parametrize(
    ('segmentation', 'message'),
    [
        (None, 'is neither'),
        ([[1, 2, 3]], 'has a polygon'),
        ({'size': [9, 9], 'counts': [81]}, 'is of size'),
        ({'size': list(SIZE), 'counts': [7, 3]}, 'do not add up'),
        ({'size': list(SIZE), 'counts': 'oo'}, 'damaged compressed'),
    ],
)
def test_damaged_segmentations_are_errors(segmentation, message):
    with pytest.raises(DataError, match=f'a segmentation .*{message}'):
        draw_mask(segmentation, SIZE)
