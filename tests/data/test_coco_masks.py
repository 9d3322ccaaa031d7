"""Segmentations from strangers: what is refused, and run lengths against pycocotools."""

import re

import numpy as np
import pytest
from pycocotools import mask as coco_masks

from gcnet_jax.data import coco_masks as checks
from gcnet_jax.data.coco_masks import decode_counts, segmentation_error

SIZE = (20, 30)
GOOD = coco_masks.encode(np.asfortranarray(np.arange(600).reshape(SIZE) % 7 < 3, np.uint8))


def text(counts):
    return {'size': [20, 30], 'counts': counts}


@pytest.mark.parametrize('density', [0.02, 0.5, 0.98])
def test_compressed_counts_are_those_of_pycocotools(density):
    rng = np.random.default_rng(0)
    for block in (1, 3, 17):
        for _ in range(5):
            height, width = rng.integers(1, 60, 2).tolist()
            mask = rng.uniform(size=(height, width)) < density
            mask = np.kron(mask, np.ones((block, block)))[:height, :width]
            encoded = coco_masks.encode(np.asfortranarray(mask, np.uint8))
            counts = decode_counts(encoded['counts'].decode())
            # By the definition: down the columns, beginning with a run of zeros.
            runs, value = [0], 0
            for pixel in mask.T.ravel():
                if pixel != value:
                    runs.append(0)
                    value = pixel
                runs[-1] += 1
            assert counts.tolist() == runs


@pytest.mark.parametrize(
    'segmentation',
    [
        [[1, 1, 5, 1, 5, 5]],
        [[1.5, 1, 5, 1, 5, 5.25], [0, 0, 3, 0, 3, 3, 0, 3]],
        [[-2, -2, 40, -2, 40, 40]],  # Beyond the image.
        text([0, 600]),
        text([600]),
        text([10, 20, 570]),
        text(GOOD['counts'].decode()),
    ],
)
def test_good_segmentations_pass_and_pycocotools_takes_them(segmentation):
    assert segmentation_error(segmentation, SIZE) is None
    if isinstance(segmentation, list) or isinstance(segmentation['counts'], list):
        encoded = coco_masks.frPyObjects(segmentation, *SIZE)
        encoded = coco_masks.merge(encoded) if isinstance(segmentation, list) else encoded
        assert encoded['size'] == [20, 30]
        assert segmentation_error(text(encoded['counts'].decode()), SIZE) is None


@pytest.mark.parametrize(
    ('segmentation', 'problem'),
    [
        (7, 'neither a list of polygons nor run lengths'),
        ({'counts': [600]}, 'neither a list of polygons nor run lengths'),
        ([1, 1, 5, 1, 5, 5], 'three or more corners'),
        ([[1, 1, 5, 5]], 'three or more corners'),
        ([[1, 1, 5, 1, 5, 5, 6]], 'three or more corners'),
        ([[1, 1, 5, 1, 5, 5], []], 'three or more corners'),
        ([[1, 1, 5, 1, 5, '5']], 'a corner that is no number'),
        ([[1, 1, 5, 1, 5, True]], 'a corner that is no number'),
        ([[1, 1, 5, 1, 5, None]], 'a corner that is no number'),
        ([[1, 1, 5, 1, 5, float('nan')]], 'a corner that is no number'),
        ([[1, float('nan'), 5, 1, 5, 5]], 'a corner that is no number'),
        ([[1, 1, 5, 1, 5, float('inf')]], 'a corner that is no number'),
        ([[1, 1, 5, 1, 5, 10**400]], 'a corner that is no number up to 1,000,000'),
        ([[1, 1, 5, 1, 5, -1e9]], 'a corner that is no number up to 1,000,000'),
        ([[0, 0, 1e6, 1e6, 0, 1e6] * 3], 'an outline of more than 2,000,000'),
        ([[0, 0, 20_000, 9] * 200], 'an outline of more than 2,000,000'),
        ({'size': [30, 20], 'counts': [600]}, r'of size \[30, 20\] in an image of height 20 and'),
        ({'size': [10**9, 10**9], 'counts': [10**18]}, r'of size \[1000000000, 1000000000\]'),
        ({'size': 'x' * 500, 'counts': [600]}, r'of size x+\.\.\.x+ in'),
        (text([599]), 'do not add up to 20 x 30'),
        (text([]), 'do not add up to 20 x 30'),
        (text([700, -100]), 'do not add up to 20 x 30'),
        (text([2**32, 600]), 'do not add up to 20 x 30'),
        (text([10**400]), 'do not add up to 20 x 30'),
        (text([600.0]), 'no whole numbers'),
        (text(['600']), 'no whole numbers'),
        (text(None), 'no whole numbers'),
        (text(''), 'damaged compressed'),
        (text('P'), 'damaged compressed'),  # More should follow.
        (text(GOOD['counts'].decode() + 'o'), 'damaged compressed'),
        (text('ooooooo0'), 'damaged compressed'),  # More bits than any count has.
        (text('a b'), 'damaged compressed'),
        (text('a\0b'), 'damaged compressed'),
        (text('aä'), 'damaged compressed'),
        (text('~~~'), 'damaged compressed'),
        (text('oooooo0'), 'do not add up'),  # Two thousand million pixels.
        (text('1' * 1000), 'do not add up'),
        (text(GOOD['counts'].decode()[:-1]), 'do not add up'),
    ],
)
def test_bad_segmentations_are_refused(segmentation, problem):
    found = segmentation_error(segmentation, SIZE)
    assert found is not None
    assert re.search(problem, found)
    assert len(found) < 150


def test_random_text_is_refused_or_adds_up():
    rng = np.random.default_rng(0)
    for _ in range(3000):
        letters = rng.integers(46, 114, rng.integers(0, 12))
        counts = ''.join(map(chr, letters))
        error = segmentation_error(text(counts), SIZE)
        if error is None:
            assert decode_counts(counts).sum() == 600


def test_what_passes_costs_little_memory():
    """The longest outline that passes, in a process's memory by pycocotools."""
    side = checks.MAX_OUTLINE / 4 - 1
    square = [[0, 0, side, 0, side, side, 0, side]]
    assert segmentation_error(square, (1000, 1000)) is None
    encoded = coco_masks.frPyObjects(square, 1000, 1000)
    assert coco_masks.area(encoded).tolist() == [1_000_000]
