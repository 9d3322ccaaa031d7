"""Multi-label classification: any number of labels for each image, each with a sigmoid of its own.

A data set serves that stores a sequence of labels per image, such as `voc/2007`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gcnet_jax.data import on_device
from gcnet_jax.ranges import Range, number
from gcnet_jax.tasks.label_task import LabelTask
from gcnet_jax.tasks.task import Batch, Examples, Sums


@dataclasses.dataclass(frozen=True)
class MultiLabel(LabelTask):
    """Any number of labels for each image.

    A label is 1 for each class that is in the image, else 0. The loss is the sigmoid cross-entropy,
    averaged over the classes.

    Attributes:
      erasing_probability: Share of the images in which a rectangle is erased.
    """

    erasing_probability: float = 0.0

    name: ClassVar[str] = 'multilabel'
    best: ClassVar[str] = 'mAP'
    percentages: ClassVar[frozenset[str]] = frozenset({'mAP'})
    settings: ClassVar[Mapping[str, Any]] = {'erasing_probability': 0.0}
    ranges: ClassVar[Mapping[str, Range]] = {'erasing_probability': number(0, 1)}
    is_multilabel: ClassVar[bool] = True

    @classmethod
    def build(cls, settings: Mapping[str, Any], source: Any, preprocessing: Any) -> 'MultiLabel':
        cls.check_source(source)
        probability = settings['erasing_probability']
        return cls(source.num_classes, preprocessing.mean, preprocessing.std, probability)

    def prepare(self, batch: Batch, key: Array | None) -> dict[str, Array]:
        images = on_device.normalize(batch['image'], self.mean, self.std)
        if key is not None and self.erasing_probability:
            images = on_device.random_erasing(key, images, self.erasing_probability)
        return {'image': images, 'label': batch['label'].astype(jnp.float32)}

    def weight(self, batch: Batch) -> Float[Array, '']:
        return jnp.asarray(batch['image'].shape[0], jnp.float32)

    def loss(self, outputs: Mapping[str, Array], batch: Batch) -> Sums:
        logits, labels = outputs['logits'].astype(jnp.float32), batch['label']
        # -log(sigmoid(x)) where the label is 1, and -log(1 - sigmoid(x)) where it is 0.
        losses = -jax.nn.log_sigmoid(jnp.where(labels > 0, logits, -logits))
        return {'loss': jnp.sum(jnp.mean(losses, axis=-1))}

    def training_metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {'loss': sums['loss'] / sums['weight']}

    @staticmethod
    def probabilities(logits: Any, numpy: Any = jnp) -> Any:
        """The sigmoid of each label by itself."""
        # The exponent is never positive, so nothing overflows.
        exponentials = numpy.exp(-numpy.abs(logits))
        return numpy.where(logits >= 0, 1, exponentials) / (1 + exponentials)

    @classmethod
    def evaluation(cls, source: Examples) -> 'MultiLabelEvaluation':
        return MultiLabelEvaluation()


class MultiLabelEvaluation:
    """Keeps logits and labels of all examples: average precision is no sum over batches."""

    def __init__(self) -> None:
        self._logits: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []

    def add(self, results: Mapping[str, np.ndarray]) -> None:
        mask = np.asarray(results['mask'])
        self._logits.append(np.asarray(results['logits'])[mask])
        self._labels.append(np.asarray(results['label'])[mask])

    def metrics(self) -> dict[str, float]:
        """Returns the loss, and the mean of the classes' average precision as 'mAP'.

        A class that is in no image has none. See `sklearn.metrics.average_precision_score`.
        """
        from sklearn.metrics import average_precision_score  # Slow to import.

        logits, labels = np.concatenate(self._logits), np.concatenate(self._labels)
        if not np.isfinite(logits).all() or not labels.any():
            precision = float('nan')
        else:
            present = labels.any(axis=0)
            precision = average_precision_score(labels[:, present], logits[:, present])
        with np.errstate(invalid='ignore'):  # A loss that is not finite is the caller's to refuse.
            losses = np.logaddexp(0, np.where(labels > 0, -logits, logits).astype(np.float64))
        return {
            'loss': float(losses.mean(axis=1).mean()) if len(losses) else float('nan'),
            'mAP': float(precision),
            'examples': len(labels),
        }
