"""How good a segmenter is on a set with label maps: IoU and accuracy, and what is taken for what.

Everything is counted at the original size of the images, as mmsegmentation's `IoUMetric` does, over
all pixels of the set together.
"""

import dataclasses
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from gcnet_jax.data.segmentation_sources import SegmentationSource
from gcnet_jax.errors import DataError, changed_names, one_line
from gcnet_jax.inference.confusion_picture import draw_matrix
from gcnet_jax.inference.report_files import write_report
from gcnet_jax.inference.segmenter import Segmenter
from gcnet_jax.tasks.confusion import accuracy, iou, summary

PICTURE_FILE = 'confusion.png'
# Classes that are listed as text.
MAX_LISTED = 40
# Shares of a class that are written into the picture, in per cent.
MIN_SHOWN_SHARE = 0.01


@dataclasses.dataclass(frozen=True)
class LabelMapEvaluation:
    """The result of `evaluate_segmenter`.

    Attributes:
      data, split: What was evaluated on.
      label_names: Name of each class, in the network's order.
      examples: Images that counted, each once.
      skipped: Damaged images and label maps that were left out.
      images_per_second: With reading, decoding and compiling.
      confusion: Number of pixels by their class (row) and the class they were taken for (column);
        pixels without a class do not count.
    """

    data: str
    split: str
    label_names: tuple[str, ...]
    examples: int
    skipped: int
    images_per_second: float
    confusion: Int[np.ndarray, 'classes classes']

    @property
    def metrics(self) -> dict[str, float]:
        """The figures of all classes: 'miou', 'pixel_accuracy' and 'mean_accuracy'."""
        return summary(self.confusion)

    @property
    def class_iou(self) -> Float[np.ndarray, ' classes']:
        """Each class's IoU; NaN for a class that neither occurs nor was found."""
        return iou(self.confusion)

    @property
    def class_accuracy(self) -> Float[np.ndarray, ' classes']:
        """Share of each class's pixels that were recognised; NaN for a class without pixels."""
        return accuracy(self.confusion)

    def to_json(self) -> dict[str, Any]:
        """Returns everything as plain values, None for what is not a number."""
        names = ('data', 'split', 'examples', 'skipped', 'images_per_second')
        columns = (self.class_iou, self.class_accuracy, self.confusion.sum(axis=1))
        return {
            **{name: getattr(self, name) for name in names},
            **{name: _plain(value) for name, value in self.metrics.items()},
            'classes': [
                {
                    'label': label,
                    'iou': _plain(overlap),
                    'accuracy': _plain(correct),
                    'pixels': int(pixels),
                }
                for label, overlap, correct, pixels in zip(self.label_names, *columns, strict=True)
            ],
            'confusion': self.confusion.tolist(),
        }


def evaluate_segmenter(
    segmenter: Segmenter,
    source: SegmentationSource,
    *,
    num_threads: int | None = None,
    skip_damaged: bool = False,
    progress: bool = False,
) -> LabelMapEvaluation:
    """Evaluates a segmenter on one split, every image once.

    Args:
      segmenter: Its `batch_size` images of one size are computed at once.
      source: The images and label maps, as `load_segmentation` gives them.
      num_threads: Threads that decode; None for one per processor, at most 16.
      skip_damaged: Leave out damaged images and label maps, and pairs of different sizes, counted,
        instead of stopping at the first.
      progress: Show a bar on stderr.

    Raises:
      DataError: The labels are not the segmenter's; an image or a label map is damaged, or they
        differ in size; or all are.
      CheckpointError: The segmenter's logits are not finite.
    """
    from tqdm import tqdm

    classes = match_labels(segmenter, source)
    label_maps: dict[int, UInt8[np.ndarray, 'height width']] = {}

    def load(index: int) -> Any:
        inputs, labels = _load_pair(segmenter, source, index)
        label_maps[index] = classes[labels]
        return inputs

    count, skipped = segmenter.model.num_classes, 0
    confusion = np.zeros((count, count), np.int64)
    began = time.perf_counter()
    results = segmenter.stream_items(range(len(source)), load, num_threads=num_threads)
    for index, found in tqdm(
        results, total=len(source), unit='image', disable=not progress, file=sys.stderr
    ):
        if not isinstance(found, DataError):
            confusion += count_pixels(label_maps.pop(index), found.labels, count)
        elif skip_damaged:
            skipped += 1
        else:
            results.close()
            raise found
    if skipped == len(source):
        raise DataError(f'every image of {source.name!r} split {source.split!r} is damaged')
    return LabelMapEvaluation(
        data=source.name,
        split=source.split,
        label_names=_label_names(segmenter, source),
        examples=len(source) - skipped,
        skipped=skipped,
        images_per_second=(len(source) - skipped) / (time.perf_counter() - began),
        confusion=confusion,
    )


def _load_pair(
    segmenter: Segmenter, source: SegmentationSource, index: int
) -> tuple[Any, UInt8[np.ndarray, 'height width']]:
    """Returns what the segmenter reads of an image, and its label map."""
    name, record = source.describe(index), source[index]
    inputs = segmenter.load_image(record['image'], name)
    try:
        labels = source.decode_label(record['label'])
    except DataError as error:
        raise DataError(f'{name}: {error}') from error
    height, width = inputs['original'].shape[1:]
    if labels.shape != (height, width):
        raise DataError(
            f'{one_line(name)}: the image has {width} x {height} pixels and its label map '
            f'{labels.shape[1]} x {labels.shape[0]}; they must have the same size'
        )
    return inputs, labels


def count_pixels(
    labels: Int[np.ndarray, 'height width'], found: Int[np.ndarray, 'height width'], classes: int
) -> Int[np.ndarray, 'classes classes']:
    """Returns the confusion matrix of one image.

    Args:
      labels: Class of each pixel; pixels of `classes` or more do not count.
      found: The class that each was taken for.
      classes: Number of classes.
    """
    counted = labels < classes
    pairs = labels[counted].astype(np.int64) * classes + found[counted]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def match_labels(segmenter: Segmenter, source: SegmentationSource) -> Int[np.ndarray, ' 256']:
    """Returns the segmenter's class for each value of the set's label maps.

    Labels are paired by their names where both sides have names, else by their numbers. What does
    not count, 255, becomes a number beyond all classes.

    Raises:
      DataError: The labels of both are not the same.
    """
    ours, theirs = _names(segmenter.description.label_names), _names(source.label_names)
    count, where = segmenter.model.num_classes, f'data set {source.name!r}'
    advice = 'evaluate on the data set that it was trained on, or on one with the same labels'
    # A set without names has as many classes as its largest label says.
    if (theirs and len(theirs) != count) or source.num_classes > count:
        raise DataError(
            f'the checkpoint has {count} classes and {where} has {source.num_classes}: {advice}'
        )
    classes = np.full(256, count, np.int32)
    if not (ours and theirs):
        classes[: source.num_classes] = np.arange(source.num_classes)
        return classes
    if changed := changed_names(ours, theirs):
        raise DataError(
            f'the checkpoint and {where} have different labels: the data set is {changed}; {advice}'
        )
    classes[:count] = [ours.index(name) for name in theirs]
    return classes


def _label_names(segmenter: Segmenter, source: SegmentationSource) -> tuple[str, ...]:
    """Returns the name of each class: the segmenter's, else those of the set."""
    if segmenter.description.label_names or source.num_classes != segmenter.model.num_classes:
        return segmenter.label_names
    return source.label_names


def _names(label_names: tuple[str, ...]) -> tuple[str, ...]:
    """Returns names without blanks around them; none where they are made up of numbers."""
    made_up = tuple(f'class {index}' for index in range(len(label_names)))
    return () if tuple(label_names) == made_up else tuple(name.strip() for name in label_names)


def format_segmentation(evaluation: LabelMapEvaluation) -> str:
    """Lays a result out as text: the figures, and the classes from the worst to the best."""
    skipped = f', {evaluation.skipped:,} damaged ones left out' if evaluation.skipped else ''
    lines = [
        f'{one_line(evaluation.data)} {one_line(evaluation.split)}: {evaluation.examples:,} '
        f'images{skipped}',
        *(f'  {name:<14} {_percent(value)}' for name, value in evaluation.metrics.items()),
        f'  {"images/s":<14} {evaluation.images_per_second:8.2f}',
        '',
    ]
    pixels, overlaps = evaluation.confusion.sum(axis=1), evaluation.class_iou
    order = [i for i in np.argsort(overlaps, kind='stable').tolist() if not np.isnan(overlaps[i])]
    listed = order[:MAX_LISTED]
    labels = [one_line(evaluation.label_names[index], 60) for index in listed]
    width = max(map(len, ['class', *labels]))
    total = max(int(pixels.sum()), 1)
    lines.append(f'  {"class":<{width}}  {"IoU":>8}  {"accuracy":>8}  {"pixels":>8}')
    for index, label in zip(listed, labels, strict=True):
        row = evaluation.confusion[index].copy()
        row[index] = 0
        mistake = ''
        if row.any():
            other = one_line(evaluation.label_names[int(row.argmax())], 60)
            mistake = f'  most often taken for {other}'
        lines.append(
            f'  {label:<{width}}  {_percent(overlaps[index])}  '
            f'{_percent(evaluation.class_accuracy[index])}  {_percent(pixels[index] / total)}'
            f'{mistake}'
        )
    if len(order) > MAX_LISTED:
        lines.append(f'  ... and {len(order) - MAX_LISTED} classes better than these')
    return '\n'.join(lines)


def write_segmentation(evaluation: LabelMapEvaluation, directory: str | os.PathLike) -> list[Path]:
    """Writes `evaluation.json` and `confusion.png`.

    Args:
      evaluation: The result.
      directory: Made if it does not exist; files of these names are replaced.

    Returns:
      The files, each of which is complete.

    Raises:
      DataError: It cannot be written.
    """
    figures: Mapping[str, float] = evaluation.metrics
    title = (
        f'{one_line(evaluation.data, 60)} {one_line(evaluation.split, 30)}: mIoU '
        f'{_percent(figures["miou"]).strip()}, {evaluation.examples:,} images'
    )
    figure = draw_matrix(
        evaluation.confusion,
        evaluation.label_names,
        title,
        lambda count, share: f'{100 * share:.0f}' if share >= MIN_SHOWN_SHARE else '',
    )
    return write_report(directory, evaluation.to_json(), PICTURE_FILE, figure)


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _percent(value: float) -> str:
    return f'{"-":>8}' if math.isnan(value) else f'{value:8.2%}'
