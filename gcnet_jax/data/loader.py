"""Batches by Grain for training and evaluation: a function of the seed and the step alone.

One global order of the examples is drawn for every epoch and laid end to end; batch k is the
examples k * B to (k + 1) * B of it, and process p of P takes the p-th part of every batch. So the
position in the data is nothing but the step, and any number of processes, threads or workers sees
the same batches.
"""

import dataclasses
import os
import signal
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags

from gcnet_jax.data import preprocess
from gcnet_jax.data.color import ColorOptions, augment_color
from gcnet_jax.data.sizes import Size, height_and_width
from gcnet_jax.errors import ConfigError, DataError, unknown_name

MAX_SEED = 2**32 - 1
MAX_THREADS = 16

Batch = dict[str, np.ndarray]


class ImageSource(Protocol):
    """What the loader needs of a source; `sources.Source` has it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def describe(self, index: int) -> str:
        """Returns the name of a record for messages."""
        ...

    @property
    def no_label(self) -> Any:
        """The label of an example that fills up a batch and does not count."""
        ...


class Batches(Iterator[Batch]):
    """An iterator over batches. Dropping or closing it ends its threads.

    Attributes:
      skipped: Damaged images met so far in the batches that were handed out (of this process).
    """

    def __init__(self, dataset: grain.IterDataset, has_mask: bool) -> None:
        self.skipped = 0
        self._has_mask = has_mask
        self._iterator = iter(dataset)

    def __next__(self) -> Batch:
        images, labels, masks, skipped = next(self._iterator)
        self.skipped += int(skipped)
        batch = {'image': images, 'label': labels}
        return batch | {'mask': masks} if self._has_mask else batch

    def close(self) -> None:
        """Ends the threads or processes behind the iterator."""
        self._iterator.close()

    def __enter__(self) -> 'Batches':
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, '_iterator'):
            self.close()


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
    _check_batch(source, global_batch_size, image_size, process_index, process_count)
    _check_training(augmentation, crop_scale, seed, start_step)
    preprocess.interpolation_filter(interpolation)
    options = {'size': image_size, 'augmentation': augmentation, 'flip': flip}
    options |= {'interpolation': interpolation, 'crop_scale': tuple(crop_scale)}
    example = _TrainExample(source, options, color or ColorOptions(), skip_damaged)
    dataset = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    dataset = dataset.random_map(example)
    dataset = dataset.batch(
        global_batch_size // process_count, drop_remainder=True, batch_fn=_stack
    )
    dataset = dataset[process_index::process_count][start_step:]
    return Batches(_run(dataset, num_threads, num_workers), has_mask=False)


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
    """Returns every example once over all processes, in order, in as many batches for each of them.

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
    _check_batch(source, global_batch_size, image_size, process_index, process_count)
    if not 0 < crop_fraction <= 1:
        raise ConfigError(f'crop_fraction is {crop_fraction}; it is more than 0 and at most 1')
    preprocess.interpolation_filter(interpolation)
    count = -(-len(source) // global_batch_size) * global_batch_size
    load = _EvaluationExample(source, image_size, crop_fraction, interpolation, skip_damaged)
    dataset = grain.MapDataset.range(count).map(load)
    dataset = dataset.batch(
        global_batch_size // process_count, drop_remainder=True, batch_fn=_stack
    )
    dataset = dataset[process_index::process_count]
    return Batches(_run(dataset, num_threads, num_workers), has_mask=True)


# An image, its label, whether it counts, and how many damaged images were met for it.
Example = tuple[np.ndarray, int | np.ndarray, bool, int]


@dataclasses.dataclass(frozen=True)
class _TrainExample:
    """Makes the training example of one index; picklable, for worker processes."""

    source: ImageSource
    options: dict[str, Any]
    color: ColorOptions
    skip_damaged: bool

    def __call__(self, index: int, rng: np.random.Generator) -> Example:
        length = len(self.source)
        for skipped in range(length if self.skip_damaged else 1):
            place = (int(index) + skipped) % length
            record = self.source[place]
            try:
                image = preprocess.augment(record['image'], rng, **self.options)
            except DataError as error:
                reason = str(error)
                if not self.skip_damaged:
                    raise _damaged(self.source, place, reason) from error
            else:
                return augment_color(image, rng, self.color), record['label'], True, skipped
        raise DataError(f'{self.source.describe(0)} and all others are damaged: {reason}')


@dataclasses.dataclass(frozen=True)
class _EvaluationExample:
    """Makes the evaluation example of one index, or the filling beyond the last one."""

    source: ImageSource
    size: Size
    crop_fraction: float
    interpolation: str
    skip_damaged: bool

    def __call__(self, index: int) -> Example:
        nothing = np.zeros((*height_and_width(self.size), 3), np.uint8)
        if index >= len(self.source):
            return nothing, self.source.no_label, False, 0
        record = self.source[int(index)]
        try:
            image = preprocess.decode_and_crop(
                record['image'], self.size, self.crop_fraction, self.interpolation
            )
        except DataError as error:
            if not self.skip_damaged:
                raise _damaged(self.source, int(index), str(error)) from error
            return nothing, self.source.no_label, False, 1
        return image, record['label'], True, 0


def _damaged(source: ImageSource, index: int, reason: str) -> DataError:
    return DataError(
        f'{source.describe(index)}: {reason}; repair it, or leave such images out with skip_damaged'
    )


def _stack(examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    images, labels, masks, skipped = zip(*examples, strict=True)
    return np.stack(images), np.array(labels, np.int32), np.array(masks, bool), sum(skipped)


def _run(dataset: grain.MapDataset, num_threads: int | None, num_workers: int) -> grain.IterDataset:
    """Makes batches ahead of their use; the order does not depend on who makes them."""
    if num_threads is None:
        num_threads = 1 if num_workers else min(os.cpu_count() or 1, MAX_THREADS)
    if num_threads < 0 or num_workers < 0:
        raise ConfigError(
            f'num_threads is {num_threads} and num_workers {num_workers}; they are at least 0'
        )
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_threads)
    iterable = dataset.to_iter_dataset(options)
    if num_workers:
        _settle_flags()
        iterable = iterable.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=num_workers),
            worker_init_fn=_leave_ctrl_c_to_the_run,
        )
    return iterable


def _leave_ctrl_c_to_the_run(worker: int, workers: int) -> None:
    """Called in each worker: a terminal sends Ctrl-C to all processes, and the run stops them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _settle_flags() -> None:
    """Lets Grain read its absl flags in a program that parses none, where that would fail."""
    for name in flags.FLAGS:
        if name.startswith('grain_') and not flags.FLAGS[name].present:
            flags.FLAGS[name].present = 1


def _check_training(
    augmentation: str, crop_scale: tuple[float, float], seed: int, start_step: int
) -> None:
    if augmentation not in preprocess.AUGMENTATIONS:
        raise ConfigError(unknown_name('augmentation', augmentation, preprocess.AUGMENTATIONS))
    if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
        raise ConfigError(f'crop_scale is {tuple(crop_scale)}; it is 0 < smallest <= largest <= 1')
    if not 0 <= seed <= MAX_SEED:
        raise ConfigError(f'seed is {seed}; it is 0 to {MAX_SEED}')
    if start_step < 0:
        raise ConfigError(f'start_step is {start_step}; it is at least 0')


def _check_batch(
    source: ImageSource,
    global_batch_size: int,
    image_size: Size,
    process_index: int,
    process_count: int,
) -> None:
    if len(source) == 0:
        raise DataError('the source has no examples')
    if global_batch_size < 1 or min(height_and_width(image_size)) < 1:
        raise ConfigError(
            f'global_batch_size is {global_batch_size} and image_size {image_size}; '
            'they are at least 1'
        )
    if not 0 <= process_index < process_count:
        raise ConfigError(
            f'process_index is {process_index}; it is 0 to process_count - 1 = {process_count - 1}'
        )
    if global_batch_size % process_count:
        lower = global_batch_size // process_count * process_count
        raise ConfigError(
            f'global_batch_size is {global_batch_size}; it must divide by the {process_count} '
            f'processes: {lower or process_count} or {lower + process_count}'
        )
