"""Which object each box is trained towards: mmdetection's `MaxIoUAssigner`, with static shapes."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gcnet_jax.ops.boxes import intersection_over_union

# In place of an object's index: a box that is trained as background, and one that is not trained.
BACKGROUND, IGNORED = -1, -2


class Thresholds(NamedTuple):
    """Overlaps (intersection over union) that decide what a box is trained as.

    Attributes:
      positive: From this overlap on, a box belongs to the object that it overlaps most.
      negative: Below it, a box is background. Between the two it is not trained.
      best: Each object also gets the box, or the equally good boxes, that overlap it most, if they
        do so by this much ("low-quality matches"). That comes last: it takes a box away from
        another object. None leaves it out.
    """

    positive: float
    negative: float
    best: float | None


def assign(
    boxes: Float[Array, 'n 4'],
    valid: Bool[Array, ' n'],
    objects: Float[Array, 'm 4'],
    present: Bool[Array, ' m'],
    thresholds: Thresholds,
) -> Int[Array, ' n']:
    """Returns the object that each box is trained towards, or `BACKGROUND`, or `IGNORED`.

    Without any object every valid box is background.

    Args:
      boxes: Anchors or proposals.
      valid: False for boxes that are not trained: they are ignored and are no object's best box.
      objects: The boxes of the ground truth.
      present: False for objects that are there for the shape alone.
      thresholds: What decides.
    """
    overlaps = intersection_over_union(objects, boxes)
    overlaps = jnp.where(present[:, None] & valid[None], overlaps, -1)
    largest = overlaps.max(axis=0, initial=0)
    index = jnp.where(largest < thresholds.negative, BACKGROUND, IGNORED)
    index = jnp.where(largest >= thresholds.positive, overlaps.argmax(axis=0), index)
    if thresholds.best is not None:
        best = overlaps.max(axis=1, keepdims=True)
        is_best = (overlaps == best) & (best >= thresholds.best)
        # Of several objects with the same best box the last one has it, as in mmdetection's loop.
        last = jnp.where(is_best, jnp.arange(objects.shape[0])[:, None], -1).max(axis=0)
        index = jnp.where(last >= 0, last, index)
    return jnp.where(valid, index, IGNORED).astype(jnp.int32)
