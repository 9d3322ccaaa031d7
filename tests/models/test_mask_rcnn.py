"""Detectors: their parts against numpy, and the whole network as one jitted program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcnet_jax.models import create_model
from gcnet_jax.models.fpn import FeaturePyramid, upsample_nearest
from gcnet_jax.models.mask_rcnn import MaskRCNN
from gcnet_jax.models.roi_heads import BoxHead, Detections, DoubleSize, MaskHead, detect
from gcnet_jax.models.rpn import anchor_boxes, propose
from gcnet_jax.ops.roi_align import roi_align

pytestmark = pytest.mark.usefixtures('quick_compilation')
STDS = (0.1, 0.1, 0.2, 0.2)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_the_pyramid_adds_what_the_coarser_levels_know():
    maps = [draw(1, 8 // 2**k, 12 // 2**k, 3 + k, seed=k) for k in range(3)]
    model = FeaturePyramid(4)
    variables = model.init(jax.random.key(0), maps)
    pyramid = model.apply(variables, maps)
    assert [level.shape for level in pyramid] == [
        *((1, 8, 12, 4), (1, 4, 6, 4), (1, 2, 3, 4)),
        (1, 1, 2, 4),  # Twice the last stride, rounded up.
    ]
    np.testing.assert_array_equal(pyramid[3], pyramid[2][:, ::2, ::2])
    lateral = [maps[k] @ variables['params'][f'lateral{k + 1}']['kernel'][0, 0] for k in range(3)]
    for k in (1, 0):
        lateral[k] = lateral[k] + lateral[k + 1].repeat(2, axis=1).repeat(2, axis=2)
    padded = np.pad(lateral[0], ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    kernel = variables['params']['output1']['kernel']
    expected = np.einsum('bhwcyx,yxco->bhwo', windows, kernel)
    np.testing.assert_allclose(pyramid[0], expected, rtol=1e-4, atol=1e-5)


def test_nearest_upsampling_to_any_size():
    features = draw(1, 3, 2, 1)
    enlarged = upsample_nearest(jnp.asarray(features), (5, 3))
    expected = features[:, [0, 0, 1, 1, 2]][:, :, [0, 0, 1]]
    np.testing.assert_array_equal(enlarged, expected)


def test_anchors_are_centred_on_multiples_of_the_stride():
    anchors = anchor_boxes(2, 3, 8).reshape(2, 3, 3, 4)
    np.testing.assert_allclose(anchors[1, 2, 1], [16 - 32, 8 - 32, 16 + 32, 8 + 32])
    width, height = anchors[0, 0, 0, 2:] - anchors[0, 0, 0, :2]
    assert (height / width, height * width) == pytest.approx((0.5, 64**2))


def test_a_doubled_map_shares_no_pixel():
    features, kernel = draw(2, 3, 4, 5), draw(2, 2, 5, 6, seed=1)
    bias = draw(6, seed=2)
    output = DoubleSize(6).apply({'params': {'kernel': kernel, 'bias': bias}}, features)
    for a, b in np.ndindex(2, 2):
        expected = features @ kernel[a, b] + bias
        np.testing.assert_allclose(output[:, a::2, b::2], expected, rtol=1e-4, atol=1e-5)


def test_the_mask_of_one_class_is_that_of_all_classes():
    features, labels = draw(3, 4, 4, 8), np.array([2, 0, 1])
    head = MaskHead(num_classes=3, channels=8)
    variables = head.init(jax.random.key(0), features)
    every = head.apply(variables, features)
    assert every.shape == (3, 8, 8, 3)
    one = head.apply(variables, features, labels)
    expected = np.stack([every[index, ..., label] for index, label in enumerate(labels)])
    np.testing.assert_allclose(one, expected, rtol=1e-4, atol=1e-5)


def test_detections_are_suppressed_within_a_class_only():
    box = np.array([[[10, 10, 50, 50], [12, 10, 50, 50], [70, 70, 90, 90]]], np.float32)
    logits = np.full((1, 3, 3), -9, np.float32)  # Two classes, and the background.
    logits[0, 0] = [3, 2, -9]
    logits[0, 1] = [2, 4, -9]
    logits[0, 2, 2] = 9
    found = detect(
        box,
        np.ones((1, 3), bool),
        logits,
        np.zeros((1, 3, 1, 4), np.float32),
        STDS,
        np.array([[100, 100]], np.float32),
    )
    count = int(found.valid.sum())
    assert count == 2
    assert found.labels[0, :2].tolist() == [1, 0]
    np.testing.assert_allclose(found.boxes[0, :2], box[0, [1, 0]], atol=1e-4)
    expected = [np.exp(4) / (np.exp(4) + np.exp(2)), np.exp(3) / (np.exp(3) + np.exp(2))]
    np.testing.assert_allclose(found.scores[0, :2], expected, rtol=1e-4)


def test_proposals_come_by_score_and_stay_in_the_image():
    sizes = [(8, 8), (4, 4)]
    anchors = [anchor_boxes(*size, 8 * 2**k) for k, size in enumerate(sizes)]
    logits = [draw(2, len(part), seed=k) for k, part in enumerate(anchors)]
    deltas = [draw(2, len(part), 4, seed=5 + k) / 4 for k, part in enumerate(anchors)]
    proposals = jax.jit(lambda *given: propose(*given[:2], anchors, given[2]))(
        logits, deltas, np.array([[60, 50], [64, 64]], np.float32)
    )
    for index, (height, width) in enumerate([(60, 50), (64, 64)]):
        valid = np.asarray(proposals.valid[index])
        assert 10 < valid.sum() < len(valid)
        scores = np.asarray(proposals.scores[index])[valid]
        assert (np.diff(scores) <= 0).all()
        boxes = np.asarray(proposals.boxes[index])[valid]
        assert (boxes >= 0).all()
        assert (boxes[:, 2] <= width).all()
        assert (boxes[:, 3] <= height).all()


@pytest.mark.parametrize('cascade', [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_whole_detector_is_one_program_and_images_do_not_disturb_each_other(
    cascade, random_variables
):
    backbone = create_model('gc_resnet18', num_classes=0, widths=(8, 8, 16, 16), context=None)
    model = MaskRCNN(backbone, num_classes=3, cascade=cascade, channels=8, box_channels=16)
    images = draw(2, 64, 96, 3)
    sizes = np.array([[64, 90], [60, 96]], np.float32)
    variables = random_variables(model, images, sizes, train=False)
    compute = jax.jit(lambda images, sizes: model.apply(variables, images, sizes, train=False))
    detections, masks = compute(images, sizes)
    assert detections.boxes.shape == (2, 100, 4)
    assert masks.shape == (2, 100, 28, 28)
    assert detections.valid.any(axis=1).all()
    assert ((masks >= 0) & (masks <= 1)).all()
    alone, alone_masks = compute(images[1:].repeat(2, axis=0), sizes[1:].repeat(2, axis=0))
    np.testing.assert_array_equal(alone.labels[0], detections.labels[1])
    np.testing.assert_allclose(alone.boxes[0], detections.boxes[1], atol=1e-3)
    np.testing.assert_allclose(alone_masks[0], masks[1], atol=1e-4)


def test_masks_are_computed_for_chunks_that_hold_a_detection(random_variables):
    backbone = create_model('gc_resnet18', num_classes=0, widths=(4, 4, 8, 8), context=None)
    model = MaskRCNN(backbone, num_classes=3, cascade=True, channels=8, box_channels=16)
    images = draw(1, 64, 64, 3)
    variables = random_variables(model, images, train=False)
    boxes = np.tile(np.float32([[4, 8, 40, 50]]), (1, 100, 1))
    valid = (np.arange(100) < 13)[None]  # One chunk of ten, and three places of the next.
    labels = np.arange(100)[None] % 3
    detections = Detections(boxes, np.ones((1, 100), np.float32), labels, valid, np.array([True]))

    @jax.jit
    def compute(images):
        pyramid = model.apply(variables, images, train=False, method='pyramid')
        return pyramid, model.apply(variables, pyramid, detections, method='masks')

    pyramid, masks = compute(images)
    assert (np.asarray(masks[0, 20:]) == 0).all()
    features = roi_align(pyramid[:4], (4, 8, 16, 32), boxes[0, :3], np.zeros(3, int), 14)
    every = [
        MaskHead(3, 8).apply({'params': variables['params'][f'mask_head_{stage}']}, features)
        for stage in range(3)
    ]
    mean = sum(1 / (1 + np.exp(-np.asarray(logits))) for logits in every) / 3
    for index in range(20):
        expected = mean[index % 3, ..., index % 3]
        np.testing.assert_allclose(masks[0, index], expected, atol=1e-4)


def test_a_box_head_has_the_background_last():
    head = BoxHead(num_classes=4, channels=8)
    output, _ = head.init_with_output(jax.random.key(0), draw(5, 2, 2, 3))
    logits, deltas = output
    assert (logits.shape, deltas.shape) == ((5, 5), (5, 4, 4))
