"""How good a classifier is on a labelled set: accuracies, loss, and what is taken for what."""

import contextlib
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from tqdm import tqdm

from gcnet_jax.data.loader import evaluation_batches
from gcnet_jax.data.sources import Source
from gcnet_jax.errors import DataError, one_line
from gcnet_jax.files import as_path, reason, write_whole
from gcnet_jax.inference.classifier import LOGITS, Classifier, check_finite

REPORT_FILE = 'evaluation.json'
PICTURE_FILE = 'confusion.png'
# More names than this cannot be read along the axes of a picture.
MAX_NAMED_CLASSES = 60
# Classes that are listed as text.
MAX_LISTED = 20
COLOR_MAP = 'Blues'


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    Attributes:
      data, split: What was evaluated on.
      label_names: Name of each class.
      examples: Images that counted, each once.
      skipped: Damaged images that were left out.
      top1, top5: Share of the images whose label is among the 1 or 5 highest logits.
      loss: Mean cross-entropy, without label smoothing.
      images_per_second: With reading and decoding, without compiling.
      confusion: Number of images by their class (row) and the class they were taken for (column).
    """

    data: str
    split: str
    label_names: tuple[str, ...]
    examples: int
    skipped: int
    top1: float
    top5: float
    loss: float
    images_per_second: float
    confusion: Int[np.ndarray, 'classes classes']

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
            if field.name not in ('label_names', 'confusion')
        }
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

    The images are prepared and counted as at the end of training. With `Classifier.load(...,
    fold=False)` the accuracy is that of the run itself, to the last image.

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
    blank = np.zeros((classifier.batch_size, *classifier.image_shape, 3), np.uint8)
    np.asarray(classifier.dispatch(blank, LOGITS))  # Compiles, before the clock starts.
    counts = _Counts(classifier.num_classes)
    began = time.perf_counter()
    total = -(-len(source) // classifier.batch_size)
    with contextlib.closing(batches):
        pending = None
        for batch in tqdm(
            batches, total=total, disable=not progress, unit='batch', file=sys.stderr
        ):
            output = classifier.dispatch(batch['image'], LOGITS)
            if pending is not None:
                counts.add(*pending)
            pending = output, batch['label'], batch['mask']
        counts.add(*pending)
    seconds = time.perf_counter() - began
    if not counts.examples:
        raise DataError(f'every image of {source.name!r} split {source.split!r} is damaged')
    return Evaluation(
        data=source.name,
        split=source.split,
        label_names=tuple(source.label_names),
        examples=counts.examples,
        skipped=batches.skipped,
        top1=counts.top1 / counts.examples,
        top5=counts.top5 / counts.examples,
        loss=counts.loss / counts.examples,
        images_per_second=counts.examples / seconds,
        confusion=counts.confusion,
    )


def check_labels(classifier: Classifier, source: Source) -> None:
    """Raises DataError unless the classes of a classifier and of a data set are the same."""
    ours, theirs = classifier.description.label_names, tuple(source.label_names)
    where = f'data set {source.name!r}'
    advice = 'evaluate on the data set that it was trained on, or on one with the same labels'
    if classifier.num_classes and classifier.num_classes != len(theirs):
        raise DataError(
            f'the checkpoint has {classifier.num_classes} classes and {where} has {len(theirs)}: '
            f'{advice}'
        )
    if not ours or ours == theirs:
        return
    index = next(i for i, names in enumerate(zip(ours, theirs, strict=True)) if len(set(names)) > 1)
    order = ', in another order' if sorted(ours) == sorted(theirs) else ''
    raise DataError(
        f'the checkpoint and {where} have different labels{order}: class {index} is '
        f'{ours[index]!r} in the checkpoint and {theirs[index]!r} in the data; {advice}'
    )


class _Counts:
    """Sums over the batches, in the terms of the training's evaluation step."""

    def __init__(self, num_classes: int) -> None:
        self.examples = self.top1 = self.top5 = 0
        self.loss = 0.0
        self.confusion = np.zeros((num_classes, num_classes), np.int64)

    def add(
        self, logits: Any, labels: Int[np.ndarray, ' batch'], mask: Bool[np.ndarray, ' batch']
    ) -> None:
        logits, labels = np.asarray(logits)[mask], labels[mask]
        check_finite(logits)
        rows = np.arange(len(labels))
        own = logits[rows, labels][:, None]
        # Of equal logits the lower class comes first.
        first = np.arange(logits.shape[1]) < labels[:, None]
        rank = ((logits > own) | ((logits == own) & first)).sum(axis=1)
        highest = logits.max(axis=1, keepdims=True)
        logarithms = np.log(np.exp(logits.astype(np.float64) - highest).sum(axis=1))
        self.examples += len(labels)
        self.top1 += int((rank < 1).sum())
        self.top5 += int((rank < 5).sum())
        self.loss += float((logarithms + (highest - own)[:, 0]).sum())
        np.add.at(self.confusion, (labels, logits.argmax(axis=1)), 1)


def format_evaluation(evaluation: Evaluation) -> str:
    """Lays a result out as text: the figures, and the classes from the worst to the best."""
    skipped = f', {evaluation.skipped:,} damaged ones left out' if evaluation.skipped else ''
    lines = [
        f'{evaluation.data} {evaluation.split}: {evaluation.examples:,} images{skipped}',
        f'  top-1     {evaluation.top1:8.2%}',
        f'  top-5     {evaluation.top5:8.2%}',
        f'  loss      {evaluation.loss:8.4f}',
        f'  images/s  {evaluation.images_per_second:8,.0f}',
        '',
    ]
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


def write_evaluation(evaluation: Evaluation, directory: str | os.PathLike) -> tuple[Path, Path]:
    """Writes `evaluation.json` and the confusion matrix as `confusion.png`, each whole or not.

    Args:
      evaluation: The result.
      directory: Made if it does not exist; files of these names are replaced.

    Raises:
      DataError: It cannot be written.
    """
    directory = as_path(directory, '--out')
    report, picture = directory / REPORT_FILE, directory / PICTURE_FILE
    figure = draw_confusion(evaluation)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f'cannot write into {one_line(directory)}: {reason(error)}') from error
    with write_whole(report, DataError) as aside:
        aside.write_text(json.dumps(evaluation.to_json(), indent=1) + '\n')
    with write_whole(picture, DataError) as aside:
        figure.savefig(aside, format='png', dpi=120)
    return report, picture


def draw_confusion(evaluation: Evaluation) -> Any:
    """Draws the confusion matrix, each row as shares of its class, as a matplotlib Figure."""
    from matplotlib.figure import Figure

    counts = evaluation.confusion
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    classes = len(counts)
    side = min(max(5.0, 0.32 * classes + 2.5), 20.0)
    figure = Figure(figsize=(side + 1.2, side), layout='constrained')
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap=COLOR_MAP, vmin=0, vmax=1, interpolation='nearest')
    figure.colorbar(image, ax=axes, label='share of the true class', shrink=0.8)
    axes.set_title(
        f'{evaluation.data} {evaluation.split}: {evaluation.top1:.2%} of '
        f'{evaluation.examples:,} images',
        parse_math=False,
    )
    axes.set_xlabel('predicted class')
    axes.set_ylabel('true class')
    if classes <= MAX_NAMED_CLASSES:
        # A dollar sign in a name is no formula.
        names = [_shortened(name) for name in evaluation.label_names]
        axes.set_xticks(range(classes), names, rotation=90, parse_math=False)
        axes.set_yticks(range(classes), names, parse_math=False)
    if classes <= MAX_NAMED_CLASSES // 3:
        for row, column in np.ndindex(counts.shape):
            if counts[row, column]:
                color = 'white' if shares[row, column] > 0.6 else 'black'
                text = f'{counts[row, column]:,}'
                axes.text(column, row, text, ha='center', va='center', color=color, fontsize=8)
    return figure


def _shortened(name: str, length: int = 24) -> str:
    return name if len(name) <= length else name[: length - 1] + '…'
