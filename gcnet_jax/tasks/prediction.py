"""The prediction for one image of a network with labels, and how it is printed."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from gcnet_jax.errors import one_line

# Characters of a label that are printed.
MAX_SHOWN_LABEL = 100


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The most probable labels of one image, the most probable first.

    Attributes:
      labels: Their names; 'class 7' where the checkpoint knows no names.
      probabilities: By the softmax over all classes, or with several labels per image by the
        sigmoid of each.
      classes: Their numbers, in the order of the logits.
    """

    labels: tuple[str, ...]
    probabilities: tuple[float, ...]
    classes: tuple[int, ...]

    @property
    def label(self) -> str:
        """The most probable label."""
        return self.labels[0]

    @property
    def probability(self) -> float:
        """The probability of the most probable label."""
        return self.probabilities[0]

    @classmethod
    def highest(
        cls,
        probabilities: Float[np.ndarray, ' classes'],
        logits: Float[np.ndarray, ' classes'],
        label_names: Sequence[str],
        top_k: int,
    ) -> 'Prediction':
        """Returns the `top_k` classes of the highest logits."""
        # Stable: among equal logits the lower class comes first, as in evaluation.
        classes = np.argsort(-logits, kind='stable')[:top_k].tolist()
        return cls(
            labels=tuple(label_names[i] if label_names else f'class {i}' for i in classes),
            probabilities=tuple(probabilities[classes].tolist()),
            classes=tuple(classes),
        )

    def __str__(self) -> str:
        pairs = zip(self.labels, self.probabilities, strict=True)
        return ', '.join(
            f'{one_line(label, MAX_SHOWN_LABEL)} {probability:.1%}' for label, probability in pairs
        )
