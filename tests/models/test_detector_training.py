"""What a training step chooses and learns, and that all of it is one differentiable program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcnet_jax.models import create_model
from gcnet_jax.models.detector_training import (
    OBJECT_BOXES,
    choose_boxes,
    delta_targets,
    own_deltas,
    trained_anchors,
)
from gcnet_jax.models.mask_rcnn import STDS, STRIDES, MaskRCNN
from gcnet_jax.models.rpn import anchor_boxes
from gcnet_jax.ops.assignment import Thresholds
from gcnet_jax.ops.boxes import decode_deltas
from gcnet_jax.tasks.detection_losses import detection_losses, total_loss

pytestmark = pytest.mark.usefixtures('quick_compilation')
SHAPE, PLACES, CELLS = (64, 96), 3, 40


def make_batch():
    """Two images, of which the second is smaller and has one object."""
    boxes = np.zeros((2, PLACES, 4), np.float32)
    boxes[0, :2] = [[4, 6, 40, 44], [50.5, 20.25, 88, 60]]
    boxes[1, 0] = [10, 3, 45, 33]
    labels = np.array([[2, 0, -1], [1, -1, -1]], np.int32)
    corners = np.floor(boxes[..., :2])
    return {
        'size': np.array([[64, 96], [40, 60]], np.int32),
        'boxes': boxes,
        'labels': labels,
        'masks': np.tile(np.uint8([[1, 0], [1, 1]]).repeat(20, 0).repeat(20, 1), (2, PLACES, 1, 1)),
        'mask_boxes': np.concatenate([corners, corners + CELLS], -1) * (labels >= 0)[..., None],
    }


@pytest.fixture(
    scope='module',
    params=[pytest.param(False, marks=pytest.mark.slow), True],
    ids=['mask_rcnn', 'cascade'],
)
def step(request, random_variables):
    """(detector, its variables, the compiled function to loss, gradient and outputs)."""
    backbone = create_model('gc_resnet18', num_classes=0, widths=(8, 8, 16, 16), context=None)
    model = MaskRCNN(backbone, num_classes=3, cascade=request.param, channels=8, box_channels=16)
    images = np.random.default_rng(0).normal(size=(2, *SHAPE, 3)).astype(np.float32)
    variables = random_variables(model, images, train=False)
    batch = make_batch()

    def loss(params, seed):
        outputs = model.apply(
            {**variables, 'params': params},
            images,
            batch,
            train=False,
            rngs={'sampling': jax.random.key(seed)},
            method='training_outputs',
        )
        losses = detection_losses(outputs)
        return total_loss(losses), (losses, outputs)

    return model, variables, jax.jit(jax.value_and_grad(loss, has_aux=True))


def test_every_parameter_learns_and_only_from_finite_numbers(step):
    model, variables, compute = step
    (total, (losses, _)), gradients = compute(variables['params'], 0)
    assert np.isfinite(total)
    assert all(value > 0 for value in losses.values())
    still = set()
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        name = '/'.join(key.key for key in path)
        assert np.isfinite(gradient).all(), name
        if not gradient.any():
            still.add(name.partition('/')[0])
    # In images this small no box is read from the coarse maps, and no anchor on them is whole.
    assert still <= ({'neck'} if model.cascade else set())


def test_a_small_step_down_the_heads_gradient_lowers_the_loss_by_its_square(step):
    model, variables, compute = step
    (before, _), gradients = compute(variables['params'], 0)
    # Not of what proposes boxes, or moves them: other boxes make another loss.
    last = f'box_head_{2 if model.cascade else 0}'
    heads = [name for name in gradients if name.startswith('mask_head') or name == last]
    leaves = jax.tree.leaves([gradients[name] for name in heads])
    square = sum(float((leaf**2).sum()) for leaf in leaves)
    rate = 1e-3 * float(before) / square
    moved = jax.tree.map(lambda leaf, slope: leaf - rate * slope, variables['params'], gradients)
    moved = {**variables['params'], **{name: moved[name] for name in heads}}
    (after, _), _ = compute(moved, 0)
    assert before - after == pytest.approx(rate * square, rel=0.1)


def test_the_choice_follows_the_key(step):
    model, variables, compute = step
    outputs = [compute(variables['params'], seed)[0][1][1] for seed in (0, 0, 1)]
    for name, values in outputs[0].items():
        np.testing.assert_array_equal(values, outputs[1][name], err_msg=name)
    if not model.cascade:  # Its anchors within the image are few here: all of them are taken.
        assert not np.array_equal(outputs[0]['rpn_logits'], outputs[2]['rpn_logits'])


def test_boxes_of_objects_and_of_background(step):
    model, variables, compute = step
    outputs = compute(variables['params'], 0)[0][1][1]
    stages = len(STDS) if model.cascade else 1
    labels = make_batch()['labels']
    for stage in range(stages):
        positive, valid, found = (
            np.asarray(outputs[f'box_{name}_{stage}']) for name in ('positive', 'valid', 'labels')
        )
        assert (valid | ~positive).all()
        assert positive.sum(axis=1).min() >= 1  # The objects' own boxes at least.
        for image in range(2):
            present = set(labels[image][labels[image] >= 0])
            assert set(found[image][positive[image]]) == present
            assert (found[image][~positive[image]] == model.num_classes).all()
        assert not np.asarray(outputs[f'box_targets_{stage}'])[~positive].any()
        count = positive.sum(axis=1)
        np.testing.assert_array_equal(
            outputs[f'mask_valid_{stage}'], np.arange(OBJECT_BOXES) < count[:, None]
        )
        unused = ~np.asarray(outputs[f'mask_valid_{stage}'])[:, 32:]
        assert not np.asarray(outputs[f'mask_logits_{stage}'])[:, 32:][unused].any()


def test_masks_have_targets_of_both_kinds(step):
    _, variables, compute = step
    outputs = compute(variables['params'], 0)[0][1][1]
    assert outputs['mask_logits_0'].shape == (2, OBJECT_BOXES, 28, 28)
    targets = np.asarray(outputs['mask_targets_0'])[np.asarray(outputs['mask_valid_0'])]
    assert targets.any()
    assert not targets.all()


def test_anchors_that_count():
    image_sizes = np.float32([[64, 96], [40, 60]])
    shapes = [tuple(-(-side // stride) for side in SHAPE) for stride in STRIDES]
    anchors = [anchor_boxes(*shape, s) for shape, s in zip(shapes, STRIDES, strict=True)]
    for whole in (False, True):
        found = trained_anchors(anchors, shapes, STRIDES, image_sizes, whole=whole)
        expected = np.ones_like(found)
        for image, (height, width) in enumerate(image_sizes):
            place = 0
            for boxes in anchors:
                for left, top, right, bottom in np.asarray(boxes):
                    y, x = (top + bottom) / 2, (left + right) / 2
                    inside = y < -(-height // 32) * 32 and x < -(-width // 32) * 32
                    if whole:
                        inside &= left >= 0 and top >= 0 and right < width and bottom < height
                    expected[image, place] = inside
                    place += 1
        np.testing.assert_array_equal(found, expected)
        assert 0 < expected[1].sum() < expected[0].sum()


def test_objects_come_before_proposals_and_background_fills_up():
    # The third has no area and the last place holds none.
    objects = np.float32([[[0, 0, 20, 20], [30, 30, 60, 50], [9, 9, 9, 40], [0, 0, 0, 0]]])
    proposals = np.float32([[[1, 0, 20, 20], [70, 0, 90, 20], [31, 30, 60, 50], [9, 9, 9, 9]]])
    batch = {'boxes': objects, 'labels': np.array([[5, 7, 1, -1]], np.int32)}
    found = choose_boxes(
        proposals,
        np.array([[True, True, True, False]]),
        batch,
        Thresholds(0.5, 0.5, 0.5),
        9,
        np.random.default_rng(0).random((1, 8), np.float32),
    )
    count = int(found.valid.sum())
    assert count == 5
    expected = np.concatenate([objects[0, :2], proposals[0, [0, 2, 1]]])
    np.testing.assert_array_equal(found.boxes[0, :count], expected)
    assert found.labels[0, :count].tolist() == [5, 7, 5, 7, 9]
    assert found.objects[0, :4].tolist() == [0, 1, 0, 1]
    assert found.is_truth[0, :count].tolist() == [True, True, False, False, False]
    assert not np.asarray(found.boxes)[0, count:].any()


def test_targets_move_boxes_onto_their_objects():
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 50, (2, 6, 2))
    boxes, objects = (
        np.concatenate([low, low + rng.uniform(5, 40, low.shape)], -1).astype(np.float32)
        for _ in range(2)
    )
    positive = np.arange(6) < 4
    boxes[:, 5] = 0
    targets = delta_targets(boxes, objects, np.tile(positive, (2, 1)), STDS[0])
    moved = decode_deltas(jnp.asarray(boxes), targets, STDS[0], (1000, 1000))
    np.testing.assert_allclose(moved[:, :4], objects[:, :4], rtol=1e-5, atol=1e-4)
    assert not np.asarray(targets[:, 4:]).any()


def test_each_box_has_the_deltas_of_its_class():
    deltas = np.random.default_rng(0).normal(size=(1, 3, 4, 4)).astype(np.float32)
    labels = np.array([[2, 0, 4]])  # 4 is background, which has none.
    np.testing.assert_array_equal(own_deltas(deltas, labels)[0, :2], deltas[0, [0, 1], [2, 0]])
    np.testing.assert_array_equal(own_deltas(deltas[:, :, :1], labels), deltas[:, :, 0])
