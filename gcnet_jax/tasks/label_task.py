"""What the tasks have in common whose answer about an image is labels."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from gcnet_jax.errors import ConfigError
from gcnet_jax.tasks.label_names import check_same_labels, check_splits, plan_classifier
from gcnet_jax.tasks.task import Batch, Described, OutputPlan, Task


@dataclasses.dataclass(frozen=True)
class LabelTask(Task):
    """A task on images with labels; the network has one logit per label.

    A batch is {'image': uint8 [batch, height, width, 3], 'label': int32 [batch], or [batch,
    classes] with several labels per image}.

    Attributes:
      num_classes: Number of labels.
      mean, std: Per channel, on the scale where 255 is 1.
      is_multilabel: Whether an image has any number of labels.
    """

    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    is_multilabel: ClassVar[bool] = False

    @classmethod
    def check_source(cls, source: Any) -> None:
        """Raises ConfigError unless the images have as many labels as the task expects."""
        if source.is_multilabel and not cls.is_multilabel:
            raise ConfigError(
                f'data set {source.name} has several labels per image; train on it with '
                "config.task.name='multilabel'"
            )
        if cls.is_multilabel and not source.is_multilabel:
            raise ConfigError(
                f'data set {source.name} has one label per image; train on it with '
                "config.task.name='classification'"
            )

    @classmethod
    def outputs_of(
        cls, train: Any, evaluation: Any, num_classes: int | None
    ) -> tuple[int, tuple[str, ...]]:
        check_splits(train, evaluation, num_classes)
        return train.num_classes, train.label_names

    @classmethod
    def check_continued(cls, place: str, before: Described, now: Described) -> None:
        check_same_labels(place, before.label_names, now.label_names)

    @classmethod
    def plan_outputs(
        cls, here: Described, there: Described, new_classifier: bool | None, place: str
    ) -> OutputPlan:
        return plan_classifier(here, there, new_classifier, place)

    def batch_spec(self) -> dict[str, tuple[str, ...]]:
        return {'image': ('batch', 'height'), 'label': ('batch',)}

    def batch_shapes(
        self, batch_size: int, height: int, width: int
    ) -> dict[str, jax.ShapeDtypeStruct]:
        labels = (batch_size, self.num_classes) if self.is_multilabel else (batch_size,)
        return {
            'image': jax.ShapeDtypeStruct((batch_size, height, width, 3), jnp.uint8),
            'label': jax.ShapeDtypeStruct(labels, jnp.int32),
        }

    def results(self, outputs: Mapping[str, Array], batch: Batch) -> dict[str, Array]:
        return {'logits': outputs['logits'], 'label': batch['label'], 'mask': batch['mask']}

    @staticmethod
    @abc.abstractmethod
    def probabilities(logits: Any, numpy: Any = jnp) -> Any:
        """Returns the probability of each label.

        Args:
          logits: `[*batch, classes]`.
          numpy: The module that computes: `jax.numpy`, or `numpy` on the host.
        """
