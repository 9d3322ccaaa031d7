"""Classification: one label for each image, learned by softmax cross-entropy."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gcnet_jax.data import on_device
from gcnet_jax.errors import ConfigError
from gcnet_jax.ranges import Range, number
from gcnet_jax.tasks.label_task import LabelTask
from gcnet_jax.tasks.losses import (
    balanced_weights,
    cross_entropy,
    example_weights,
    is_highest,
    smooth_labels,
)
from gcnet_jax.tasks.task import Batch, Examples, Sums


def _is_class_weights(value: Any) -> bool:
    if isinstance(value, str):
        return value == 'balanced'
    finite = number(0, math.inf, open_high=True)
    return isinstance(value, (tuple, list)) and all(map(finite.allows, value)) and any(value)


@dataclasses.dataclass(frozen=True)
class Classification(LabelTask):
    """One label for each image.

    Attributes:
      label_smoothing: Share of each label that is spread over all classes.
      mixup_alpha, cutmix_alpha: Parameters of the Beta distributions of the mixing weights; 0 is
        off.
      erasing_probability: Share of the images in which a rectangle is erased.
      class_weights: What an example of each class counts in the loss; None is 1 for all.
    """

    label_smoothing: float = 0.0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    erasing_probability: float = 0.0
    class_weights: tuple[float, ...] | None = None

    name: ClassVar[str] = 'classification'
    best: ClassVar[str] = 'accuracy'
    percentages: ClassVar[frozenset[str]] = frozenset({'accuracy', 'top5'})
    settings: ClassVar[Mapping[str, Any]] = {
        'label_smoothing': 0.0,
        # Beta parameters of mixup and cutmix (0: off; both: one or the other, at random), share of
        # images with an erased box.
        'mixup_alpha': 0.0,
        'cutmix_alpha': 0.0,
        'erasing_probability': 0.0,
        # What an example of each class counts in the training loss: 'balanced' (inversely to the
        # number of its examples; reads the labels of all training images at the start), or one
        # number per class. None: 1 for all.
        'class_weights': None,
    }
    ranges: ClassVar[Mapping[str, Range]] = {
        'label_smoothing': number(0, 1, open_high=True),
        'mixup_alpha': number(0),
        'cutmix_alpha': number(0),
        'erasing_probability': number(0, 1),
        'class_weights': Range(
            _is_class_weights, "'balanced' or one number from 0 per class, not all 0"
        ),
    }

    @classmethod
    def build(
        cls, settings: Mapping[str, Any], source: Any, preprocessing: Any
    ) -> 'Classification':
        cls.check_source(source)
        options = {name: settings[name] for name in cls.settings}
        options['class_weights'] = _class_weights(settings['class_weights'], source)
        return cls(source.num_classes, preprocessing.mean, preprocessing.std, **options)

    def prepare(self, batch: Batch, key: Array | None) -> dict[str, Array]:
        """Normalises, erases and mixes; the labels become distributions over the classes."""
        images = on_device.normalize(batch['image'], self.mean, self.std)
        targets = jax.nn.one_hot(batch['label'], self.num_classes)
        if key is None:
            return {'image': images, 'label': targets}
        erase_key, mix_key = jax.random.split(key)
        if self.erasing_probability:
            images = on_device.random_erasing(erase_key, images, self.erasing_probability)
        if self.mixup_alpha or self.cutmix_alpha:
            images, targets = on_device.mix(
                mix_key, images, targets, self.mixup_alpha, self.cutmix_alpha
            )
        return {'image': images, 'label': targets}

    def weight(self, batch: Batch) -> Float[Array, '']:
        if self.class_weights is None:
            return jnp.asarray(batch['image'].shape[0], jnp.float32)
        return jnp.sum(example_weights(batch['label'], self.class_weights))

    def loss(self, outputs: Mapping[str, Array], batch: Batch) -> Sums:
        logits, targets = outputs['logits'], batch['label']
        losses = cross_entropy(logits, smooth_labels(targets, self.label_smoothing))
        if self.class_weights is not None:
            losses = losses * example_weights(targets, self.class_weights)
        correct = is_highest(logits, jnp.argmax(targets, axis=-1))
        return {'loss': jnp.sum(losses), 'correct': jnp.sum(correct.astype(jnp.float32))}

    def training_metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {
            # Zero where no example of these steps counts.
            'loss': sums['loss'] / sums['weight'] if sums['weight'] else 0.0,
            'accuracy': sums['correct'] / sums['count'],
        }

    @staticmethod
    def probabilities(logits: Any, numpy: Any = jnp) -> Any:
        """The softmax."""
        exponentials = numpy.exp(logits - logits.max(axis=-1, keepdims=True))
        return exponentials / exponentials.sum(axis=-1, keepdims=True)

    @classmethod
    def evaluation(cls, source: Examples) -> 'ClassificationEvaluation':
        return ClassificationEvaluation(source.num_classes)


def _class_weights(setting: Any, source: Any) -> tuple[float, ...] | None:
    """Returns the weight of each class; 'balanced' reads the label of every image once."""
    if setting is None:
        return None
    if setting == 'balanced':
        labels = [source[index]['label'] for index in range(len(source))]
        return balanced_weights(labels, source.num_classes)
    if len(setting) != source.num_classes:
        raise ConfigError(
            f'config.task.class_weights has {len(setting)} numbers, but data set {source.name} '
            f'has {source.num_classes} labels; give one for each, in the order of the labels'
        )
    return tuple(map(float, setting))


class ClassificationEvaluation:
    """Counts of correct predictions, the loss, and the confusion matrix.

    Attributes:
      examples: Images that counted, each once.
      confusion: Number of images by their class (row) and the class they were taken for (column);
        an image whose logits are not finite is in no column, and never right.
    """

    def __init__(self, num_classes: int) -> None:
        self.examples = self._top1 = self._top5 = 0
        self._loss = 0.0
        self.confusion: Int[np.ndarray, 'classes classes'] = np.zeros(
            (num_classes, num_classes), np.int64
        )

    def add(self, results: Mapping[str, np.ndarray]) -> None:
        mask = np.asarray(results['mask'])
        # Padding is selected away, not multiplied: zero times infinity is not a number.
        logits, labels = np.asarray(results['logits'])[mask], np.asarray(results['label'])[mask]
        rows = np.arange(len(labels))
        own = logits[rows, labels][:, None]
        # Among equal logits the lower class comes first.
        first = np.arange(logits.shape[1]) < labels[:, None]
        rank = ((logits > own) | ((logits == own) & first)).sum(axis=1)
        finite = np.isfinite(logits).all(axis=1)
        highest = logits.max(axis=1, keepdims=True, initial=-np.inf)
        with np.errstate(all='ignore'):  # A loss that is not finite is the caller's to refuse.
            logarithms = np.log(np.exp(logits.astype(np.float64) - highest).sum(axis=1))
            losses = np.where(finite, logarithms + (highest - own)[:, 0], np.nan)
            self._loss += float(losses.sum())
        self.examples += len(labels)
        self._top1 += int((finite & (rank < 1)).sum())
        self._top5 += int((finite & (rank < 5)).sum())
        np.add.at(self.confusion, (labels[finite], logits[finite].argmax(axis=1)), 1)

    def metrics(self) -> dict[str, float]:
        count = self.examples or float('nan')
        return {
            'loss': self._loss / count,
            'accuracy': self._top1 / count,
            'top5': self._top5 / count,
            'examples': self.examples,
        }
