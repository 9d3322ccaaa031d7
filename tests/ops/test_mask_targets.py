"""Targets of masks from crops against RoIAlign of the whole mask, sample by sample in float64."""

import jax
import numpy as np
import pytest

from gcnet_jax.ops.mask_targets import mask_targets

HEIGHT, WIDTH, CELLS, OUT = 64, 96, 48, 28
compute = jax.jit(mask_targets, static_argnames=('image_shape', 'out'))


def bilinear(mask, y, x):
    y, x = min(max(y, 0), mask.shape[0] - 1), min(max(x, 0), mask.shape[1] - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, mask.shape[0] - 1), min(left + 1, mask.shape[1] - 1)
    dy, dx = y - top, x - left
    return (1 - dy) * ((1 - dx) * mask[top, left] + dx * mask[top, right]) + dy * (
        (1 - dx) * mask[bottom, left] + dx * mask[bottom, right]
    )


def reference(mask, box, out=OUT):
    """mmcv's RoIAlign of the whole mask: aligned, as many samples as pixels."""
    left, top, right, bottom = np.float64(box)
    tall, wide = (bottom - top) / out, (right - left) / out
    rows, columns = int(np.ceil(tall)), int(np.ceil(wide))
    values = np.zeros((out, out))
    for y in range(out):
        for x in range(out):
            for i in range(rows):
                for j in range(columns):
                    values[y, x] += bilinear(
                        mask,
                        top - 0.5 + (y + (i + 0.5) / rows) * tall,
                        left - 0.5 + (x + (j + 0.5) / columns) * wide,
                    )
    return values / max(rows * columns, 1)


def blob(box, seed):
    left, top, right, bottom = box
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    noise = np.random.default_rng(seed).random((20, 20)) < 0.7
    mask[top:bottom, left:right] = np.kron(noise, np.ones((4, 5)))[: bottom - top, : right - left]
    return mask


def crop(mask, left, top):
    padded = np.pad(mask, CELLS)
    return padded[top + CELLS : top + 2 * CELLS, left + CELLS : left + 2 * CELLS]


# Of each object: its box, where its crop begins, and a box to be trained.
CASES = {
    'inside': ((20, 10, 60, 50), (18, 8), (22.3, 11.7, 57.9, 44.2)),
    'larger than the object': ((20, 10, 60, 50), (18, 8), (8.1, 3.3, 69.7, 58.8)),
    'in the corner': ((0, 0, 30, 40), (0, 0), (0, 0, 33.3, 41.9)),
    'in the last corner': ((60, 30, 96, 64), (55, 25), (58.2, 27.1, 96, 64)),
    'a crop beyond the border': ((0, 0, 30, 40), (-6, -5), (0, 0, 28.4, 43.3)),
    'the box of the object': ((20, 8, 48, 36), (20, 8), (20, 8, 48, 36)),
    'twice as many pixels as cells': ((30, 4, 58, 60), (28, 10), (30, 4, 86, 60)),
    'less than a pixel': ((20, 10, 60, 50), (18, 8), (30.2, 20.7, 30.6, 21.1)),
}


@pytest.mark.parametrize('name', CASES)
def test_a_crop_of_the_image_s_resolution_gives_what_the_whole_mask_gives(name):
    box, (left, top), trained = CASES[name]
    mask = blob(box, 1)
    whole = np.zeros_like(mask)  # What the crop has no room for is not part of the object.
    rows, columns = (slice(max(start, 0), start + CELLS) for start in (top, left))
    whole[rows, columns] = mask[rows, columns]
    regions = np.array([[0, 0, 0, 0], [left, top, left + CELLS, top + CELLS]], np.float32)
    masks = np.stack([np.zeros((CELLS, CELLS), np.uint8), crop(mask, left, top)])
    found = compute(
        masks, regions, np.float32([trained]), np.array([1]), image_shape=(HEIGHT, WIDTH)
    )[0]
    values = reference(whole, trained)
    # Where a cell is half covered, rounding decides, but for boxes in whole pixels.
    clear = (np.abs(values - 0.5) > 1e-5) | (np.float32(trained) % 1 == 0).all()
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(found[clear], values[clear] >= 0.5)
    assert found.any()


def test_a_crop_may_be_coarser_than_the_image():
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[8:56, 8:48] = 1
    coarse = mask.reshape(HEIGHT // 2, 2, WIDTH // 2, 2)[:, 0, :, 0]
    cells = np.zeros((CELLS, CELLS), np.uint8)
    cells[:32] = coarse[:, :CELLS]
    region = np.float32([[0, 0, 2 * CELLS, 2 * CELLS]])
    box = np.float32([[3, 2, 60, 61]])
    found = compute(cells[None], region, box, np.array([0]), image_shape=(HEIGHT, WIDTH))[0]
    expected = reference(mask, box[0]) >= 0.5
    assert (found != expected).mean() < 0.01


def test_places_without_object_and_boxes_without_area_are_harmless():
    boxes = np.float32([[0, 0, 0, 0], [10, 10, 30, 10]])
    found = compute(
        np.ones((1, CELLS, CELLS), np.uint8),
        np.zeros((1, 4), np.float32),
        boxes,
        np.zeros(2, int),
        image_shape=(HEIGHT, WIDTH),
    )
    assert not found.any()
