"""The random choice of the boxes that a step trains: mmdetection's `RandomSampler`, static shapes.

The randomness comes in as numbers, one for each box: given the same numbers, the choice is the
same on any number of devices, and another program's choice can be repeated.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from gcnet_jax.ops.assignment import BACKGROUND


class Sample(NamedTuple):
    """Chosen boxes: the positive ones, then those of the background, each by rising index.

    Attributes:
      index: Which box.
      positive: Whether it belongs to an object.
      valid: False for places that are left over because there were too few boxes.
    """

    index: Int[Array, ' count']
    positive: Bool[Array, ' count']
    valid: Bool[Array, ' count']


def sample(
    assigned: Int[Array, ' n'],
    priorities: Float[Array, ' n'],
    count: int,
    most_positive: int,
) -> Sample:
    """Chooses at most `most_positive` boxes of objects, and fills up with background.

    Args:
      assigned: As `assign` returns it.
      priorities: Independent uniform random numbers, finite: boxes with the largest are chosen.
      count: Number of boxes.
      most_positive: Number of boxes of objects, at most; no more than `count`.
    """
    boxes = assigned.shape[0]
    missing = 2 * boxes
    positives, is_positive = _best(assigned >= 0, priorities, most_positive)
    negatives, is_negative = _best(assigned == BACKGROUND, priorities, count)
    left = count - is_positive.sum()
    is_negative &= jnp.arange(negatives.shape[0]) < left
    # Sorted as one list, in which background comes behind all objects and what is missing last.
    keys = [
        jnp.where(is_positive, positives, missing),
        jnp.where(is_negative, boxes + negatives, missing),
        jnp.full(count, missing),
    ]
    keys = jnp.sort(jnp.concatenate(keys))[:count]
    valid = keys < missing
    index = jnp.where(valid, keys % boxes, 0).astype(jnp.int32)
    return Sample(index, keys < boxes, valid)


def _best(
    candidates: Bool[Array, ' n'], priorities: Float[Array, ' n'], count: int
) -> tuple[Int[Array, ' k'], Bool[Array, ' k']]:
    """The candidates of the largest priorities, best first, and which of the places are filled."""
    count = min(count, candidates.shape[0])
    found, index = lax.top_k(jnp.where(candidates, priorities, -jnp.inf), count)
    return index, found > -jnp.inf
