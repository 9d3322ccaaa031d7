"""Batches of images with labels; `batches` says how they are ordered, divided and made ahead."""

import dataclasses
from typing import Any, Protocol

import numpy as np

from gcnet_jax.data import preprocess
from gcnet_jax.data.batches import Batches, Example, ExampleSource, batches_of_all, endless_batches
from gcnet_jax.data.color import ColorOptions, augment_color
from gcnet_jax.data.sizes import Size, height_and_width
from gcnet_jax.errors import ConfigError, unknown_name


class ImageSource(ExampleSource, Protocol):
    """What the loader needs of a source; `sources.Source` has it."""

    @property
    def no_label(self) -> Any:
        """The label of an example that fills up a batch and does not count."""
        ...


def train_batches(
    source: ImageSource,
    *,
    global_batch_size: int,
    image_size: Size,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    augmentation: str = 'resized_crop',
    flip: bool = True,
    interpolation: str = 'bilinear',
    crop_scale: tuple[float, float] = preprocess.CROP_SCALE,
    color: ColorOptions | None = None,
    num_threads: int | None = None,
    num_workers: int = 0,
    skip_damaged: bool = False,
) -> Batches:
    """Returns this process's part of every training batch from `start_step` on, without end.

    Args:
      source: The images.
      global_batch_size: Images per step over all processes.
      image_size: Size of the images handed out, in pixels.
      seed: Seeds the order and the augmentation; 0 to 2**32 - 1.
      start_step: Step of the first batch.
      process_index, process_count: Which part of every batch, and the number of parts.
      augmentation, flip, interpolation, crop_scale: See `preprocess.augment`.
      color: RandAugment and colour jitter, after cropping and mirroring; None for neither.
      num_threads: Batches that are made at once and held in memory, in each worker if there are
        any; None for one per processor, at most 16; 0 for none, in the caller's thread.
      num_workers: Processes that make batches; 0 for threads of this one. They are spawned, so the
        caller's script needs the usual `if __name__ == '__main__'`.
      skip_damaged: Replace a damaged record by the next readable one, and count it.

    Returns:
      Iterator of {'image': uint8 [local_batch, height, width, 3], 'label': int32 [local_batch], or
      [local_batch, classes] with several labels per image}.

    Raises:
      ConfigError: If an argument cannot work.
      DataError: While iterating, if an image is damaged and not skipped.
    """
    _check_augmentation(augmentation, crop_scale)
    preprocess.interpolation_filter(interpolation)
    options = {'size': image_size, 'augmentation': augmentation, 'flip': flip}
    options |= {'interpolation': interpolation, 'crop_scale': tuple(crop_scale)}
    return endless_batches(
        source,
        _TrainExample(options, color or ColorOptions()),
        global_batch_size=global_batch_size,
        image_size=image_size,
        seed=seed,
        start_step=start_step,
        process_index=process_index,
        process_count=process_count,
        num_threads=num_threads,
        num_workers=num_workers,
        skip_damaged=skip_damaged,
    )


def evaluation_batches(
    source: ImageSource,
    *,
    global_batch_size: int,
    image_size: Size,
    crop_fraction: float = 0.875,
    interpolation: str = 'bicubic',
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int | None = None,
    num_workers: int = 0,
    skip_damaged: bool = False,
) -> Batches:
    """Returns every example once over all processes, in order; all get the same number of batches.

    The last batch is filled up with black images of label 0, whose mask is False.

    Args:
      source: The images.
      global_batch_size: Images per step over all processes; may be more than there are examples.
      image_size: Height and width of the images handed out, in pixels; one number for a square.
      crop_fraction: See `preprocess.resize_and_crop`.
      interpolation: `nearest`, `bilinear` or `bicubic`.
      process_index: Which part of every batch.
      process_count: Number of parts.
      num_threads: As in `train_batches`.
      num_workers: As in `train_batches`.
      skip_damaged: Give a damaged image the mask False, and count it.

    Returns:
      Iterator of `{'image': uint8 [local_batch, height, width, 3], 'label': int32 [local_batch],
      'mask': bool [local_batch]}`.

    Raises:
      ConfigError: If an argument cannot work.
      DataError: While iterating, if an image is damaged and not skipped.
    """
    if not 0 < crop_fraction <= 1:
        raise ConfigError(f'crop_fraction is {crop_fraction}; it is more than 0 and at most 1')
    preprocess.interpolation_filter(interpolation)
    example = _EvaluationExample(image_size, crop_fraction, interpolation, source.no_label)
    return batches_of_all(
        source,
        example,
        example.filling,
        global_batch_size=global_batch_size,
        image_size=image_size,
        process_index=process_index,
        process_count=process_count,
        num_threads=num_threads,
        num_workers=num_workers,
        skip_damaged=skip_damaged,
    )


@dataclasses.dataclass(frozen=True)
class _TrainExample:
    """Makes the training example of a record; picklable, for worker processes."""

    options: dict[str, Any]
    color: ColorOptions

    def __call__(self, record: dict[str, Any], rng: np.random.Generator) -> Example:
        image = preprocess.augment(record['image'], rng, **self.options)
        return _example(augment_color(image, rng, self.color), record['label'])


@dataclasses.dataclass(frozen=True)
class _EvaluationExample:
    """Makes the evaluation example of a record."""

    size: Size
    crop_fraction: float
    interpolation: str
    no_label: Any

    def __call__(self, record: dict[str, Any]) -> Example:
        image = preprocess.decode_and_crop(
            record['image'], self.size, self.crop_fraction, self.interpolation
        )
        return _example(image, record['label'])

    def filling(self) -> Example:
        return _example(np.zeros((*height_and_width(self.size), 3), np.uint8), self.no_label)


def _example(image: np.ndarray, label: Any) -> Example:
    return {'image': image, 'label': np.asarray(label, np.int32)}


def _check_augmentation(augmentation: str, crop_scale: tuple[float, float]) -> None:
    if augmentation not in preprocess.AUGMENTATIONS:
        raise ConfigError(unknown_name('augmentation', augmentation, preprocess.AUGMENTATIONS))
    if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
        raise ConfigError(f'crop_scale is {tuple(crop_scale)}; it is 0 < smallest <= largest <= 1')
