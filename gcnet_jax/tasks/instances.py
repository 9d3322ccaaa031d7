"""What a detector says about one image: objects with their boxes, scores, labels and masks."""

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from gcnet_jax.errors import one_line
from gcnet_jax.ops.masks import PastedMask, paste_mask, run_lengths
from gcnet_jax.tasks.prediction import MAX_SHOWN_LABEL

# Objects that are listed in one line.
MAX_SHOWN = 10


@dataclasses.dataclass(frozen=True, eq=False)
class Instances:
    """The objects found in one image, the most certain first.

    Masks are kept as the network gives them, a small one for each box, and laid into the image when
    they are asked for: a hundred whole masks of a photograph would take gigabytes.

    Attributes:
      boxes: Left, top, right and bottom, float32, in pixels of the original image.
      scores: From 0 to 1, falling.
      labels: Names of the classes; 'class 7' where the checkpoint knows no names.
      classes: Their numbers, in the order of the network's labels.
      size: Height and width of the original image.
      mask_probabilities: How likely each cell of a box belongs to its object, float32; None for
        detectors without masks.
    """

    boxes: Float[np.ndarray, 'instances 4']
    scores: Float[np.ndarray, ' instances']
    labels: tuple[str, ...]
    classes: Int[np.ndarray, ' instances']
    size: tuple[int, int]
    mask_probabilities: Float[np.ndarray, 'instances mask_height mask_width'] | None = None

    def __post_init__(self) -> None:
        lengths = [len(self.boxes), len(self.scores), len(self.labels), len(self.classes)]
        if self.mask_probabilities is not None:
            lengths.append(len(self.mask_probabilities))
        if len(set(lengths)) > 1:
            raise ValueError(f'boxes, scores, labels, classes and masks are {lengths} in number')

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def has_masks(self) -> bool:
        """Whether the detector gives masks."""
        return self.mask_probabilities is not None

    def pasted_masks(self) -> Iterator[PastedMask]:
        """Yields each object's mask, in the part of the image that it can cover."""
        for probabilities, box in zip(self._masks(), self.boxes, strict=True):
            yield paste_mask(probabilities, box, self.size)

    @property
    def masks(self) -> Bool[np.ndarray, 'instances height width']:
        """Which pixels belong to each object; computed anew each time, a byte a pixel."""
        masks = np.zeros((len(self), *self.size), bool)
        for mask, (top, left, inside) in zip(masks, self.pasted_masks(), strict=True):
            mask[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
        return masks

    def rle(self) -> list[dict[str, Any]]:
        """Returns the masks as COCO's compressed run lengths, `{'size': ..., 'counts': ...}`.

        `size` is height and width, and `counts` text, fit for JSON. The masks need not fit into
        memory. `pycocotools.mask.encode` gives the same run lengths.
        """
        from pycocotools import mask as coco_masks

        encoded = []
        for mask in self.pasted_masks():
            plain = {'size': list(self.size), 'counts': run_lengths(mask, self.size)}
            counts = coco_masks.frPyObjects(plain, *self.size)['counts'].decode('ascii')
            encoded.append({'size': list(self.size), 'counts': counts})
        return encoded

    def select(self, threshold: float = 0.0, classes: Collection[str] | None = None) -> 'Instances':
        """Returns the objects with a score of at least `threshold`, of some classes only.

        Args:
          threshold: The lowest score that is kept.
          classes: Names of the labels that are kept; None for all.
        """
        keep = self.scores >= threshold
        if classes is not None:
            keep &= np.array([label in classes for label in self.labels], bool)
        return self.take(np.flatnonzero(keep).tolist())

    def take(self, kept: Sequence[int]) -> 'Instances':
        """Returns some of the objects, by their places in falling order of scores."""
        kept = np.array(kept, int)
        return dataclasses.replace(
            self,
            boxes=self.boxes[kept],
            scores=self.scores[kept],
            labels=tuple(self.labels[index] for index in kept),
            classes=self.classes[kept],
            mask_probabilities=self._masks()[kept] if self.has_masks else None,
        )

    def to_json(self) -> list[dict[str, Any]]:
        """Returns a dictionary for each object: label, class, score, box and mask.

        The box is left, top, right and bottom in pixels; the mask, where there is one, is that of
        `rle`.
        """
        objects = [
            {'label': label, 'class': int(number), 'score': float(score), 'box': box.tolist()}
            for label, number, score, box in zip(
                self.labels, self.classes, self.scores, self.boxes, strict=True
            )
        ]
        if self.has_masks:
            for item, mask in zip(objects, self.rle(), strict=True):
                item['mask'] = mask
        return objects

    def __str__(self) -> str:
        if not len(self):
            return 'no objects'
        shown = ', '.join(
            f'{one_line(label, MAX_SHOWN_LABEL)} {score:.2f}'
            for label, score in zip(self.labels[:MAX_SHOWN], self.scores, strict=False)
        )
        more = f' and {len(self) - MAX_SHOWN} more' if len(self) > MAX_SHOWN else ''
        return f'{len(self)} object{"s" if len(self) > 1 else ""}: {shown}{more}'

    def _masks(self) -> Float[np.ndarray, 'instances mask_height mask_width']:
        if self.mask_probabilities is None:
            raise ValueError('this detector gives no masks')
        return self.mask_probabilities
