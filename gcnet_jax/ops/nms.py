"""Greedy non-maximum suppression with static shapes: exact, on any device, in a few rounds.

Greedy suppression goes through the boxes by falling score and keeps each one that overlaps no kept
box by more than the threshold. Both functions here give that result without a loop over boxes.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from gcnet_jax.ops.boxes import intersection_over_union


def keep_sorted(
    boxes: Float[Array, 'n 4'], valid: Bool[Array, ' n'], threshold: float
) -> Bool[Array, ' n']:
    """Returns which boxes greedy suppression keeps.

    Box j is kept unless a kept box before it overlaps it by more than `threshold`. Starting from
    "all are kept", that rule is applied until nothing changes; after k rounds the first k boxes at
    least are final, so the fixed point is the greedy result. A thousand boxes take about five.

    Args:
      boxes: By falling score.
      valid: False for entries that are there for the shape alone; they are not kept.
      threshold: The largest overlap (intersection over union) of two kept boxes.
    """
    index = jnp.arange(boxes.shape[0])
    overlaps = (intersection_over_union(boxes, boxes) > threshold) & (
        index[:, None] < index[None, :]
    )

    def apply_rule(state: tuple[Array, Array]) -> tuple[Array, Array]:
        kept, _ = state
        return valid & ~(overlaps & kept[:, None]).any(axis=0), kept

    first = apply_rule((valid, valid))
    return lax.while_loop(lambda state: (state[0] != state[1]).any(), apply_rule, first)[0]


def pick_best(
    boxes: Float[Array, 'n 4'],
    scores: Float[Array, ' n'],
    valid: Bool[Array, ' n'],
    threshold: float,
    count: int,
) -> tuple[Int[Array, ' count'], Bool[Array, ' count']]:
    """Returns the indices of the `count` best boxes that greedy suppression keeps.

    The best box that is left is taken `count` times; each time, what it overlaps by more than
    `threshold` leaves. Any number of boxes may enter.

    Returns:
      The indices by falling score (of equal scores the lower index first), and which of them are
      there: fewer than `count` boxes may be kept.
    """

    def take(left: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        best = jnp.argmax(left)
        found = left[best] > -jnp.inf
        overlap = intersection_over_union(boxes[best, None], boxes)[0]
        left = jnp.where(overlap > threshold, -jnp.inf, left).at[best].set(-jnp.inf)
        return left, (best, found)

    boxes, left = jnp.asarray(boxes), jnp.where(valid, scores, -jnp.inf)
    _, (indices, found) = lax.scan(take, left, None, length=count)
    return indices, found


def separate(
    boxes: Float[Array, 'n 4'], groups: Int[Array, ' n'], valid: Bool[Array, ' n']
) -> Float[Array, 'n 4']:
    """Moves every group of boxes (a class, a level) to a place of its own.

    Suppression of all boxes together then is suppression within each group. The offset is a
    multiple of the largest valid coordinate plus 1, as in mmcv's `batched_nms`: its rounding in
    float32 moves overlaps by up to 2e-3, and decisions agree only if it is the same.
    """
    largest = jnp.where(valid[:, None], boxes, -jnp.inf).max(initial=0)
    return boxes + (groups.astype(boxes.dtype) * (largest + 1))[:, None]


def sort_by_score(scores: Float[Array, ' n'], valid: Bool[Array, ' n']) -> Int[Array, ' n']:
    """Returns the order by falling score, equal scores by index, invalid entries last."""
    return jnp.argsort(-jnp.where(valid, scores, -jnp.inf), stable=True)


def suppress(
    boxes: Float[Array, 'n 4'],
    scores: Float[Array, ' n'],
    groups: Int[Array, ' n'],
    valid: Bool[Array, ' n'],
    threshold: float,
) -> tuple[Int[Array, ' n'], Bool[Array, ' n']]:
    """Suppresses within groups: the order by falling score, and which entries of it are kept."""
    order = sort_by_score(scores, valid)
    moved = separate(boxes, groups, valid)
    return order, keep_sorted(moved[order], valid[order], threshold)
