"""A training step of a detector against mmdetection's own: every loss and the whole gradient.

Weights, images and objects are fresh every run; GCNET_SEED repeats one, and pytest prints the seed
of one that fails. Both choose the same boxes: what mmdetection's samplers drew is handed in here.
The gradient comes through the same table as the weights: it is ported like a file of them. Both
compute in float64, see `test_live_segmentation.py`.
"""

import functools
import os
import secrets

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcnet_jax.data.on_device import normalize, zero_padding
from gcnet_jax.models import detector_training, layers, mask_rcnn, rpn
from gcnet_jax.models.mask_rcnn import STRIDES
from gcnet_jax.porting import port
from gcnet_jax.stored import load_variables
from gcnet_jax.tasks.detection_losses import detection_losses, total_loss
from gcnet_jax.training.freezing import evaluate_frozen, frozen_paths, merge, split
from tests.porting.detector_weights import detector_image, detector_weights

pytestmark = pytest.mark.mmdetection

SEED = int(os.environ.get('GCNET_SEED', secrets.randbelow(10**6)))
SHAPE = (128, 160)
# The second has anchors that do not count. No side divides by 8: the middle of one of the 28 cells
# of a mask as wide as the image could be the edge of an object, and rounding decide what it is.
SIZES = np.array([[124, 156], [90, 118]], np.int32)
PLACES, CELLS = 6, 112
FROZEN = ('backbone/stem*', 'backbone/stage1_*')
# Frozen; and in images so small no whole anchor and no box is of the last two levels.
UNTRAINED = ('backbone/stem', 'backbone/stage1_', 'neck/output3/', 'neck/output4/')
CONFIGS = {
    'gc': 'mask-rcnn_r50-gcb-r16-c3-c5_fpn_1x_coco',
    'cascade_gc_dcn': 'cascade-mask-rcnn_x101-32x4d-syncbn-dconv-c3-c5-r16-gcb-c3-c5_fpn_1x_coco',
}


def make_objects(rng):
    """Boxes, labels and bitmaps of each image: large and small, and one on the image's border."""
    boxes, labels, masks = [], [], []
    for index, size in enumerate(SIZES):
        count = 4 - index
        low = rng.uniform(0, size[::-1] * 0.6, (count, 2))
        low[0] = 0
        high = np.minimum(low + rng.uniform(12, 100, (count, 2)), size[::-1])
        corners = np.concatenate([low, high], axis=1).astype(np.float32)
        # Many anchors may overlap a box in whole pixels by the same. Its sides are odd: else cells
        # of its mask can be covered by half, where rounding decides what they are.
        corners[1, :2] = np.floor(corners[1, :2])
        corners[1, 2:] = corners[1, :2] + (corners[1, 2:] - corners[1, :2]) // 2 * 2 - 1
        bitmaps = np.zeros((count, *SHAPE), np.uint8)
        for bitmap, box in zip(bitmaps, corners, strict=True):
            left, top, right, bottom = np.round(box).astype(int)
            noise = rng.random((2 * PLACES, 2 * PLACES)) < 0.7
            blobs = np.kron(noise, np.ones((10, 10), np.uint8))
            bitmap[top:bottom, left:right] = blobs[: bottom - top, : right - left]
        boxes.append(corners)
        labels.append(rng.integers(0, 80, count))
        masks.append(bitmaps)
    return boxes, labels, masks


def make_batch(boxes, labels, masks):
    """The same as the loaders lay it out: places for objects, and crops of their masks."""
    batch = {
        'size': SIZES,
        'boxes': np.zeros((2, PLACES, 4), np.float32),
        'labels': np.full((2, PLACES), -1, np.int32),
        'masks': np.zeros((2, PLACES, CELLS, CELLS), np.uint8),
        'mask_boxes': np.zeros((2, PLACES, 4), np.float32),
    }
    for image in range(2):
        for place, (box, label, mask) in enumerate(
            zip(boxes[image], labels[image], masks[image], strict=True)
        ):
            left, top = np.floor(box[:2]).astype(int)
            crop = mask[top : top + CELLS, left : left + CELLS]
            batch['boxes'][image, place] = box
            batch['labels'][image, place] = label
            batch['masks'][image, place, : crop.shape[0], : crop.shape[1]] = crop
            batch['mask_boxes'][image, place] = (left, top, left + CELLS, top + CELLS)
    return batch


def their_numbers(theirs, proposals, shapes):
    """The random numbers with which we choose what mmdetection chose: 1 for that, else 0."""
    numbers = [np.zeros(shape, np.float32) for shape in shapes]
    images = len(SIZES)
    for image in range(images):
        places = np.flatnonzero(theirs.allowed[image])
        choice = theirs.choices[image]
        chosen = np.concatenate([choice.positive, choice.negative])
        numbers[0][image, places[chosen]] = 1
        choice = theirs.choices[images + image]
        nearest, distance = pair_boxes(choice.boxes[choice.objects :], proposals[image])
        place = np.concatenate([np.arange(choice.objects), PLACES + nearest])
        found = np.concatenate([choice.positive, choice.negative])
        found = found[found >= choice.objects] - choice.objects
        assert distance[found].max() < 1e-2, 'other proposals, by a close decision'
        for stage in range(1, len(shapes)):
            choice = theirs.choices[images * stage + image]
            positive, negative = place[choice.positive], place[choice.negative]
            numbers[stage][image, np.concatenate([positive, negative])] = 1
            # The next choice is among the chosen ones, which we have by rising index.
            rank = np.concatenate(
                [positive.argsort().argsort(), len(positive) + negative.argsort().argsort()]
            )
            is_truth = np.zeros(len(rank), bool)
            is_truth[: len(choice.is_truth)] = choice.is_truth
            kept = PLACES + rank[~is_truth]
            place = np.concatenate([np.arange(choice.objects), kept])
    return numbers


def pair_boxes(theirs, ours):
    """Which of our proposals each of theirs is, and how far from it; no two are the same one.

    Where scores tie the order differs. Two levels may propose the same box, and both are trained.
    """
    distance = np.abs(theirs[:, None] - ours[None]).max(axis=-1)
    nearest = np.zeros(len(theirs), int)
    least = np.zeros(len(theirs))
    for index, row in enumerate(distance):
        nearest[index] = row.argmin()
        least[index] = row.min()
        distance[:, nearest[index]] = np.inf
    return nearest, least


def wide_anchors(stride):
    """All anchors of a level in float64, from sides that are rounded to float32."""
    roots = np.sqrt(np.asarray(rpn.RATIOS, np.float32))
    half = np.stack([stride * rpn.SCALE / roots, stride * rpn.SCALE * roots], axis=1) / 2
    y, x = (np.arange(-(-side // stride)) * stride for side in SHAPE)
    y, x = np.broadcast_arrays(y[:, None, None], x[None, :, None])
    corners = [x - half[:, 0], y - half[:, 1], x + half[:, 0], y + half[:, 1]]
    return jnp.asarray(np.stack(corners, axis=-1).reshape(-1, 4), jnp.float64)


def propose_wide(propose, logits, deltas, anchors, *options):
    """Proposals as mmdetection's: from float64 anchors, where training takes float32 ones.

    Else all boxes differ by a rounding, and with them cells of masks that are covered by half.
    """
    return propose(logits, deltas, [wide_anchors(stride) for stride in STRIDES], *options)


@functools.partial(jax.checkpoint, static_argnums=(2, 3, 4))
def convolve(features, kernel, stride=1, groups=1, dilation=1):
    """The convolution as one matrix product: in float64, XLA's own takes minutes on a CPU.

    Nine shifted copies of the input take much memory; the gradient makes them anew.
    """
    size, _, inputs, outputs = kernel.shape
    padding = dilation * (size - 1) // 2
    out = [-(-side // stride) for side in features.shape[1:3]]
    padded = jnp.pad(features, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    taps = [
        padded[:, row : row + stride * (out[0] - 1) + 1 : stride][
            :, :, column : column + stride * (out[1] - 1) + 1 : stride
        ].reshape(len(features), *out, groups, inputs)
        for row in range(0, dilation * size, dilation)
        for column in range(0, dilation * size, dilation)
    ]
    taps = jnp.concatenate(taps, axis=-1)
    kernel = kernel.reshape(size * size * inputs, groups, outputs // groups)
    output = jnp.einsum('byxgc,cgo->byxgo', taps, kernel)
    return output.reshape(len(features), *out, outputs)


def save_memory(mask_logits, head, *given):
    """The same logits, whose gradient computes the head again."""
    return mask_logits(jax.checkpoint(head), *given)


def make_step(model, variables):
    """A function `(params, batch, numbers) -> losses, gradient, outputs`, compiled."""
    frozen = frozen_paths(variables['params'], FROZEN)

    def loss(trained, fixed, batch, numbers):
        params = merge(trained, fixed)
        with nn.intercept_methods(evaluate_frozen(params, frozen)):
            outputs = model.apply(
                {**variables, 'params': params},
                batch['image'],
                batch,
                train=False,
                priorities=lambda choice, shape: numbers[choice],
                method='training_outputs',
            )
        losses = detection_losses(outputs)
        return total_loss(losses), (losses, outputs['proposals'])

    @jax.jit
    def compute(params, batch, numbers):
        trained, fixed = split(params, frozen)
        gradient = jax.grad(loss, has_aux=True)
        gradients, aux = gradient(trained, fixed, batch, numbers)
        return merge(gradients, jax.tree.map(jnp.zeros_like, fixed)), *aux

    return compute


@pytest.mark.parametrize('config', CONFIGS.values(), ids=CONFIGS)
@pytest.mark.usefixtures('float64')
def test_losses_and_gradient_of_a_step(config, tmp_path, monkeypatch):
    import torch

    from tests.training import mmdetection_training
    from tests.training.mmdetection_training import peer

    print(f'GCNET_SEED={SEED}')
    monkeypatch.setattr(layers, 'convolve', convolve)
    # Three mask heads in float64 for all places of boxes would take several gigabytes.
    frugal = functools.partial(save_memory, detector_training.mask_logits)
    monkeypatch.setattr(detector_training, 'mask_logits', frugal)
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    network = peer.build(config, train=True)
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    peer.load(network, detector_weights(shapes, SEED))

    def ported(tensors, name):
        path = tmp_path / f'{config}.pth'
        torch.save({'meta': {'epoch': 12}, 'state_dict': tensors}, path)
        description, _ = port(path, tmp_path / name)
        return description, load_variables(tmp_path / name)[1]

    description, variables = ported(network.state_dict(), 'before')
    objects = make_objects(rng)
    pixels = np.stack([detector_image(*SHAPE, SEED + index) for index in range(2)])
    images = description.preprocessing
    images = zero_padding(normalize(pixels, images.mean, images.std), SIZES)
    theirs = mmdetection_training.step(network, images, SIZES, *objects, monkeypatch)
    buffers = dict(network.named_buffers())
    _, expected = ported({**theirs.gradients, **buffers}, 'gradient')
    del network, buffers
    theirs.gradients.clear()

    model = description.build()
    model = model.clone(dtype=jnp.float64, backbone=model.backbone.clone(dtype=jnp.float64))
    variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), variables)
    batch = {**make_batch(*objects), 'image': images}
    stages = len(theirs.choices) // 2 - 1
    proposals = [1000] if stages == 1 else [2000, 512, 512]
    anchors = sum(len(wide_anchors(stride)) for stride in STRIDES)
    shapes = [(2, anchors)] + [(2, PLACES + count) for count in proposals]
    monkeypatch.setattr(mask_rcnn, 'propose', functools.partial(propose_wide, mask_rcnn.propose))
    compute = make_step(model, variables)
    numbers = [jnp.zeros(shape, jnp.float32) for shape in shapes]
    found = compute(variables['params'], batch, numbers)[2]
    numbers = their_numbers(theirs, np.asarray(found), shapes)
    gradients, losses, _ = compute(variables['params'], batch, numbers)

    check_losses(losses, theirs.losses)
    check_gradients(gradients, expected['params'])


def check_losses(ours, theirs):
    names = {'rpn_class': 'loss_rpn_cls', 'rpn_box': 'loss_rpn_bbox'}
    for kind, name in (('class', 'cls'), ('box', 'bbox'), ('mask', 'mask')):
        names |= {f'{kind}_{stage}': f's{stage}.loss_{name}' for stage in range(3)}
        if 'loss_cls' in theirs:
            names[f'{kind}_0'] = f'loss_{name}'
    for name, value in ours.items():
        weight = 0.5 ** int(name[-1]) if name[-1].isdigit() else 1.0
        print(f'{name}: {weight * float(value):.8f}, mmdetection {theirs[names[name]]:.8f}')
    for name, value in ours.items():
        weight = 0.5 ** int(name[-1]) if name[-1].isdigit() else 1.0
        assert weight * float(value) == pytest.approx(theirs[names[name]], rel=1e-4), name


def check_gradients(ours, theirs):
    differences = {}
    for (path, value), mine in zip(
        jax.tree_util.tree_leaves_with_path(theirs),
        jax.tree.leaves(jax.device_get(ours)),
        strict=True,
    ):
        name = '/'.join(key.key for key in path)
        largest = np.abs(value).max()
        if name.endswith('pool/logits/bias'):  # Below a softmax: rounding alone.
            assert np.abs(mine).max() < 1e-6
        elif largest == 0:
            assert name.startswith(UNTRAINED), name
            assert not mine.any(), name
        else:
            differences[name] = float(np.abs(mine - value).max() / largest)
    ordered = sorted(differences, key=differences.get)
    print(
        f'{len(ordered)} tensors; ' + ', '.join(f'{n} {differences[n]:.1e}' for n in ordered[-5:])
    )
    assert differences[ordered[-1]] < 1e-4
