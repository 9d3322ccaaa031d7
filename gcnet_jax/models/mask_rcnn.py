"""Mask R-CNN (arXiv 1703.06870) and Cascade Mask R-CNN (arXiv 1906.09756).

The rules are those of mmdetection from version 2.13 on.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from gcnet_jax.data.sizes import format_size
from gcnet_jax.errors import ConfigError
from gcnet_jax.models import detector_training as training
from gcnet_jax.models.fpn import FeaturePyramid
from gcnet_jax.models.roi_heads import (
    BOX_SIZE,
    MASK_SIZE,
    BoxHead,
    Detections,
    MaskHead,
    all_finite,
    detect,
)
from gcnet_jax.models.rpn import STDS as ANCHOR_STDS
from gcnet_jax.models.rpn import Proposals, RPNHead, anchor_boxes, propose
from gcnet_jax.ops.assignment import Thresholds
from gcnet_jax.ops.boxes import decode_deltas
from gcnet_jax.ops.mask_targets import mask_targets
from gcnet_jax.ops.roi_align import roi_align

STRIDES = (4, 8, 16, 32, 64)
# Masks that are computed, or skipped, together.
MASK_CHUNK = 10
# Standard deviations of the deltas of each stage of the cascade; Mask R-CNN is the first alone.
STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
# Methods that have no parameters and compute each image by itself: all their arrays are batches of
# images, and their keywords are static. A batch on several devices needs no exchange for them.
PER_IMAGE = frozenset({'choose_anchors', 'choose_boxes', 'sample'})


class MaskRCNN(nn.Module):
    """A detector with masks over any backbone with maps at strides 4, 8, 16 and 32.

    Attributes:
      backbone: Has a method `outputs` that returns 'stage1', 'stage2', ...; the last map of each
        stride is read.
      num_classes: Without the background.
      cascade: Three box heads, each on the boxes of the one before, and three mask heads.
      channels: Width of the pyramid, of the proposal network and of the mask heads.
      box_channels: Width of the box heads.
      dtype: Type of the computation. Logits, deltas and boxes are float32.
    """

    backbone: nn.Module
    num_classes: int = 80
    cascade: bool = False
    channels: int = 256
    box_channels: int = 1024
    dtype: Dtype = jnp.float32

    def setup(self):
        self.neck = FeaturePyramid(self.channels, dtype=self.dtype)
        self.rpn_head = RPNHead(self.channels, dtype=self.dtype)
        stages = len(STDS) if self.cascade else 1
        self.box_head = [
            BoxHead(self.num_classes, self.cascade, self.box_channels, dtype=self.dtype)
            for _ in range(stages)
        ]
        self.mask_head = [
            MaskHead(self.num_classes, self.channels, dtype=self.dtype) for _ in range(stages)
        ]

    def outputs(
        self,
        images: Float[Array, 'batch height width 3'],
        image_sizes: Float[Array, 'batch 2'] | None = None,
        *,
        train: bool,
    ) -> dict[str, Array]:
        """Returns every output by its name. Under `jax.jit` only those that are used are computed.

        Args:
          images: Normalised, then padded with zeros on the right and at the bottom to multiples of
            32 pixels. Global context sees the padding.
          image_sizes: Height and width without padding, in pixels; None where nothing is padded.
          train: Whether the backbone's norms use the statistics of the batch.

        Returns:
          The backbone's outputs; the pyramid's maps 'p2' to 'p6', at strides 4 to 64; 'proposals',
          the boxes of the proposal network. For each detection, best first: 'boxes' (corners in
          pixels of `images`), 'scores', 'labels', 'valid' (False for unused places) and 'masks' (on
          a 28 x 28 grid over the box, the probability that each cell belongs to the object). And
          'finite': whether an image's pyramid, logits and deltas are; if not, objects are missing.
        """
        if image_sizes is None:
            size = jnp.asarray(images.shape[1:3], jnp.float32)
            image_sizes = jnp.broadcast_to(size, (images.shape[0], 2))
        outputs = self.backbone.outputs(images, train=train)
        pyramid = self.neck(maps_by_stride(outputs, images.shape[1:3]))
        proposals = self.propose(pyramid, image_sizes)
        detections = self.detect(pyramid, proposals, image_sizes)
        # XLA computes the head once, although it is called twice.
        finite = [all_finite(values) for values in (*pyramid, *chain(*self.rpn_head(pyramid)))]
        return {
            **outputs,
            **{f'p{level}': features for level, features in enumerate(pyramid, start=2)},
            'proposals': proposals.boxes,
            **detections._asdict(),
            'masks': self.masks(pyramid, detections),
            'finite': jnp.stack([*finite, detections.finite]).all(axis=0),
        }

    def training_outputs(
        self,
        images: Float[Array, 'batch height width 3'],
        batch: Mapping[str, Array],
        *,
        train: bool,
        priorities: training.Priorities | None = None,
    ) -> dict[str, Array]:
        """Returns what a training step's loss needs, by its name.

        Which anchors and boxes are trained is drawn with the random stream 'sampling'.

        Args:
          images: As in `outputs`, of any common size.
          batch: 'size', height and width of each image without padding, [batch, 2]; its objects,
            'boxes' in pixels of `images`, float32 [batch, m, 4], 'labels', int32 [batch, m], -1
            where there is none, and their masks as crops, 'masks', uint8 [batch, m, cells, cells],
            with the part of the image that each covers, 'mask_boxes', float32 [batch, m, 4].
          train: Whether the backbone's norms use the statistics of the batch.
          priorities: Called with the number of a choice and `(batch, n)`, it returns the random
            numbers of that choice, see `gcnet_jax.ops.sampling.sample`: choice 0 is of anchors, of
            all levels by row, column and ratio; choice k of the boxes of the k-th box head, first
            the m objects' own, then the proposals, or the boxes of the head before in the order in
            which they were chosen. None draws them.

        Returns:
          Of the proposal network's trained anchors, as `detector_training.anchor_outputs` returns
          them, 'rpn_logits', 'rpn_deltas', 'rpn_targets', 'rpn_positive' and 'rpn_valid'. Of the
          trained boxes of each head k from 0, 512 of each image, 'box_logits_k', 'box_deltas_k' (of
          the label's class), 'box_targets_k', 'box_labels_k' (`num_classes` is background),
          'box_positive_k' and 'box_valid_k'. Of the first 128 of them, which are all of those that
          belong to an object, 'mask_logits_k' and 'mask_targets_k' (bool) on 28 x 28 cells, and
          'mask_valid_k'. And 'proposals', the boxes of the proposal network, best first.
        """
        if priorities is None:
            priorities = training.draw_priorities(self.make_rng('sampling'))
        rules = training.CASCADE if self.cascade else training.MASK_RCNN
        sizes = batch['size'].astype(jnp.float32)
        objects = {name: batch[name] for name in ('boxes', 'labels')}
        pyramid = self.pyramid(images, train=train)
        shapes = [features.shape[1:3] for features in pyramid]
        logits, deltas = self.rpn_head(pyramid)
        numbers = priorities(0, (len(images), sum(part.shape[1] for part in logits)))
        outputs, (boxes, _, valid) = self.choose_anchors(
            logits, deltas, sizes, objects, numbers, shapes=shapes, rules=rules
        )
        outputs['proposals'] = boxes
        for stage, thresholds in enumerate(rules.thresholds):
            count = batch['boxes'].shape[1] + boxes.shape[1]
            numbers = priorities(stage + 1, (len(images), count))
            chosen = self.choose_boxes(boxes, valid, objects, numbers, thresholds=thresholds)
            found, deltas = self._train_boxes(stage, pyramid, chosen, batch)
            outputs |= found
            outputs |= self._train_masks(stage, pyramid, chosen, batch, images.shape[1:3])
            if stage + 1 < len(rules.thresholds):
                boxes, valid = training.moved_boxes(chosen, deltas[:, :, 0], STDS[stage], sizes)
        return outputs

    def __call__(
        self,
        images: Float[Array, 'batch height width 3'],
        image_sizes: Float[Array, 'batch 2'] | None = None,
        *,
        train: bool,
    ) -> tuple[Detections, Float[Array, 'batch n 28 28']]:
        """Returns the detections and their masks; see `outputs`."""
        outputs = self.outputs(images, image_sizes, train=train)
        return Detections(*(outputs[name] for name in Detections._fields)), outputs['masks']

    def pyramid(
        self, images: Float[Array, 'batch height width 3'], *, train: bool
    ) -> list[Float[Array, 'batch _ _ channel']]:
        """Returns the five maps of the neck, at strides 4 to 64."""
        outputs = self.backbone.outputs(images, train=train)
        return self.neck(maps_by_stride(outputs, images.shape[1:3]))

    def propose(self, pyramid, image_sizes: Float[Array, 'batch 2']) -> Proposals:
        """Returns the proposals of every image."""
        anchors = [
            anchor_boxes(*features.shape[1:3], stride)
            for features, stride in zip(pyramid, STRIDES, strict=True)
        ]
        return propose(*self.rpn_head(pyramid), anchors, image_sizes)

    def choose_anchors(
        self,
        logits: list[Float[Array, 'batch _']],
        deltas: list[Float[Array, 'batch _ 4']],
        image_sizes: Float[Array, 'batch 2'],
        objects: Mapping[str, Array],
        numbers: Float[Array, 'batch n'],
        *,
        shapes: Sequence[tuple[int, int]],
        rules: training.TrainingRules,
    ) -> tuple[dict[str, Array], Proposals]:
        """Returns the proposal network's outputs that are trained, and the proposals."""
        anchors = [anchor_boxes(*shape, s) for shape, s in zip(shapes, STRIDES, strict=True)]
        allowed = training.trained_anchors(
            anchors, shapes, STRIDES, image_sizes, whole=rules.whole_anchors
        )
        outputs = training.anchor_outputs(
            jnp.concatenate(logits, axis=1),
            jnp.concatenate(deltas, axis=1),
            jnp.concatenate(anchors),
            allowed,
            ANCHOR_STDS,
            objects,
            numbers,
        )
        logits, deltas = lax.stop_gradient((logits, deltas))
        proposals = propose(
            logits, deltas, anchors, image_sizes, training.CANDIDATES, rules.proposals
        )
        return outputs, proposals

    def choose_boxes(
        self,
        boxes: Float[Array, 'batch n 4'],
        valid: Bool[Array, 'batch n'],
        objects: Mapping[str, Array],
        numbers: Float[Array, 'batch m'],
        *,
        thresholds: Thresholds,
    ) -> training.TrainedBoxes:
        """Returns the boxes that a head is trained on, see `detector_training.choose_boxes`."""
        return training.choose_boxes(boxes, valid, objects, thresholds, self.num_classes, numbers)

    def _train_boxes(
        self, stage: int, pyramid, chosen: training.TrainedBoxes, batch: Mapping[str, Array]
    ) -> tuple[dict[str, Array], Float[Array, 'batch n boxes 4']]:
        logits, deltas = self.box_head[stage](self.sample(pyramid, chosen.boxes, size=BOX_SIZE))
        logits, deltas = (
            values.reshape(*chosen.labels.shape, *values.shape[1:]) for values in (logits, deltas)
        )
        objects = jnp.take_along_axis(batch['boxes'], chosen.objects[..., None], axis=1)
        outputs = {
            'logits': logits,
            'deltas': training.own_deltas(deltas, chosen.labels),
            'targets': training.delta_targets(chosen.boxes, objects, chosen.positive, STDS[stage]),
            'labels': chosen.labels,
            'positive': chosen.positive,
            'valid': chosen.valid,
        }
        return {f'box_{name}_{stage}': values for name, values in outputs.items()}, deltas

    def _train_masks(
        self,
        stage: int,
        pyramid,
        chosen: training.TrainedBoxes,
        batch: Mapping[str, Array],
        image_shape: tuple[int, int],
    ) -> dict[str, Array]:
        chosen = jax.tree.map(lambda values: values[:, : training.OBJECT_BOXES], chosen)
        features = self.sample(pyramid, chosen.boxes, size=MASK_SIZE)
        features = features.reshape(*chosen.labels.shape, *features.shape[1:])
        labels = jnp.minimum(chosen.labels, self.num_classes - 1)
        targets = jax.vmap(partial(mask_targets, image_shape=image_shape))(
            batch['masks'], batch['mask_boxes'], chosen.boxes, chosen.objects
        )
        head, variables = self.mask_head[stage].unbind()
        logits = training.mask_logits(
            partial(head.apply, variables), features, labels, chosen.positive
        )
        return {
            f'mask_logits_{stage}': logits,
            f'mask_targets_{stage}': targets,
            f'mask_valid_{stage}': chosen.positive,
        }

    def detect(
        self, pyramid, proposals: Proposals, image_sizes: Float[Array, 'batch 2']
    ) -> Detections:
        """Returns the detections of every image."""
        boxes, logits = proposals.boxes, []
        stages = STDS[: len(self.box_head)]
        for index, stds in enumerate(stages):
            found, deltas = self.box_head[index](self.sample(pyramid, boxes, size=BOX_SIZE))
            logits.append(found.reshape(*boxes.shape[:2], -1))
            deltas = deltas.reshape(*boxes.shape[:2], *deltas.shape[1:])
            if index + 1 < len(stages):
                move = jax.vmap(decode_deltas, in_axes=(0, 0, None, 0))
                boxes = move(boxes, deltas[:, :, 0], stds, image_sizes)
        mean = sum(logits) / len(logits)
        return detect(boxes, proposals.valid, mean, deltas, stages[-1], image_sizes)

    def masks(self, pyramid, detections: Detections) -> Float[Array, 'batch n 28 28']:
        """Returns the mask of every detection, as probabilities on a grid over its box.

        Where there are fewer detections than places, the heads do not run for chunks of empty
        places, which get zeros.
        """
        features = self.sample(pyramid, detections.boxes, size=MASK_SIZE)
        labels = detections.labels.reshape(-1)
        if self.is_initializing():
            masks = _mean_mask(self.mask_head, features, labels)
        else:
            masks = self._masks_of_chunks(features, labels, detections.valid.reshape(-1))
        return masks.reshape(*detections.labels.shape, *masks.shape[1:])

    def _masks_of_chunks(self, features, labels: Int[Array, ' n'], valid: Bool[Array, ' n']):
        # Modules cannot be called inside JAX's loops, functions of their variables can.
        heads = [
            partial(module.apply, variables)
            for module, variables in (head.unbind() for head in self.mask_head)
        ]
        size = math.gcd(MASK_CHUNK, len(labels))

        def compute(chunk):
            return _mean_mask(heads, *chunk)

        def compute_or_skip(chunk):
            *given, valid = chunk
            shape = jax.eval_shape(compute, given).shape
            return lax.cond(valid.any(), compute, lambda _: jnp.zeros(shape, jnp.float32), given)

        chunks = [
            values.reshape(-1, size, *values.shape[1:]) for values in (features, labels, valid)
        ]
        masks = lax.map(compute_or_skip, tuple(chunks))
        return masks.reshape(-1, *masks.shape[2:])

    def sample(
        self, pyramid, boxes: Float[Array, 'batch n 4'], *, size: int
    ) -> Float[Array, 'batch_n {size} {size} channel']:
        """Returns the features of every image's boxes."""
        batch, count, _ = boxes.shape
        images = jnp.repeat(jnp.arange(batch), count)
        return roi_align(pyramid[:4], STRIDES[:4], boxes.reshape(-1, 4), images, size)


def _mean_mask(
    heads: Sequence[Callable], features, labels: Int[Array, ' n']
) -> Float[Array, 'n 28 28']:
    """The mean of the heads' probabilities, not of their logits."""
    masks = [jax.nn.sigmoid(head(features, labels)) for head in heads]
    return sum(masks) / len(masks)


def maps_by_stride(outputs: Mapping[str, Array], size: tuple[int, int]) -> list[Array]:
    """Returns the backbone's last map at each of the strides 4, 8, 16 and 32.

    Raises:
      ConfigError: It has none at one of them.
    """
    stages = {name: value for name, value in outputs.items() if name.startswith('stage')}
    shapes = {value.shape[1:3]: value for value in stages.values()}
    maps = [shapes.get(tuple(-(-side // stride) for side in size)) for stride in STRIDES[:4]]
    if any(features is None for features in maps):
        found = ', '.join(f'{name} {format_size(v.shape[1:3])}' for name, v in stages.items())
        raise ConfigError(
            f'a detector needs a backbone with maps at strides 4, 8, 16 and 32; for an image of '
            f'{format_size(size)} pixels this one has {found}'
        )
    return maps
