"""What a classifier says about one image."""

import dataclasses

from gcnet_jax.errors import one_line

# Characters of a label that are printed.
MAX_SHOWN_LABEL = 100


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, the most probable first.

    Attributes:
      labels: Their names; 'class 7' where the checkpoint knows no names.
      probabilities: Of the softmax over all classes.
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

    def __str__(self) -> str:
        pairs = zip(self.labels, self.probabilities, strict=True)
        return ', '.join(
            f'{one_line(label, MAX_SHOWN_LABEL)} {probability:.1%}' for label, probability in pairs
        )
