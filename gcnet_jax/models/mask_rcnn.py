"""Mask R-CNN (arXiv 1703.06870) and Cascade Mask R-CNN (arXiv 1906.09756).

The rules are those of mmdetection from version 2.13 on.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float

from gcnet_jax.models.fpn import FeaturePyramid
from gcnet_jax.models.roi_heads import (
    BOX_SIZE,
    MASK_SIZE,
    BoxHead,
    Detections,
    MaskHead,
    detect,
)
from gcnet_jax.models.rpn import Proposals, RPNHead, anchor_boxes, propose
from gcnet_jax.ops.boxes import decode_deltas
from gcnet_jax.ops.roi_align import roi_align

STRIDES = (4, 8, 16, 32, 64)
# Standard deviations of the deltas of each stage of the cascade; Mask R-CNN is the first alone.
STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))


class MaskRCNN(nn.Module):
    """A detector with masks over any backbone of four stages at strides 4 to 32.

    Attributes:
      backbone: Has a method `outputs` that returns 'stage1' to 'stage4'.
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

    def __call__(
        self,
        images: Float[Array, 'batch height width 3'],
        image_sizes: Float[Array, 'batch 2'],
        *,
        train: bool,
    ) -> tuple[Detections, Float[Array, 'batch n 28 28']]:
        """Finds objects.

        Args:
          images: Normalised, then padded with zeros on the right and at the bottom to multiples of
            32 pixels. Global context sees the padding.
          image_sizes: Height and width without padding, in pixels.
          train: Whether the backbone's norms use the statistics of the batch.

        Returns:
          The detections, and for each the probability of every pixel of a 28 x 28 grid over its box
          to be of the object.
        """
        pyramid = self.pyramid(images, train=train)
        proposals = self.propose(pyramid, image_sizes)
        detections = self.detect(pyramid, proposals, image_sizes)
        return detections, self.masks(pyramid, detections)

    def pyramid(
        self, images: Float[Array, 'batch height width 3'], *, train: bool
    ) -> list[Float[Array, 'batch _ _ channel']]:
        """Returns the five maps of the neck, at strides 4 to 64."""
        maps = self.backbone.outputs(images, train=train)
        return self.neck([maps[f'stage{stage}'] for stage in (1, 2, 3, 4)])

    def propose(self, pyramid, image_sizes: Float[Array, 'batch 2']) -> Proposals:
        """Returns the proposals of every image."""
        anchors = [
            anchor_boxes(*features.shape[1:3], stride)
            for features, stride in zip(pyramid, STRIDES, strict=True)
        ]
        return propose(*self.rpn_head(pyramid), anchors, image_sizes)

    def detect(
        self, pyramid, proposals: Proposals, image_sizes: Float[Array, 'batch 2']
    ) -> Detections:
        """Returns the detections of every image."""
        boxes, logits = proposals.boxes, []
        stages = STDS[: len(self.box_head)]
        for index, stds in enumerate(stages):
            found, deltas = self.box_head[index](self._sample(pyramid, boxes, BOX_SIZE))
            logits.append(found.reshape(*boxes.shape[:2], -1))
            deltas = deltas.reshape(*boxes.shape[:2], *deltas.shape[1:])
            if index + 1 < len(stages):
                move = jax.vmap(decode_deltas, in_axes=(0, 0, None, 0))
                boxes = move(boxes, deltas[:, :, 0], stds, image_sizes)
        mean = sum(logits) / len(logits)
        return detect(boxes, proposals.valid, mean, deltas, stages[-1], image_sizes)

    def masks(self, pyramid, detections: Detections) -> Float[Array, 'batch n 28 28']:
        """Returns the mask of every detection, as probabilities on a grid over its box."""
        features = self._sample(pyramid, detections.boxes, MASK_SIZE)
        labels = detections.labels.reshape(-1)
        masks = [jax.nn.sigmoid(head(features, labels)) for head in self.mask_head]
        mean = sum(masks) / len(masks)
        return mean.reshape(*detections.labels.shape, *mean.shape[1:])

    def _sample(
        self, pyramid, boxes: Float[Array, 'batch n 4'], size: int
    ) -> Float[Array, 'batch_n {size} {size} channel']:
        batch, count, _ = boxes.shape
        images = jnp.repeat(jnp.arange(batch), count)
        return roi_align(pyramid[:4], STRIDES[:4], boxes.reshape(-1, 4), images, size)
