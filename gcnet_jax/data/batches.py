"""Batches by Grain, of any arrays: a function of the seed and the step alone.

One global order of the examples is drawn for every epoch and laid end to end; batch k is the
examples k * B to (k + 1) * B of it, and process p of P takes the p-th part of every batch. So the
position in the data is nothing but the step, and any number of processes, threads or workers sees
the same batches.

What an example is, the caller says: `loader` makes images with labels, `segmentation_loader` images
with label maps, `detection_loader` images with objects, in an order of its own.
"""

import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags

from gcnet_jax.data.sizes import Size, height_and_width
from gcnet_jax.errors import ConfigError, DataError, UnlabelledError

MAX_SEED = 2**32 - 1
MAX_THREADS = 16

# The arrays of one example, or of a batch of them.
Example = dict[str, np.ndarray]
Batch = dict[str, np.ndarray]
Record = dict[str, Any]


class ExampleSource(Protocol):
    """What the loaders need of a source."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def describe(self, index: int) -> str:
        """Returns the name of a record for messages."""
        ...


class Order(Protocol):
    """An endless order of records, in place of one epoch after another; picklable."""

    def __call__(self, position: int) -> int:
        """Returns the record at a position."""
        ...

    def following(self, record: int) -> Iterator[int]:
        """Yields a record, then those that may stand in for it if it is damaged."""
        ...


class Batches(Iterator[Batch]):
    """An iterator over batches. Dropping or closing it ends its threads.

    Attributes:
      skipped: Damaged images met so far in the batches that were handed out (of this process).
    """

    def __init__(self, dataset: Iterable[tuple[Batch, int]]) -> None:
        self.skipped = 0
        self._iterator = iter(dataset)

    def __next__(self) -> Batch:
        batch, skipped = next(self._iterator)
        self.skipped += int(skipped)
        return batch

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


def endless_batches(
    source: ExampleSource,
    make: Callable[[Record, np.random.Generator], Example],
    *,
    global_batch_size: int,
    image_size: Size,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int | None = None,
    num_workers: int = 0,
    skip_damaged: bool = False,
    order: Order | None = None,
) -> Batches:
    """Returns this process's part of every training batch from `start_step` on, without end.

    Args:
      source: The records.
      make: Makes an example of a record; it is picklable if there are workers, a function of its
        arguments alone, and raises DataError for a damaged record.
      global_batch_size: Examples per step over all processes.
      image_size: Size of the images handed out, in pixels.
      seed: Seeds the order and the generators that `make` gets; 0 to 2**32 - 1.
      start_step: Step of the first batch.
      process_index, process_count: Which part of every batch, and the number of parts.
      num_threads: Batches that are made at once and held in memory, in each worker if there are
        any; None for one per processor, at most 16; 0 for none, in the caller's thread.
      num_workers: Processes that make batches; 0 for threads of this one. They are spawned, so the
        caller's script needs the usual `if __name__ == '__main__'`.
      skip_damaged: Replace a damaged record by the next readable one, and count it.
      order: Which records make up the batches; None shuffles all of them anew for each epoch.

    Raises:
      ConfigError: If an argument cannot work.
      DataError: While iterating, if a record is damaged and not skipped.
    """
    _check_batch(source, global_batch_size, image_size, process_index, process_count)
    _check_start(seed, start_step)
    if order is None:
        dataset = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    else:
        dataset = grain.MapDataset.range(sys.maxsize).seed(seed).map(order)
    dataset = dataset.random_map(_TrainExample(source, make, skip_damaged, order))
    dataset = dataset.batch(
        global_batch_size // process_count, drop_remainder=True, batch_fn=_stack
    )
    dataset = dataset[process_index::process_count][start_step:]
    return Batches(_run(dataset, num_threads, num_workers))


def batches_of_all(
    source: ExampleSource,
    make: Callable[[Record], Example],
    filling: Callable[[], Example],
    *,
    global_batch_size: int,
    image_size: Size,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int | None = None,
    num_workers: int = 0,
    skip_damaged: bool = False,
) -> Batches:
    """Returns every example once over all processes, in order; all get the same number of batches.

    Args:
      source: The records.
      make: Makes an example of a record, as in `endless_batches`.
      filling: Makes an example like those of `make` that does not count: it fills up the last
        batch. Every example gets 'mask', a bool that is False for these.
      global_batch_size: Examples per step over all processes; may be more than there are.
      image_size, process_index, process_count, num_threads, num_workers: As in `endless_batches`.
      skip_damaged: Put a filling in place of a damaged record, and count it.

    Raises:
      ConfigError: If an argument cannot work.
      DataError: While iterating, if a record is damaged and not skipped.
    """
    _check_batch(source, global_batch_size, image_size, process_index, process_count)
    count = -(-len(source) // global_batch_size) * global_batch_size
    load = _EvaluationExample(source, make, filling, skip_damaged)
    dataset = grain.MapDataset.range(count).map(load)
    dataset = dataset.batch(
        global_batch_size // process_count, drop_remainder=True, batch_fn=_stack
    )
    dataset = dataset[process_index::process_count]
    return Batches(_run(dataset, num_threads, num_workers))


@dataclasses.dataclass(frozen=True)
class _TrainExample:
    """Makes the training example of one index; picklable, for worker processes."""

    source: ExampleSource
    make: Callable[[Record, np.random.Generator], Example]
    skip_damaged: bool
    order: Order | None = None

    def __call__(self, index: int, rng: np.random.Generator) -> tuple[Example, int]:
        for skipped, place in enumerate(self._following(int(index))):
            try:
                return self.make(self.source[place], rng), skipped
            except UnlabelledError:
                raise
            except DataError as error:
                reason = str(error)
                if not self.skip_damaged:
                    raise _damaged(self.source, place, reason) from error
        raise DataError(f'{self.source.describe(0)} and all others are damaged: {reason}')

    def _following(self, record: int) -> Iterator[int]:
        if self.order is not None:
            return self.order.following(record)
        length = len(self.source)
        return ((record + skipped) % length for skipped in range(length))


@dataclasses.dataclass(frozen=True)
class _EvaluationExample:
    """Makes the evaluation example of one index, or the filling beyond the last one."""

    source: ExampleSource
    make: Callable[[Record], Example]
    filling: Callable[[], Example]
    skip_damaged: bool

    def __call__(self, index: int) -> tuple[Example, int]:
        nothing = {'mask': np.array(False)}
        if index >= len(self.source):
            return self.filling() | nothing, 0
        try:
            return self.make(self.source[int(index)]) | {'mask': np.array(True)}, 0
        except UnlabelledError:
            raise
        except DataError as error:
            if not self.skip_damaged:
                raise _damaged(self.source, int(index), str(error)) from error
            return self.filling() | nothing, 1


def _damaged(source: ExampleSource, index: int, reason: str) -> DataError:
    return DataError(
        f'{source.describe(index)}: {reason}; repair it, or leave such images out with skip_damaged'
    )


def _stack(examples: Sequence[tuple[Example, int]]) -> tuple[Batch, int]:
    arrays, skipped = zip(*examples, strict=True)
    return {key: np.stack([example[key] for example in arrays]) for key in arrays[0]}, sum(skipped)


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


def _check_start(seed: int, start_step: int) -> None:
    if not 0 <= seed <= MAX_SEED:
        raise ConfigError(f'seed is {seed}; it is 0 to {MAX_SEED}')
    if start_step < 0:
        raise ConfigError(f'start_step is {start_step}; it is at least 0')


def _check_batch(
    source: ExampleSource,
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
