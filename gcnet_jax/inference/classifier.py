"""A classifier from a checkpoint: images in, labels with probabilities or features out."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from gcnet_jax.errors import CheckpointError, ConfigError, DataError, unknown_name
from gcnet_jax.inference.batches import convert_rows
from gcnet_jax.inference.images import LeftOut, list_images
from gcnet_jax.inference.stored_network import Images, StoredNetwork
from gcnet_jax.inference.whole_images import CLASSES, wrong_class
from gcnet_jax.tasks import LabelTask, find_task
from gcnet_jax.tasks.prediction import Prediction

LOGITS = 'logits'


class Classifier(StoredNetwork):
    """A stored network that labels images: one label each, or several (`multilabel`).

        classifier = Classifier.load('runs/digits')
        classifier('seven.png').label
        for path, prediction in classifier.stream('photos'): ...

    Arguments, batches and devices are those of `StoredNetwork`. A network that was stored without a
    classifier gives features.

    Attributes:
      task: What the network was trained for; says what its logits mean.
      num_classes: Number of logits; 0 without a classifier.

    Raises:
      CheckpointError: The variables or the label names do not fit the network.
      ConfigError: An option that cannot be.
    """

    task: type[LabelTask]
    num_classes: int

    def __call__(self, images: Any, *, top_k: int = 5) -> Prediction | list[Prediction]:
        """Classifies one image or several.

        Args:
          images: A path, encoded bytes, a file opened for reading bytes, a Pillow image or an array
            (uint8, or floating point in 0..1; `[height, width]`, `[height, width, 1, 3 or 4]`, or
            with a batch dimension in front), or a sequence of them, of any sizes.
          top_k: Number of classes to return.

        Returns:
          A Prediction for one image, a list of them for a batch or a sequence.

        Raises:
          DataError: An image cannot be read; the first such one is named.
          ConfigError: The network has no classifier.
        """
        top_k = self._check_top_k(top_k)
        listed, single = list_images(images)
        predictions = [self._prediction(row, top_k) for row in self.compute_all(listed, LOGITS)]
        return predictions[0] if single else predictions

    def stream(
        self,
        source: Any,
        *,
        top_k: int = 5,
        num_threads: int | None = None,
        left_out: LeftOut | None = None,
    ) -> Iterator[tuple[Any, Prediction | DataError]]:
        """Classifies a folder of any size, or any number of paths, in bounded memory.

        Images are decoded ahead by threads, and a batch is computed while the next one is read.

        Args:
          source: A folder (with the folders in it; see `find_images`), a file, or an iterable of
            them, which is read no more than two batches ahead.
          top_k: Number of classes to return.
          num_threads: Threads that decode; None for one a processor, at most 16.
          left_out: Counts the files of folders that are no images.

        Yields:
          Each path, in order, with its prediction, or with the DataError that says why there is
          none.

        Raises:
          ConfigError: The network has no classifier.
        """
        top_k = self._check_top_k(top_k)
        rows = self.stream_outputs(source, LOGITS, num_threads=num_threads, left_out=left_out)
        return convert_rows(rows, functools.partial(self._prediction, top_k=top_k))

    def dispatch(self, images: Images, outputs: str | Sequence[str] = LOGITS) -> Any:
        """Starts to compute outputs, the logits by default; see `StoredNetwork.dispatch`."""
        return super().dispatch(images, outputs)

    def _check(self, variables: Mapping[str, Any]) -> None:
        """Finds the number of classes; refuses variables and label names that do not fit."""
        if self.description.task in CLASSES:
            raise wrong_class(self.description, 'classification')
        super()._check(variables)
        self.task = find_task(self.description.task)
        self.num_classes = self.output_shapes.get(LOGITS, (0,))[-1]
        names = len(self.description.label_names)
        if self.num_classes == 1 and not self.task.is_multilabel:
            raise CheckpointError(
                'it has one logit, of which the probability would always be 100%: a classifier has '
                'a logit for each class, two at least'
            )
        if self.num_classes and names not in (0, self.num_classes):
            raise CheckpointError(f'it has {names} label names and {self.num_classes} classes')

    def _names(self, outputs: str | Sequence[str]) -> tuple[str, ...]:
        names = {outputs} if isinstance(outputs, str) else set(outputs)
        if LOGITS in names and not self.num_classes:
            raise ConfigError(
                f'{self.description.name} was stored without a classifier: it gives features '
                f'({", ".join(self.layers)}), not labels'
            )
        for name in names - self.layers.keys():
            raise ConfigError(unknown_name(f'layer of {self.description.name}', name, self.layers))
        return super()._names(outputs)

    def _check_top_k(self, top_k: int) -> int:
        self._names(LOGITS)
        if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
            raise ConfigError(f'top_k must be 1 or more, got {top_k!r}')
        return min(top_k, self.num_classes)

    def _prediction(self, logits: Float[np.ndarray, ' classes'], top_k: int) -> Prediction:
        check_finite(logits)
        probabilities = self.task.probabilities(logits.astype(np.float64), np)
        return Prediction.highest(probabilities, logits, self.description.label_names, top_k)


def check_finite(logits: Float[np.ndarray, '*any']) -> None:
    """Raises CheckpointError unless all logits are finite numbers."""
    if not np.isfinite(logits).all():
        raise CheckpointError(
            'the network gives logits that are not finite: its training went wrong, or its dtype '
            'is too small for it; choose another checkpoint, or dtype float32'
        )
