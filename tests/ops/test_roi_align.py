"""RoIAlign against the definition, sample by sample, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from gcnet_jax.ops.roi_align import pyramid_level, roi_align

STRIDES = (4, 8, 16, 32)
HEIGHT, WIDTH = 192, 320


def make_pyramid(batch=2, channels=3):
    rng = np.random.default_rng(0)
    return [
        rng.normal(size=(batch, HEIGHT // s, WIDTH // s, channels)).astype(np.float32)
        for s in STRIDES
    ]


def bilinear(features, y, x):
    """mmcv's rule: 0 beyond one pixel outside, else clamped to the map."""
    height, width = features.shape[:2]
    if not (-1 <= y <= height and -1 <= x <= width):
        return np.zeros(features.shape[-1])
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    dy, dx = y - top, x - left
    return (1 - dy) * ((1 - dx) * features[top, left] + dx * features[top, right]) + dy * (
        (1 - dx) * features[bottom, left] + dx * features[bottom, right]
    )


def reference(pyramid, box, image, out):
    box = np.float64(box)
    w, h = box[2:] - box[:2]
    level = int(np.clip(np.floor(np.log2(np.sqrt(w * h) / 56 + 1e-6)), 0, 3))
    features = np.float64(pyramid[level][image])
    x, y, w, h = (
        box[0] / STRIDES[level] - 0.5,
        box[1] / STRIDES[level] - 0.5,
        *(np.array([w, h]) / STRIDES[level]),
    )
    grid_y, grid_x = int(np.ceil(h / out)), int(np.ceil(w / out))
    result = np.zeros((out, out, features.shape[-1]))
    for row in range(out):
        for column in range(out):
            for i in range(grid_y):
                for j in range(grid_x):
                    result[row, column] += bilinear(
                        features,
                        y + row * h / out + (i + 0.5) * h / out / grid_y,
                        x + column * w / out + (j + 0.5) * w / out / grid_x,
                    )
    return result / max(grid_y * grid_x, 1)


BOXES = {
    'small': (10.3, 20.7, 33.1, 51.9),
    'of the second level': (5, 5, 117, 117),
    'of the third level': (30.5, 3.25, 310, 190.5),
    'the whole image': (0, 0, WIDTH, HEIGHT),
    'a line along the top': (0, 0, WIDTH, 1.5),
    'a column on the right': (318.2, 0, WIDTH, HEIGHT),
    'less than a pixel': (100.1, 50.2, 100.4, 50.3),
    'no width': (40, 40, 40, 80),
    'no area': (0, 0, 0, 0),
    'the last corner': (300, 180, WIDTH, HEIGHT),
}


@pytest.fixture(scope='module', params=[7, 14])
def both(request):
    pyramid, boxes = make_pyramid(), np.array(list(BOXES.values()) * 2, np.float32)
    images = np.arange(len(boxes)) % 2
    actual = jax.jit(roi_align, static_argnames=('strides', 'out'))(
        pyramid, STRIDES, boxes, images, request.param
    )
    expected = [
        reference(pyramid, box, image, request.param)
        for box, image in zip(boxes, images, strict=True)
    ]
    return np.asarray(actual), np.array(expected)


@pytest.mark.parametrize('name', BOXES)
def test_every_kind_of_box_equals_the_definition(both, name):
    actual, expected = both
    for index in (list(BOXES).index(name), list(BOXES).index(name) + len(BOXES)):
        np.testing.assert_allclose(actual[index], expected[index], atol=2e-5)


def test_levels_change_at_powers_of_two_of_56_pixels():
    side = np.array([1, 55.9, 56, 111.9, 112, 223.9, 224, 447.9, 448, 5000], np.float32)
    boxes = np.stack([0 * side, 0 * side, side, side], axis=1)
    assert pyramid_level(boxes, 4).tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3]


def test_gradients_agree_with_finite_differences(float64):
    # A window of every shape that fits into maps of this size, and boxes that share pixels.
    boxes = np.array([BOXES[name] for name in BOXES if name != 'less than a pixel'], np.float32)
    pyramid = [jnp.float64(features[..., :1]) for features in make_pyramid()]
    images = np.arange(len(boxes)) % 2
    weights = np.random.default_rng(1).normal(size=(len(boxes), 7, 7, 1))

    @jax.jit
    def compute(*pyramid):
        # Squared, so that the gradient depends on the maps.
        return (roi_align(pyramid, STRIDES, boxes, images, 7) ** 2 * weights).sum()

    assert compute(*pyramid).dtype == jnp.float64
    check_grads(compute, pyramid, 1, atol=1e-4, rtol=1e-4)


def test_boxes_get_no_gradient():
    pyramid, images = make_pyramid(), np.zeros(1, np.int32)

    def compute(boxes):
        return roi_align(pyramid, STRIDES, boxes, images, 7).sum()

    assert not jax.jit(jax.grad(compute))(jnp.array([BOXES['small']])).any()
