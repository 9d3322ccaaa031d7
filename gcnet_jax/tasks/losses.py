"""The loss and what is counted beside it, per example and in float32."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
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


def balanced_weights(labels: Sequence[int], num_classes: int) -> tuple[float, ...]:
    """Returns class weights inversely proportional to the number of examples of each class.

    As in scikit-learn, `examples / (classes * examples of the class)`: every class that occurs has
    the same total weight, and the mean weight of an example is 1. A class that does not occur has
    weight 0.
    """
    counts = np.bincount(np.asarray(labels, np.int64), minlength=num_classes)
    present = np.count_nonzero(counts)
    return tuple(
        float(len(labels) / (present * count)) if count else 0.0 for count in counts.tolist()
    )


def example_weights(
    labels: Float[Array, 'batch classes'], class_weights: Sequence[float]
) -> Float[Array, ' batch']:
    """Returns each example's weight in the loss: that of its class.

    A mixed example (mixup, cutmix) has the weights of its classes mixed in the same shares. The
    labels are those before smoothing, which does not change an example's weight.
    """
    weights = jnp.asarray(class_weights, jnp.float32)
    return jnp.sum(labels.astype(jnp.float32) * weights[None, :], axis=-1)


def is_highest(
    logits: Float[Array, 'batch classes'], labels: Int[Array, ' batch']
) -> Bool[Array, ' batch']:
    """Returns for each example whether its label has the highest logit.

    Among equal logits the lowest class counts as the highest. A logit that is not a number is never
    right.
    """
    finite = jnp.all(jnp.isfinite(logits), axis=-1)
    return (jnp.argmax(logits, axis=-1) == labels) & finite
