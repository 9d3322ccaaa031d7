"""Masks against a loop over pixels, against PyTorch's grid_sample, and against pycocotools."""

import numpy as np
import pytest
from pycocotools import mask as coco_masks

from gcnet_jax.ops.masks import PastedMask, paste_mask, run_lengths


def smooth(rng, side=28, contrast=3.0):
    return (1 / (1 + np.exp(-contrast * rng.normal(size=(side, side))))).astype(np.float32)


def whole(mask, size):
    image = np.zeros(size, bool)
    rows, columns = mask.inside.shape
    image[mask.top : mask.top + rows, mask.left : mask.left + columns] = mask.inside
    return image


def sample(probabilities, x, y):
    """Bilinear interpolation in float64, cell by cell; zero outside of the mask."""
    value = 0.0
    for i, row in enumerate(probabilities):
        for j, cell in enumerate(row):
            value += max(1 - abs(y - i), 0) * max(1 - abs(x - j), 0) * cell
    return value


@pytest.mark.parametrize(
    'box',
    [
        (3.2, 4.7, 17.9, 20.1),  # Smaller than the mask's cells.
        (0, 0, 24, 22),  # The whole image.
        (5, 6, 5.4, 6.3),  # Within a pixel.
        (7.5, 2.5, 11.5, 19.5),  # Edges through the pixels' centres.
        (-6.5, -3, 40, 9.5),  # Beyond the image.
        (20, 18, 24, 22),  # In the corner.
    ],
)
def test_each_pixel_interpolates_at_its_centre(box):
    size, rng = (22, 24), np.random.default_rng(3)
    probabilities = smooth(rng, side=7)
    left, top, right, bottom = box
    expected = np.zeros(size)
    for y, x in np.ndindex(size):
        u = (x + 0.5 - left) / (right - left) * 7 - 0.5
        v = (y + 0.5 - top) / (bottom - top) * 7 - 0.5
        expected[y, x] = sample(probabilities, u, v)
    assert not (np.abs(expected - 0.5) < 1e-5).any()
    actual = whole(paste_mask(probabilities, np.float32(box), size), size)
    np.testing.assert_array_equal(actual, expected >= 0.5)


def test_a_half_counts_as_inside():
    halves = np.full((4, 4), 0.5, np.float32)
    mask = whole(paste_mask(halves, np.float32([1, 1, 9, 9]), (10, 10)), (10, 10))
    expected = np.zeros((10, 10), bool)
    expected[2:8, 2:8] = True  # Half a cell from the edge on, zeros are mixed in.
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize(
    'box', [(4, 4, 4, 9), (4, 4, 9, 4), (9, 4, 4, 9), (0, 0, np.nan, 9), (0, 0, np.inf, 9)]
)
def test_a_box_without_area_is_empty(box):
    mask = paste_mask(np.ones((28, 28), np.float32), np.float32(box), (12, 12))
    assert not whole(mask, (12, 12)).any()
    assert run_lengths(mask, (12, 12)) == [144]


@pytest.mark.parametrize('box', [(30, 30, 40, 40), (-40, -40, -30, -30), (-9, 3, -4, 8)])
def test_a_box_outside_the_image_is_empty(box):
    mask = paste_mask(np.ones((28, 28), np.float32), np.float32(box), (12, 15))
    assert not whole(mask, (12, 15)).any()
    assert run_lengths(mask, (12, 15)) == [180]


@pytest.mark.torch
def test_masks_agree_with_grid_sample_to_the_last_pixel():
    import torch

    rng = np.random.default_rng(0)
    doubtful = 0
    for index in range(200):
        size = rng.integers(1, 300, 2)
        probabilities = smooth(rng, contrast=30 if index % 2 else 3)
        if index % 5 == 0:  # Many values are a half up to rounding.
            probabilities = rng.choice(np.float32([0, 0.25, 0.5, 0.75, 1]), (28, 28))
        corners = np.sort(rng.uniform(0, 1, (2, 2)) * size[::-1], axis=0)
        box = (np.round(corners) if index % 3 else corners).astype(np.float32).reshape(4)
        if box[2] <= box[0] or box[3] <= box[1]:
            continue
        axes = [
            (torch.arange(length) + 0.5 - float(low)) / float(high - low) * 2 - 1
            for length, low, high in ((size[1], box[0], box[2]), (size[0], box[1], box[3]))
        ]
        grid = torch.stack(torch.meshgrid(*axes, indexing='xy'), dim=-1)[None]
        values = torch.nn.functional.grid_sample(
            torch.from_numpy(probabilities)[None, None], grid, align_corners=False
        )[0, 0].numpy()
        doubtful += np.count_nonzero(np.abs(values - 0.5) < 1e-6)
        actual = whole(paste_mask(probabilities, box, tuple(size)), size)
        np.testing.assert_array_equal(actual, values >= 0.5)
    assert doubtful > 100


@pytest.mark.parametrize('density', [0.0, 0.1, 0.5, 0.95, 1.0])
@pytest.mark.parametrize(
    ('part', 'size'),
    [
        ((2, 3, 6, 5), (11, 13)),
        ((0, 0, 11, 13), (11, 13)),  # The whole image.
        ((0, 4, 11, 6), (11, 13)),  # Runs go on in the next column.
        ((5, 0, 6, 13), (11, 13)),  # To the bottom, and not from the top.
        ((0, 0, 1, 9), (1, 9)),
        ((4, 6, 1, 1), (5, 7)),
    ],
)
def test_run_lengths_are_those_of_pycocotools(density, part, size):
    top, left, rows, columns = part
    rng = np.random.default_rng(5)
    for _ in range(20):
        inside = rng.uniform(size=(rows, columns)) < density
        mask = PastedMask(top, left, inside)
        plain = {'size': list(size), 'counts': run_lengths(mask, size)}
        expected = coco_masks.encode(np.asfortranarray(whole(mask, size), np.uint8))
        assert coco_masks.frPyObjects(plain, *size) == expected
        assert sum(plain['counts']) == size[0] * size[1]
