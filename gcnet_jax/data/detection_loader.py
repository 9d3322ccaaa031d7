"""Batches of images with objects; `batches` says how they are divided and made ahead.

All images of a batch lie on canvases of one size, of which there are a few: the batches of a step
have the same shapes in every process. See `detection_canvases` and `grouped_order`.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from gcnet_jax.data.batches import Batch, Batches, Example, batches_of_all, endless_batches
from gcnet_jax.data.detection_canvases import Limits, make_canvases
from gcnet_jax.data.detection_examples import (
    DetectionOptions,
    evaluation_example,
    evaluation_filling,
    training_example,
)
from gcnet_jax.data.detection_ranges import FLIP, MASK_SIZE, MAX_BOXES
from gcnet_jax.data.detection_sources import DetectionSource
from gcnet_jax.data.grouped_order import GroupedOrder
from gcnet_jax.data.preprocessing import KeepRatio
from gcnet_jax.data.sizes import Size
from gcnet_jax.errors import DataError


def train_batches(
    source: DetectionSource,
    *,
    global_batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    preprocessing: KeepRatio,
    scales: Sequence[Limits] | None = None,
    canvases: Sequence[Size] | None = None,
    flip: float = FLIP,
    max_boxes: int = MAX_BOXES,
    masks: bool | None = None,
    mask_size: int = MASK_SIZE,
    num_threads: int | None = None,
    num_workers: int = 0,
    skip_damaged: bool = False,
) -> Batches:
    """Returns this process's part of every training batch from `start_step` on, without end.

    Args:
      source: The images and objects.
      global_batch_size, seed, start_step, process_index, process_count, num_threads, num_workers,
        skip_damaged: See `batches.endless_batches`.
      preprocessing, scales, canvases: See `detection_canvases.make_canvases`; one of the scales is
        drawn for each image.
      flip, max_boxes, mask_size: See `detection_examples.DetectionOptions`. How many objects
        `max_boxes` leaves out, `detection_sources.count_beyond` says.
      masks: Whether masks are made; None where the source has them.

    Returns:
      Iterator of {'image': uint8 [local_batch, height, width, 3], of one of the canvases, padded
      with 0 on the right and at the bottom, 'size': int32 [local_batch, 2], height and width
      without the padding, 'boxes': float32 [local_batch, max_boxes, 4], left, top, right and bottom
      in pixels, 'labels': int32 [local_batch, max_boxes], -1 for none}, and with masks {'masks':
      uint8 [local_batch, max_boxes, mask_size, mask_size], 1 inside the object, 'mask_boxes':
      float32 [local_batch, max_boxes, 4], what each covers}, see `detection_masks.crop_mask`.

    Raises:
      ConfigError: If an argument cannot work.
      DataError: If an image fits on no canvas, or masks are asked for and missing; while iterating,
        if an image or a mask is damaged and not skipped.
    """
    places = make_canvases(preprocessing, scales, canvases)
    cells = mask_size if _makes_masks(source, masks) else None
    return endless_batches(
        source,
        _TrainExample(DetectionOptions(places, flip, max_boxes, cells)),
        global_batch_size=global_batch_size,
        image_size=places.sizes[0],
        seed=seed,
        start_step=start_step,
        process_index=process_index,
        process_count=process_count,
        num_threads=num_threads,
        num_workers=num_workers,
        skip_damaged=skip_damaged,
        order=GroupedOrder(places.choose_all(source), global_batch_size, seed),
    )


def evaluation_batches(
    source: DetectionSource,
    *,
    global_batch_size: int,
    preprocessing: KeepRatio,
    canvases: Sequence[Size] | None = None,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int | None = None,
    num_workers: int = 0,
    skip_damaged: bool = False,
) -> Batches:
    """Returns every image once over all processes; all get the same number of batches.

    The images of one canvas come after those of another, in the source's order. The last batch of
    each canvas is filled up with black images whose mask is False.

    Args:
      source: The images; their objects are not handed out, see `detection_sources.as_coco`.
      global_batch_size: Images per step over all processes; may be more than there are.
      preprocessing, canvases: As in `train_batches`.
      process_index, process_count, num_threads, num_workers, skip_damaged: See
        `batches.batches_of_all`.

    Returns:
      Iterator of {'image': uint8 [local_batch, height, width, 3], padded with 0 on the right and at
      the bottom, 'size': int32 [local_batch, 2], height and width without the padding,
      'original_size': int32 [local_batch, 2], those of the image as it is stored, upright, 'index':
      int32 [local_batch], its place in the source, -1 for none, 'mask': bool [local_batch]}.

    Raises:
      ConfigError: If an argument cannot work.
      DataError: If an image fits on no canvas; while iterating, if one is damaged and not skipped.
    """
    places = make_canvases(preprocessing, sizes=canvases)
    if len(source) == 0:
        raise DataError('the source has no examples')
    chosen = places.choose_all(source)
    parts = []
    for number in np.unique(chosen):
        make = _EvaluationExample(places.scales[0], places.sizes[number])
        part = batches_of_all(
            _Part(source, np.flatnonzero(chosen == number)),
            make,
            make.filling,
            global_batch_size=global_batch_size,
            image_size=places.sizes[number],
            process_index=process_index,
            process_count=process_count,
            num_threads=num_threads,
            num_workers=num_workers,
            skip_damaged=skip_damaged,
        )
        parts.append(part)
    return Batches(_one_after_another(parts))


def _one_after_another(parts: Sequence[Batches]) -> Iterator[tuple[Batch, int]]:
    """Yields the batches of all parts, each with the number of images newly skipped."""
    for part in parts:
        with part:
            before = 0
            for batch in part:
                yield batch, part.skipped - before
                before = part.skipped


def _makes_masks(source: DetectionSource, masks: bool | None) -> bool:
    if masks and not source.has_masks:
        raise DataError(
            f"{source.name!r} split '{source.split}' has no mask for some objects or for all; "
            'train on boxes alone, or complete the annotations'
        )
    return source.has_masks if masks is None else masks


@dataclasses.dataclass(frozen=True, eq=False)
class _Part:
    """Some of a source's images; their records also tell the 'index'."""

    source: DetectionSource
    places: Int[np.ndarray, ' images']

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = int(self.places[index])
        return self.source[place] | {'index': place}

    def describe(self, index: int) -> str:
        return self.source.describe(int(self.places[index]))


@dataclasses.dataclass(frozen=True)
class _TrainExample:
    """Makes the training example of a record; picklable, for worker processes."""

    options: DetectionOptions

    def __call__(self, record: dict[str, Any], rng: np.random.Generator) -> Example:
        return training_example(record, rng, self.options)


@dataclasses.dataclass(frozen=True)
class _EvaluationExample:
    """Makes the evaluation example of a record."""

    limits: Limits
    canvas: tuple[int, int]

    def __call__(self, record: dict[str, Any]) -> Example:
        return evaluation_example(record, self.limits, self.canvas)

    def filling(self) -> Example:
        return evaluation_filling(self.canvas)
