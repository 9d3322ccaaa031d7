"""What looks at each proposal: the box head and the mask head, and the choice of detections."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int

from gcnet_jax.context.common import float32_or_wider
from gcnet_jax.models.layers import Conv
from gcnet_jax.ops.boxes import decode_deltas
from gcnet_jax.ops.nms import pick_best, separate

BOX_SIZE, MASK_SIZE = 7, 14
# Detections of an image, the lowest score of one, and the largest overlap of two of one class.
MAX_DETECTIONS, SCORE_THRESHOLD, OVERLAP_THRESHOLD = 100, 0.05, 0.5


class Detections(NamedTuple):
    """What was found in one image, or with a batch dimension in front, the most probable first.

    Attributes:
      boxes: In pixels of the network's input.
      scores: Probability of the label.
      labels: Class, from 0.
      valid: False where there are fewer detections than places.
      finite: Whether the image's logits and boxes are; where they are not, objects are missing.
    """

    boxes: Float[Array, '*batch n 4']
    scores: Float[Array, '*batch n']
    labels: Int[Array, '*batch n']
    valid: Bool[Array, '*batch n']
    finite: Bool[Array, '*batch']


class BoxHead(nn.Module):
    """Two shared dense layers, then the logits of the classes and the deltas of the box.

    Attributes:
      num_classes: Without the background, which is the last logit.
      class_agnostic: One box for all classes, as in a cascade; otherwise one for each.
      channels: Width of the dense layers.
      dtype: Type of the computation.
    """

    num_classes: int = 80
    class_agnostic: bool = False
    channels: int = 1024
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, features: Float[Array, 'n height width channel']
    ) -> tuple[Float[Array, 'n logits'], Float[Array, 'n boxes 4']]:
        """Returns logits, `num_classes + 1` of them, and deltas for 1 or `num_classes` boxes."""
        values = features.reshape(features.shape[0], -1)
        for name in ('shared1', 'shared2'):
            values = nn.relu(nn.Dense(self.channels, dtype=self.dtype, name=name)(values))
        boxes = 1 if self.class_agnostic else self.num_classes
        logits = nn.Dense(self.num_classes + 1, dtype=self.dtype, name='logits')(values)
        deltas = nn.Dense(4 * boxes, dtype=self.dtype, name='deltas')(values)
        dtype = float32_or_wider(logits.dtype)
        return logits.astype(dtype), deltas.astype(dtype).reshape(-1, boxes, 4)


class MaskHead(nn.Module):
    """Four convolutions, an upsampling to twice the size, and a mask for each class."""

    num_classes: int = 80
    channels: int = 256
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        features: Float[Array, 'n height width channel'],
        labels: Int[Array, ' n'] | None = None,
    ) -> Float[Array, 'n two_height two_width *classes']:
        """Returns mask logits of every class; with `labels` those of one class for each box."""
        values = features
        for index in range(1, 5):
            conv = Conv(self.channels, 3, use_bias=True, dtype=self.dtype, name=f'conv{index}')
            values = nn.relu(conv(values))
        values = nn.relu(DoubleSize(self.channels, dtype=self.dtype, name='upsample')(values))
        kernel = self.param(
            'kernel', nn.initializers.he_normal(), (self.channels, self.num_classes), jnp.float32
        )
        bias = self.param('bias', nn.initializers.zeros, (self.num_classes,), jnp.float32)
        values, kernel = nn.dtypes.promote_dtype(values, kernel, dtype=self.dtype)
        if labels is None:
            logits = values @ kernel
            return logits.astype(float32_or_wider(logits.dtype)) + bias[None, None, None]
        logits = jnp.einsum('nyxc,cn->nyx', values, kernel[:, labels])
        logits = logits.astype(float32_or_wider(logits.dtype))
        return logits + jnp.asarray(bias)[labels, None, None]


class DoubleSize(nn.Module):
    """A transposed 2x2 convolution of stride 2: every pixel becomes four, none of them shared."""

    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, features: Float[Array, 'n height width channel']
    ) -> Float[Array, 'n two_height two_width {self.features}']:
        """Returns `out[2i + a, 2j + b] = features[i, j] @ kernel[a, b] + bias`."""
        batch, height, width, channels = features.shape
        shape = (2, 2, channels, self.features)
        kernel = self.param('kernel', nn.initializers.he_normal(), shape, jnp.float32)
        bias = self.param('bias', nn.initializers.zeros, (self.features,), jnp.float32)
        features, kernel, bias = nn.dtypes.promote_dtype(features, kernel, bias, dtype=self.dtype)
        output = jnp.einsum('nyxc,abco->nyaxbo', features, kernel)
        return output.reshape(batch, 2 * height, 2 * width, self.features) + bias[None, None, None]


def all_finite(values: Float[Array, 'batch *any']) -> Bool[Array, ' batch']:
    """Whether no value of an image is NaN or infinite; such scores would pass for 'no object'."""
    return jnp.isfinite(values).all(axis=tuple(range(1, values.ndim)))


def detect(
    boxes: Float[Array, 'batch n 4'],
    valid: Bool[Array, 'batch n'],
    logits: Float[Array, 'batch n logits'],
    deltas: Float[Array, 'batch n boxes 4'],
    stds: tuple[float, float, float, float],
    image_sizes: Float[Array, 'batch 2'],
) -> Detections:
    """Chooses the detections of every image: best first, suppressed within each class.

    Args:
      boxes, valid: What the deltas belong to, and which of them are there.
      logits: The background is the last one.
      deltas: Of one box for all classes, or of one for each.
      stds: Of the deltas.
      image_sizes: Height and width of the images without padding, in pixels.
    """

    def of_image(boxes, valid, logits, deltas, image_size):
        scores = jax.nn.softmax(logits)[:, :-1]
        classes = scores.shape[1]
        decoded = decode_deltas(boxes[:, None], deltas, stds, image_size)
        decoded = jnp.broadcast_to(decoded, (*scores.shape, 4)).reshape(-1, 4)
        candidates = ((scores > SCORE_THRESHOLD) & valid[:, None]).reshape(-1)
        labels = jnp.tile(jnp.arange(classes), len(boxes))
        moved = separate(decoded, labels, candidates)
        best, found = pick_best(
            moved, scores.reshape(-1), candidates, OVERLAP_THRESHOLD, MAX_DETECTIONS
        )
        return Detections(
            jnp.where(found[:, None], decoded[best], 0),
            jnp.where(found, scores.reshape(-1)[best], 0),
            jnp.where(found, labels[best], 0),
            found,
            # The boxes too: those of a cascade come from the deltas of an earlier stage.
            jnp.stack([all_finite(part[None])[0] for part in (boxes, logits, deltas)]).all(),
        )

    return jax.vmap(of_image)(boxes, valid, logits, deltas, image_sizes)
