"""The loss and what is counted beside it, per example and in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def smooth_labels(
    labels: Float[Array, 'batch classes'], smoothing: float
) -> Float[Array, 'batch classes']:
    """Spreads the share `smoothing` of each label over all classes (arXiv 1512.00567)."""
    return labels * (1.0 - smoothing) + smoothing / labels.shape[-1]


def cross_entropy(
    logits: Float[Array, 'batch classes'], labels: Float[Array, 'batch classes']
) -> Float[Array, ' batch']:
    """Returns the softmax cross-entropy of each example against its label distribution."""
    logarithms = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.sum(labels.astype(jnp.float32) * logarithms, axis=-1)


def in_top(
    logits: Float[Array, 'batch classes'], labels: Int[Array, ' batch'], count: int
) -> Bool[Array, ' batch']:
    """Says of each example whether its label is among the `count` highest logits.

    Equal logits are in the order of their classes. A logit that is not a number is never right.
    """
    logits = logits.astype(jnp.float32)
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    classes = jnp.arange(logits.shape[-1])
    higher = (logits > own) | ((logits == own) & (classes < labels[:, None]))
    return (jnp.sum(higher, axis=-1) < count) & jnp.all(jnp.isfinite(logits), axis=-1)
