"""What a detector is trained on: which anchors and boxes, towards which object, as in mmdetection.

The rules are those of the training configurations of Mask R-CNN and Cascade Mask R-CNN in
mmdetection 3.3.0 (`_base_/models/{mask,cascade-mask}-rcnn_r50_fpn.py`). Everything has static
shapes: places that are left over are marked, and take no part in a loss. Nothing here has a
gradient: boxes and targets are constants of the step, as there.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from gcnet_jax.ops.assignment import IGNORED, Thresholds, assign
from gcnet_jax.ops.boxes import box_area, decode_deltas, encode_deltas
from gcnet_jax.ops.mask_targets import MASK_TARGET_SIZE
from gcnet_jax.ops.sampling import sample

# Number of anchors and of boxes of an image that are trained, and of objects' among them, at most.
ANCHORS, OBJECT_ANCHORS = 256, 128
BOXES, OBJECT_BOXES = 512, 128
# Masks of each image that are computed, or skipped where no image has one, together.
MASK_CHUNK = 16
# Candidates of each level before suppression.
CANDIDATES = 2000
ANCHOR_THRESHOLDS = Thresholds(0.7, 0.3, 0.3)
# Images count as padded to multiples of this, whatever they are padded to.
PADDING = 32

Priorities = Callable[[int, tuple[int, int]], Float[Array, 'batch n']]


@dataclasses.dataclass(frozen=True)
class TrainingRules:
    """Where the training of the two kinds of detector differs.

    Attributes:
      proposals: Boxes of an image that the proposal network hands on, at most.
      whole_anchors: Whether anchors that reach out of the image are not trained.
      thresholds: Of each box head.
    """

    proposals: int
    whole_anchors: bool
    thresholds: tuple[Thresholds, ...]


MASK_RCNN = TrainingRules(1000, False, (Thresholds(0.5, 0.5, 0.5),))
CASCADE = TrainingRules(2000, True, tuple(Thresholds(t, t, None) for t in (0.5, 0.6, 0.7)))


class TrainedBoxes(NamedTuple):
    """Boxes of every image for one box head, those of objects first.

    Attributes:
      boxes: In pixels of the network's input; zeros where not valid.
      objects: Index of the object that a box is trained towards; 0 where it is background.
      labels: Class; that of the background is the number of classes.
      positive: Whether the box is of an object.
      valid: False for places that are left over.
      is_truth: Whether the box is an object's own, and no proposal.
    """

    boxes: Float[Array, 'batch n 4']
    objects: Int[Array, 'batch n']
    labels: Int[Array, 'batch n']
    positive: Bool[Array, 'batch n']
    valid: Bool[Array, 'batch n']
    is_truth: Bool[Array, 'batch n']


def draw_priorities(key: Array) -> Priorities:
    """Returns the function that draws the random numbers of each choice."""
    return lambda choice, shape: jax.random.uniform(jax.random.fold_in(key, choice), shape)


def trained_anchors(
    anchors: Sequence[Float[Array, '_ 4']],
    shapes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    image_sizes: Float[Array, 'batch 2'],
    *,
    whole: bool,
) -> Bool[Array, 'batch n']:
    """Returns which anchors of all levels can be trained, for each image.

    Those are the anchors at positions of the image and of its padding to a multiple of 32 pixels;
    what a batch adds to that for its larger images does not count.

    Args:
      anchors: Of every level, as `anchor_boxes` returns them.
      shapes: Height and width of every level's map.
      strides: Of every level.
      image_sizes: Height and width of the images without padding, in pixels.
      whole: Whether anchors that reach out of the image (without padding) are left out.
    """
    flags = []
    padded = jnp.ceil(image_sizes / PADDING) * PADDING
    for boxes, (height, width), stride in zip(anchors, shapes, strides, strict=True):
        y, x = (jnp.arange(side, dtype=padded.dtype)[None] * stride for side in (height, width))
        flag = (y < padded[:, :1])[:, :, None] & (x < padded[:, 1:])[:, None, :]
        flag = jnp.repeat(flag.reshape(len(padded), -1), len(boxes) // (height * width), axis=1)
        if whole:
            low, high, limit = boxes[None, :, :2], boxes[None, :, 2:], image_sizes[:, None, ::-1]
            flag &= (low >= 0).all(axis=-1) & (high < limit).all(axis=-1)
        flags.append(flag)
    return jnp.concatenate(flags, axis=1)


def anchor_outputs(
    logits: Float[Array, 'batch n'],
    deltas: Float[Array, 'batch n 4'],
    anchors: Float[Array, 'n 4'],
    allowed: Bool[Array, 'batch n'],
    stds: tuple[float, float, float, float],
    batch: Mapping[str, Array],
    priorities: Float[Array, 'batch n'],
) -> dict[str, Array]:
    """Returns the proposal network's outputs at the anchors that are trained, and their targets.

    Args:
      logits, deltas: Of `RPNHead`, of all levels.
      anchors: Of all levels.
      allowed: As `trained_anchors` returns it.
      stds: Of the deltas.
      batch: 'boxes' and 'labels' are read, see `MaskRCNN.training_outputs`.
      priorities: See `gcnet_jax.ops.sampling.sample`.

    Returns:
      'rpn_logits', 'rpn_deltas', 'rpn_targets' (the deltas to be learned; 0 for background),
      'rpn_positive' and 'rpn_valid', for `ANCHORS` anchors of each image.
    """

    def of_image(logits, deltas, allowed, boxes, labels, priorities):
        assigned = assign(
            anchors, allowed, boxes, present_objects(boxes, labels), ANCHOR_THRESHOLDS
        )
        index, positive, valid = sample(assigned, priorities, ANCHORS, OBJECT_ANCHORS)
        objects = boxes[jnp.where(positive, assigned[index], 0)]
        targets = delta_targets(anchors[index], objects, positive, stds)
        return logits[index], deltas[index], targets, positive, valid

    found = jax.vmap(of_image)(logits, deltas, allowed, batch['boxes'], batch['labels'], priorities)
    names = ('rpn_logits', 'rpn_deltas', 'rpn_targets', 'rpn_positive', 'rpn_valid')
    return dict(zip(names, found, strict=True))


def choose_boxes(
    boxes: Float[Array, 'batch n 4'],
    valid: Bool[Array, 'batch n'],
    batch: Mapping[str, Array],
    thresholds: Thresholds,
    num_classes: int,
    priorities: Float[Array, 'batch m'],
) -> TrainedBoxes:
    """Chooses the boxes that a box head is trained on; the objects' own boxes are among them.

    Args:
      boxes, valid: Proposals, or the boxes of the head before.
      batch: 'boxes' and 'labels' are read, see `MaskRCNN.training_outputs`.
      thresholds: What decides which object a box belongs to.
      num_classes: The label of the background.
      priorities: For the objects' own boxes, then for `boxes`; see `gcnet_jax.ops.sampling.sample`.
    """

    def of_image(boxes, valid, objects, labels, priorities):
        present = present_objects(objects, labels)
        own = jnp.where(present, jnp.arange(len(labels)), IGNORED)
        assigned = assign(boxes, valid, objects, present, thresholds)
        assigned = jnp.concatenate([own, assigned])
        candidates = jnp.concatenate([objects, boxes])
        index, positive, valid = sample(assigned, priorities, BOXES, OBJECT_BOXES)
        chosen = jnp.where(positive, assigned[index], 0)
        return TrainedBoxes(
            jnp.where(valid[:, None], candidates[index], 0),
            chosen,
            jnp.where(positive, labels[chosen], num_classes),
            positive,
            valid,
            positive & (index < len(labels)),
        )

    return jax.vmap(of_image)(boxes, valid, batch['boxes'], batch['labels'], priorities)


def moved_boxes(
    chosen: TrainedBoxes,
    deltas: Float[Array, 'batch n 4'],
    stds: tuple[float, float, float, float],
    image_sizes: Float[Array, 'batch 2'],
) -> tuple[Float[Array, 'batch n 4'], Bool[Array, 'batch n']]:
    """Returns the boxes for the next head of a cascade, and which of them are there.

    As in mmdetection (`BBoxHead.refine_bboxes`) those are the boxes that were chosen for the head
    before, moved by its deltas, without the objects' own: these are added anew.

    Args:
      chosen: The boxes.
      deltas: What the head predicts for them, for all classes alike.
      stds: Of the deltas.
      image_sizes: Height and width of the images without padding, in pixels.
    """
    move = jax.vmap(decode_deltas, in_axes=(0, 0, None, 0))
    boxes = move(chosen.boxes, lax.stop_gradient(deltas), stds, image_sizes)
    # Without those that a diverging network makes: nothing can be sampled there.
    return boxes, chosen.valid & ~chosen.is_truth & jnp.isfinite(boxes).all(axis=-1)


def present_objects(boxes: Float[Array, 'm 4'], labels: Int[Array, ' m']) -> Bool[Array, ' m']:
    """Returns which places hold an object; one without area cannot be learned, and is left out."""
    return (labels >= 0) & (box_area(boxes) > 0)


def delta_targets(
    boxes: Float[Array, '*batch n 4'],
    objects: Float[Array, '*batch n 4'],
    positive: Bool[Array, '*batch n'],
    stds: tuple[float, float, float, float],
) -> Float[Array, '*batch n 4']:
    """Returns the deltas from boxes to their objects, in standard deviations; 0 for background."""
    # Background has no object, empty places no area.
    unit = jnp.broadcast_to(np.array([0, 0, 1, 1], np.float32), boxes.shape)
    boxes, objects = (jnp.where(positive[..., None], values, unit) for values in (boxes, objects))
    return encode_deltas(boxes, objects, stds)


def own_deltas(
    deltas: Float[Array, 'batch n boxes 4'], labels: Int[Array, 'batch n']
) -> Float[Array, 'batch n 4']:
    """Returns the deltas of each box's class, or those of all classes where there is one set."""
    if deltas.shape[2] == 1:
        return deltas[:, :, 0]
    index = jnp.minimum(labels, deltas.shape[2] - 1)[:, :, None, None]
    return jnp.take_along_axis(deltas, index, axis=2)[:, :, 0]


def mask_logits(
    head: Callable,
    features: Float[Array, 'batch n height width channel'],
    labels: Int[Array, 'batch n'],
    valid: Bool[Array, 'batch n'],
) -> Float[Array, 'batch n 28 28']:
    """Returns a mask head's logits of each box's class; zeros for chunks without a box.

    A chunk is the next few places of all images, so that images may live on different devices.
    """
    batch, count = labels.shape
    shape = (batch, MASK_CHUNK, MASK_TARGET_SIZE, MASK_TARGET_SIZE)

    def compute(chunk):
        features, labels = chunk
        return head(features.reshape(-1, *features.shape[2:]), labels.reshape(-1)).reshape(shape)

    def compute_or_skip(chunk):
        *given, valid = chunk
        dtype = jax.eval_shape(compute, given).dtype
        return lax.cond(valid.any(), compute, lambda _: jnp.zeros(shape, dtype), given)

    chunks = [
        jnp.moveaxis(values.reshape(batch, -1, MASK_CHUNK, *values.shape[2:]), 1, 0)
        for values in (features, labels, valid)
    ]
    return jnp.moveaxis(lax.map(compute_or_skip, tuple(chunks)), 0, 1).reshape(
        batch, count, *shape[2:]
    )
