"""Average precision and recall in COCO's way, over a detector's instances, by pycocotools."""

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from gcnet_jax.data.coco import CocoSet
from gcnet_jax.errors import ConfigError, DataError, one_line
from gcnet_jax.tasks.average_precision import CURVES, average_precision
from gcnet_jax.tasks.instances import Instances

# Names in a note.
MAX_NAMED = 5


@dataclasses.dataclass(frozen=True)
class ClassResult:
    """How well one class is found.

    Attributes:
      label: Its name.
      objects: Number of its objects, without crowds.
      metrics: 'AP' and 'AP50' by kind, 'box' or 'mask'; NaN for a class without objects.
    """

    label: str
    objects: int
    metrics: Mapping[str, Mapping[str, float]]


@dataclasses.dataclass(frozen=True, eq=False)
class CocoEvaluation:
    """The result of `evaluate_instances`.

    Attributes:
      data, split: What was evaluated on.
      examples: Images that counted.
      skipped: Images of the set that did not: missing, or without a result.
      objects: Annotated objects that counted, without crowds.
      detections: Instances that counted.
      metrics: By kind, 'box' and 'mask', then by the names in `METRICS`, from 0 to 1; NaN where
        there is nothing to find, such as no small object. Small is an area of up to 32 x 32 pixels,
        large one of 96 x 96 or more. AP is the mean over classes and over ten overlaps, from 0.50
        to 0.95.
      classes: The classes that counted, in the order of the annotations.
      precision: By kind, the mean over classes of the precision at recalls from 0 to 1 in steps of
        a hundredth, for each of `CURVES`.
      notes: What the figures leave out, and what is unusual about the set; a line each.
    """

    data: str
    split: str
    examples: int
    skipped: int
    objects: int
    detections: int
    metrics: Mapping[str, Mapping[str, float]]
    classes: tuple[ClassResult, ...]
    precision: Mapping[str, Float[np.ndarray, 'curves recalls']]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns everything as plain values, with None in place of NaN."""
        return {
            'data': self.data,
            'split': self.split,
            'examples': self.examples,
            'skipped': self.skipped,
            'objects': self.objects,
            'detections': self.detections,
            **{kind: _plain(metrics) for kind, metrics in self.metrics.items()},
            'classes': [
                {'label': result.label, 'objects': result.objects}
                | {kind: _plain(metrics) for kind, metrics in result.metrics.items()}
                for result in self.classes
            ],
            'precision': {
                kind: dict(zip(CURVES, curves.tolist(), strict=True))
                for kind, curves in self.precision.items()
                if not np.isnan(curves).any()
            },
            'notes': list(self.notes),
        }


class CocoEvaluator:
    """Collects a detector's instances image by image, and evaluates them at the end.

    Of each instance it keeps box, score and run lengths, some hundred bytes.

    Categories and labels are paired by their names, and only those on both sides count, as in
    mmdetection: objects of a category that the detector has no label for are left out, and so are
    instances of a label that is no category. The result notes both. Only images that were added
    count: leave out those that cannot be read.
    """

    def __init__(self, data: CocoSet, label_names: Sequence[str]):
        """Prepares an evaluation.

        Args:
          data: The images and their annotations.
          label_names: The detector's labels, by class.

        Raises:
          ConfigError: The detector's labels have no names.
          DataError: None of them is a category of the set.
        """
        if not label_names:
            raise ConfigError(
                'the detector has no label names, and categories are told apart by their names; '
                'port it with its labels'
            )
        self.data = data
        self.label_names = tuple(label_names)
        numbers = {name: number for number, name in data.categories.items()}
        # Several labels may have one name.
        self._category_of = {
            label: numbers[name] for label, name in enumerate(label_names) if name in numbers
        }
        if not self._category_of:
            raise DataError(
                f'no category of {one_line(data.file)} is a label of the detector: the categories '
                f'are {_listed(data.categories.values())}, and the labels {_listed(label_names)}'
            )
        self._sizes = {image.id: image.size for image in data.images}
        # Masks count where every object has one.
        self._has_masks = all('segmentation' in item for item in self._objects())
        self._added: dict[int, tuple[int, int]] = {}
        self._results: list[dict[str, Any]] = []

    def add(self, image_id: int, instances: Instances) -> None:
        """Adds the instances of one image, which may be none.

        Raises:
          DataError: The set has no such image, it was added before, or it is not of the size that
            the annotations say.
        """
        if image_id not in self._sizes:
            raise DataError(f'{one_line(self.data.file)} has no image {image_id}')
        if image_id in self._added:
            raise DataError(f'image {image_id} was evaluated before')
        if tuple(instances.size) != self._sizes[image_id]:
            theirs = ' x '.join(map(str, self._sizes[image_id]))
            raise DataError(
                f'image {image_id} is {" x ".join(map(str, instances.size))} pixels high and wide '
                f'once its EXIF orientation is applied, and {theirs} by '
                f'{one_line(self.data.file)}: correct the annotations, or the orientation'
            )
        self._added[image_id] = self._sizes[image_id]
        if not len(instances):
            return
        self._has_masks &= instances.has_masks
        kept = [
            index for index, label in enumerate(instances.classes) if label in self._category_of
        ]
        instances = instances.take(kept)
        masks = instances.rle() if self._has_masks else [None] * len(instances)
        for label, score, box, mask in zip(
            instances.classes, instances.scores, instances.boxes.tolist(), masks, strict=True
        ):
            left, top, right, bottom = box
            self._results.append(
                {
                    'image_id': image_id,
                    'category_id': self._category_of[int(label)],
                    'score': float(score),
                    'bbox': [left, top, right - left, bottom - top],
                    'segmentation': mask,
                }
            )

    def results(self) -> list[dict[str, Any]]:
        """Returns what was added as COCO's results, such as its evaluation server takes as JSON."""
        return [
            {key: value for key, value in result.items() if value is not None}
            for result in self._results
        ]

    def evaluation(self) -> CocoEvaluation:
        """Evaluates what was added so far.

        Raises:
          DataError: No image was added.
        """
        if not self._added:
            raise DataError(f'no image of {one_line(self.data.name)} was evaluated')
        categories = sorted(set(self._category_of.values()))
        objects = [item for item in self._objects() if item['image_id'] in self._added]
        counts = collections.Counter(item['category_id'] for item in objects if not item['iscrowd'])
        found = {
            kind: average_precision(kind, self._added, categories, objects, self._results)
            for kind in (('box', 'mask') if self._has_masks else ('box',))
        }
        images = len(self.data.images) + len(self.data.missing)
        return CocoEvaluation(
            data=self.data.name,
            split=self.data.split,
            examples=len(self._added),
            skipped=images - len(self._added),
            objects=sum(counts.values()),
            detections=len(self._results),
            metrics={kind: result.metrics for kind, result in found.items()},
            classes=tuple(
                ClassResult(
                    name,
                    counts[number],
                    {kind: result.by_category[number] for kind, result in found.items()},
                )
                for number, name in self.data.categories.items()
                if number in categories
            ),
            precision={kind: result.precision for kind, result in found.items()},
            notes=(*self._notes(), *self.data.notes),
        )

    def _objects(self) -> list[dict[str, Any]]:
        """Returns the annotations of the categories that count."""
        counted = set(self._category_of.values())
        return [item for item in self.data.objects if item['category_id'] in counted]

    def _notes(self) -> list[str]:
        """Returns what the figures leave out."""
        notes = []
        unknown = [name for name in self.data.categories.values() if name not in self.label_names]
        if unknown:
            objects = len(self.data.objects) - len(self._objects())
            notes.append(
                f'left out: {_count(unknown, "category", "categories")} that the detector does not '
                f'know: {_listed(unknown)}; annotations of these: {objects:,}'
            )
        known = set(self.data.categories.values())
        absent = [name for name in self.label_names if name not in known]
        if absent:
            notes.append(
                f'left out: {_count(absent, "label", "labels")} of the detector that the set has '
                f'no category for: {_listed(absent)}'
            )
        objects = self._objects()
        bare = sum('segmentation' not in item for item in objects)
        if bare:
            notes.append(
                f'masks are not evaluated: {bare:,} of {len(objects):,} annotations have no '
                'segmentation'
            )
        elif not self._has_masks:
            notes.append('masks are not evaluated: the detector gives none')
        return notes


def evaluate_instances(
    data: CocoSet, label_names: Sequence[str], predictions: Iterable[tuple[int, Instances]]
) -> CocoEvaluation:
    """Evaluates a detector's instances, given image by image; see `CocoEvaluator`.

    Args:
      data: The images and their annotations.
      label_names: The detector's labels, by class.
      predictions: Id of an image, and what the detector says about it.

    Raises:
      ConfigError, DataError: See `CocoEvaluator`.
    """
    evaluator = CocoEvaluator(data, label_names)
    for image_id, instances in predictions:
        evaluator.add(image_id, instances)
    return evaluator.evaluation()


def _plain(metrics: Mapping[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in metrics.items()}


def _count(names: Sequence[str], one: str, many: str) -> str:
    return f'{len(names):,} {one if len(names) == 1 else many}'


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f' and {len(names) - MAX_NAMED} more' if len(names) > MAX_NAMED else ''
    return ', '.join(repr(one_line(name, 60)) for name in names[:MAX_NAMED]) + more
