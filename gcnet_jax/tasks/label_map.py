"""A segmenter's prediction for one image: a label for each pixel."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt

from gcnet_jax.errors import one_line
from gcnet_jax.tasks.prediction import MAX_SHOWN_LABEL

# Labels that are listed in one line.
MAX_SHOWN = 10
# A share below it is written as such, not as 0.0%.
MIN_SHARE = 0.001


@dataclasses.dataclass(frozen=True, eq=False)
class LabelMap:
    """The labels of an image's pixels.

    Attributes:
      labels: Number of the label of each pixel of the original image; uint8, or uint16 where there
        are more than 255 labels.
      label_names: Name of each label; 'class 7' where the checkpoint knows no names.
      probabilities: How likely each label is at each pixel, float32; None unless asked for.
    """

    labels: UInt[np.ndarray, 'height width']
    label_names: tuple[str, ...]
    probabilities: Float[np.ndarray, 'height width classes'] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the original image."""
        return self.labels.shape

    @property
    def pixel_counts(self) -> Int[np.ndarray, ' classes']:
        """How many pixels have each label."""
        return np.bincount(self.labels.reshape(-1), minlength=len(self.label_names))

    @property
    def shares(self) -> Float[np.ndarray, ' classes']:
        """Which part of the image has each label."""
        return self.pixel_counts / self.labels.size

    def found(self) -> list[tuple[int, int]]:
        """Returns the labels that occur, with their numbers of pixels, the most frequent first."""
        counts = self.pixel_counts
        order = np.argsort(-counts, kind='stable')
        return [(int(label), int(counts[label])) for label in order if counts[label]]

    def to_json(self) -> dict[str, Any]:
        """Returns the image's size, and of each label that occurs its share and number of pixels.

        The map itself is not in it: `write_label_map` writes one to a file.
        """
        height, width = self.size
        return {
            'height': height,
            'width': width,
            'classes': [
                {
                    'label': self.label_names[label],
                    'class': label,
                    'share': count / self.labels.size,
                    'pixels': count,
                }
                for label, count in self.found()
            ],
        }

    def __str__(self) -> str:
        found = self.found()
        shown = ', '.join(
            f'{one_line(self.label_names[label], MAX_SHOWN_LABEL)} '
            f'{format_share(count / self.labels.size)}'
            for label, count in found[:MAX_SHOWN]
        )
        return shown + (f' and {len(found) - MAX_SHOWN} more' if len(found) > MAX_SHOWN else '')


def format_share(share: float) -> str:
    """Returns the share of a label that occurs, in per cent."""
    return f'{share:.1%}' if share >= MIN_SHARE else f'<{MIN_SHARE:.1%}'
