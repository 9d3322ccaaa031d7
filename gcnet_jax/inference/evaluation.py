"""How good a classifier is on a labelled set: its task's metrics, and what is taken for what."""

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from gcnet_jax.data.loader import Batches, evaluation_batches
from gcnet_jax.data.sources import Source
from gcnet_jax.errors import DataError, changed_names, one_line
from gcnet_jax.inference.classifier import LOGITS, Classifier, check_finite
from gcnet_jax.inference.confusion_picture import draw_matrix
from gcnet_jax.inference.report_files import write_report

PICTURE_FILE = 'confusion.png'
# Classes that are listed as text.
MAX_LISTED = 20


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    Attributes:
      data, split: What was evaluated on.
      label_names: Name of each class.
      examples: Images that counted, each once.
      skipped: Damaged images that were left out.
      metrics: The task's metrics by name, such as 'accuracy', 'top5' and 'loss' (without label
        smoothing), or 'mAP'.
      percentages: Which of them are shown in per cent.
      images_per_second: With reading and decoding, without compiling.
      confusion: Number of images by their class (row) and the class they were taken for (column);
        None where an image has several labels.
    """

    data: str
    split: str
    label_names: tuple[str, ...]
    examples: int
    skipped: int
    metrics: Mapping[str, float]
    percentages: frozenset[str]
    images_per_second: float
    confusion: Int[np.ndarray, 'classes classes'] | None

    @property
    def class_accuracy(self) -> Float[np.ndarray, ' classes']:
        """Share of each class's images that were recognised; NaN for a class without images."""
        counts = self.confusion.sum(axis=1)
        return np.divide(
            np.diagonal(self.confusion),
            counts,
            out=np.full(len(counts), np.nan),
            where=counts > 0,
        )

    def to_json(self) -> dict[str, Any]:
        """Returns everything as plain values."""
        fields = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ('label_names', 'metrics', 'percentages', 'confusion')
        }
        fields |= self.metrics
        if self.confusion is None:
            return fields
        fields['classes'] = [
            {'label': label, 'examples': int(row.sum()), 'correct': int(row[index])}
            for index, (label, row) in enumerate(zip(self.label_names, self.confusion, strict=True))
        ]
        return fields | {'confusion': self.confusion.tolist()}


def evaluate(
    classifier: Classifier,
    source: Source,
    *,
    num_threads: int | None = None,
    skip_damaged: bool = False,
    progress: bool = False,
) -> Evaluation:
    """Evaluates a classifier on one split, every image once.

    The images are prepared and counted as in training. With `Classifier.load(..., fold=False)` the
    accuracy is that of the run itself, to the last image.

    Args:
      classifier: Its `batch_size` images are computed at once.
      source: The labelled images, as `load_source` gives them.
      num_threads: See `evaluation_batches`.
      skip_damaged: Leave damaged images out, counted, instead of stopping at the first.
      progress: Show a bar on stderr.

    Raises:
      DataError: The labels are not the classifier's, or an image is damaged.
      ConfigError: The network has no classifier.
      CheckpointError: Its logits are not finite.
    """
    check_labels(classifier, source)
    preprocessing = classifier.description.preprocessing
    batches = evaluation_batches(
        source,
        global_batch_size=classifier.batch_size,
        image_size=preprocessing.test_size,
        crop_fraction=preprocessing.crop_fraction,
        interpolation=preprocessing.interpolation,
        num_threads=num_threads,
        skip_damaged=skip_damaged,
    )
    evaluation = classifier.task.evaluation(source)
    seconds = _add_all(classifier, evaluation, batches, len(source), progress)
    metrics = evaluation.metrics()
    examples = int(metrics.pop('examples'))
    if not examples:
        raise DataError(f'every image of {source.name!r} split {source.split!r} is damaged')
    return Evaluation(
        data=source.name,
        split=source.split,
        label_names=tuple(source.label_names),
        examples=examples,
        skipped=batches.skipped,
        metrics=metrics,
        percentages=classifier.task.percentages,
        images_per_second=examples / seconds,
        confusion=getattr(evaluation, 'confusion', None),
    )


def _add_all(
    classifier: Classifier, evaluation: Any, batches: Batches, count: int, progress: bool
) -> float:
    """Adds all batches to an evaluation; returns the seconds that took, without compiling."""
    blank = np.zeros((classifier.batch_size, *classifier.image_shape, 3), np.uint8)
    np.asarray(classifier.dispatch(blank, LOGITS))  # Compiles, before the clock starts.
    began = time.perf_counter()

    def add(output: Any, batch: dict[str, np.ndarray]) -> None:
        logits = np.asarray(output)
        check_finite(logits[batch['mask']])
        evaluation.add({'logits': logits, 'label': batch['label'], 'mask': batch['mask']})

    total = -(-count // classifier.batch_size)
    with contextlib.closing(batches):
        pending = None
        for batch in tqdm(
            batches, total=total, disable=not progress, unit='batch', file=sys.stderr
        ):
            output = classifier.dispatch(batch['image'], LOGITS)
            if pending is not None:
                add(*pending)
            pending = output, batch
        add(*pending)
    return time.perf_counter() - began


def check_labels(classifier: Classifier, source: Source) -> None:
    """Raises DataError unless the classes of a classifier and of a data set are the same."""
    ours, theirs = classifier.description.label_names, tuple(source.label_names)
    where = f'data set {source.name!r}'
    advice = 'evaluate on the data set that it was trained on, or on one with the same labels'
    if source.is_multilabel != classifier.task.is_multilabel:
        kind = 'several labels' if source.is_multilabel else 'one label'
        raise DataError(
            f'{where} has {kind} per image, and the checkpoint is for '
            f'{classifier.task.name}: {advice}'
        )
    if classifier.num_classes and classifier.num_classes != len(theirs):
        raise DataError(
            f'the checkpoint has {classifier.num_classes} classes and {where} has {len(theirs)}: '
            f'{advice}'
        )
    if not ours or ours == theirs:
        return
    changed = changed_names(ours, theirs)
    if changed:
        raise DataError(
            f'the checkpoint and {where} have different labels: the data set is {changed}; {advice}'
        )
    index = next(i for i, names in enumerate(zip(ours, theirs, strict=True)) if len(set(names)) > 1)
    raise DataError(
        f'the checkpoint and {where} have different labels, in another order: class {index} is '
        f'{ours[index]!r} in the checkpoint and {theirs[index]!r} in the data; {advice}'
    )


def format_evaluation(evaluation: Evaluation) -> str:
    """Lays a result out as text: the figures, and the classes from the worst to the best."""
    skipped = f', {evaluation.skipped:,} damaged ones left out' if evaluation.skipped else ''
    lines = [
        f'{evaluation.data} {evaluation.split}: {evaluation.examples:,} images{skipped}',
        *(
            f'  {name:<9} {value:8.2%}'
            if name in evaluation.percentages
            else f'  {name:<9} {value:8.4f}'
            for name, value in evaluation.metrics.items()
        ),
        f'  images/s  {evaluation.images_per_second:8,.0f}',
    ]
    if evaluation.confusion is None:
        return '\n'.join(lines)
    lines.append('')
    counts, accuracies = evaluation.confusion.sum(axis=1), evaluation.class_accuracy
    order = [index for index in np.argsort(accuracies, kind='stable') if counts[index]]
    width = max(len(one_line(evaluation.label_names[index])) for index in order[:MAX_LISTED])
    for index in order[:MAX_LISTED]:
        row = evaluation.confusion[index].copy()
        row[index] = 0
        mistake = ''
        if row.any():
            other = int(row.argmax())
            mistake = f'  most often taken for {one_line(evaluation.label_names[other])}'
        label = one_line(evaluation.label_names[index])
        lines.append(f'  {label:<{width}}  {accuracies[index]:8.2%} of {counts[index]:,}{mistake}')
    if len(order) > MAX_LISTED:
        lines.append(f'  ... and {len(order) - MAX_LISTED} classes better than these')
    return '\n'.join(lines)


def write_evaluation(evaluation: Evaluation, directory: str | os.PathLike) -> list[Path]:
    """Writes `evaluation.json`, and `confusion.png` where there is a confusion matrix.

    Args:
      evaluation: The result.
      directory: Made if it does not exist; files of these names are replaced.

    Returns:
      The files, each of which is complete.

    Raises:
      DataError: It cannot be written.
    """
    figure = None if evaluation.confusion is None else draw_confusion(evaluation)
    return write_report(directory, evaluation.to_json(), PICTURE_FILE, figure)


def draw_confusion(evaluation: Evaluation) -> Any:
    """Draws the confusion matrix, each row as shares of its class, as a matplotlib Figure."""
    title = (
        f'{evaluation.data} {evaluation.split}: {evaluation.metrics["accuracy"]:.2%} of '
        f'{evaluation.examples:,} images'
    )
    return draw_matrix(evaluation.confusion, evaluation.label_names, title)
