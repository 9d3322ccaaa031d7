"""The region proposal network (Ren et al., arXiv 1506.01497): where there may be an object.

As in mmdetection from version 2.13 on. Anchors over the padding are kept, as there.
"""

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jax import lax
from jaxtyping import Array, Bool, Float

from gcnet_jax.context.common import float32_or_wider
from gcnet_jax.models.layers import Conv
from gcnet_jax.ops.boxes import decode_deltas
from gcnet_jax.ops.nms import keep_sorted, separate, sort_by_score

# Height over width of the three anchors at every position, and their side in strides.
RATIOS = (0.5, 1.0, 2.0)
SCALE = 8
STDS = (1.0, 1.0, 1.0, 1.0)
# Candidates of each level before suppression, and proposals of an image behind it; in training
# both are others, see `detector_training`.
CANDIDATES, PROPOSALS = 1000, 1000
THRESHOLD = 0.7


class Proposals(NamedTuple):
    """Boxes of one image, or with a batch dimension in front, the most probable first.

    Attributes:
      boxes: In pixels of the network's input, clipped to the image.
      scores: Probability that there is an object.
      valid: False where there are fewer proposals than places.
    """

    boxes: Float[Array, '*batch n 4']
    scores: Float[Array, '*batch n']
    valid: Bool[Array, '*batch n']


class RPNHead(nn.Module):
    """Three logits and three times four deltas at every position, the same on every level."""

    channels: int = 256
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, pyramid: Sequence[Float[Array, 'batch _ _ channel']]
    ) -> tuple[list[Float[Array, 'batch n']], list[Float[Array, 'batch n 4']]]:
        """Returns logits and deltas of every level, `n = height * width * 3`: anchors go last."""

        def conv(name: str, features: int, size: int) -> Conv:
            return Conv(features, size, use_bias=True, dtype=self.dtype, name=name)

        shared = conv('conv', self.channels, 3)
        logits, deltas = conv('logits', len(RATIOS), 1), conv('deltas', 4 * len(RATIOS), 1)
        outputs = [nn.relu(shared(features)) for features in pyramid]
        batch = pyramid[0].shape[0]
        dtype = float32_or_wider(outputs[0].dtype)
        return (
            [logits(values).reshape(batch, -1).astype(dtype) for values in outputs],
            [deltas(values).reshape(batch, -1, 4).astype(dtype) for values in outputs],
        )


def anchor_boxes(height: int, width: int, stride: int) -> Float[Array, 'n 4']:
    """Returns one level's anchors by row, column and ratio, centred on multiples of stride.

    Computed in the program, not a constant of it: a TPU would pad each box to 128 numbers.
    """
    roots = np.sqrt(np.asarray(RATIOS, np.float32))
    half = np.stack([stride * SCALE / roots, stride * SCALE * roots], axis=1) / 2
    around = np.concatenate([-half, half], axis=1).astype(np.float32)
    x, y = (jnp.arange(length, dtype=jnp.float32) * stride for length in (width, height))
    centre = jnp.stack(jnp.broadcast_arrays(x[None, :], y[:, None]), axis=-1)
    return (jnp.tile(centre, 2)[:, :, None] + around[None, None]).reshape(-1, 4)


def propose(
    logits: Sequence[Float[Array, 'batch _']],
    deltas: Sequence[Float[Array, 'batch _ 4']],
    anchors: Sequence[Float[Array, '_ 4']],
    image_sizes: Float[Array, 'batch 2'],
    candidates: int = CANDIDATES,
    count: int = PROPOSALS,
) -> Proposals:
    """Chooses the proposals of every image.

    Args:
      logits, deltas: Of `RPNHead`, for every level.
      anchors: Of every level.
      image_sizes: Height and width of the images without padding, in pixels.
      candidates: Boxes of each level that suppression chooses among.
      count: Proposals of an image, at most.
    """

    def of_image(logits, deltas, image_size):
        levels = [
            _candidates(*level, image_size, candidates)
            for level in zip(logits, deltas, anchors, strict=True)
        ]
        boxes, scores = (jnp.concatenate(parts) for parts in zip(*levels, strict=True))
        valid = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        sizes = [len(level[1]) for level in levels]
        groups = jnp.asarray(np.repeat(np.arange(len(levels)), sizes))
        moved = separate(boxes, groups, valid)
        kept = []
        for start, size in zip(np.cumsum([0, *sizes]), sizes, strict=False):
            part = slice(int(start), int(start) + size)
            order = sort_by_score(scores[part], valid[part])
            keep = keep_sorted(moved[part][order], valid[part][order], THRESHOLD)
            kept.append(jnp.zeros(size, bool).at[order].set(keep))
        left = jnp.where(jnp.concatenate(kept), scores, -jnp.inf)
        best, index = lax.top_k(left, min(count, len(scores)))
        found = best > -jnp.inf
        return Proposals(
            jnp.where(found[:, None], boxes[index], 0), jnp.where(found, best, 0), found
        )

    return jax.vmap(of_image)(list(logits), list(deltas), image_sizes)


def _candidates(
    logits: Float[Array, ' n'],
    deltas: Float[Array, 'n 4'],
    anchors: Float[Array, 'n 4'],
    image_size: Float[Array, '2'],
    count: int,
) -> tuple[Float[Array, 'k 4'], Float[Array, ' k']]:
    """The best boxes of one level with their scores; all of them, unsorted, where there are few.

    Ranked by score: where the sigmoid saturates, scores tie and logits do not.
    """
    scores = jax.nn.sigmoid(logits)
    if len(anchors) > count:
        scores, index = lax.top_k(scores, count)
        anchors, deltas = anchors[index], deltas[index]
    return decode_deltas(anchors, deltas, STDS, image_size), scores
