"""Single images into batches of a few sizes, and the outputs of batches back to their images."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from gcnet_jax.errors import DataError
from gcnet_jax.inference.images import load_ahead

# What the network reads of one image or of a batch: an array, or arrays by their names.
Inputs = Any
# One output of one image, or of several outputs a dict by their names.
Row = Any


def batch_buckets(batch_size: int, device_count: int) -> tuple[int, ...]:
    """Returns the batch sizes that are compiled: powers of two times the devices, and the largest.

    Args:
      batch_size: Most images at once; rounded up to a multiple of the devices.
      device_count: Number of parts that a batch is split into.
    """
    largest = -(-batch_size // device_count)
    sizes = [2**power for power in range(largest.bit_length()) if 2**power < largest]
    return tuple(size * device_count for size in (*sizes, largest))


def pad_batch(batch: Inputs, size: int) -> Inputs:
    """Fills a batch up with zeros to a number of images."""

    def pad(array: np.ndarray) -> np.ndarray:
        return np.pad(array, ((0, size - len(array)), *((0, 0),) * (array.ndim - 1)))

    return jax.tree.map(pad, batch)


def stream_rows(
    items: Iterable[Any],
    load: Callable[[Any], Inputs],
    dispatch: Callable[[Inputs], Any],
    batch_size: int,
    num_threads: int | None,
) -> Iterator[tuple[Any, Row | DataError]]:
    """Yields every item with its row of the outputs; one batch is computed ahead.

    Args:
      items: Whatever `load` takes.
      load: Reads one image; called in threads. Its DataErrors take the place of rows.
      dispatch: Starts to compute the outputs of a batch, whose images are all of one size.
      batch_size: Images that are read for one batch; each size among them makes its own.
      num_threads: See `load_ahead`.
    """

    def load_or_say(item: Any) -> Any:
        try:
            return load(item)
        except DataError as error:
            return error

    with contextlib.closing(load_ahead(load_or_say, items, num_threads, 2 * batch_size)) as loaded:
        pending = None
        while entries := list(itertools.islice(loaded, batch_size)):
            started = entries, _start(entries, dispatch)
            if pending is not None:
                yield from _fetch(*pending)
            pending = started
        if pending is not None:
            yield from _fetch(*pending)


def convert_rows(
    rows: Iterator[tuple[Any, Row | DataError]], convert: Callable[[Row], Any]
) -> Iterator[tuple[Any, Any]]:
    """Yields every item with what `convert` makes of its row; DataErrors stay what they are."""
    # Closing this generator must end the threads behind the rows, too.
    with contextlib.closing(rows):
        for item, row in rows:
            yield item, row if isinstance(row, DataError) else convert(row)


def _start(
    entries: Sequence[tuple[Any, Any]], dispatch: Callable[[Inputs], Any]
) -> list[tuple[list[int], Any]]:
    """Dispatches the images among the entries, those of each size together.

    Returns:
      For each size the positions of its images, and their outputs.
    """
    by_size: dict[tuple, list[int]] = {}
    for position, (_, image) in enumerate(entries):
        if not isinstance(image, DataError):
            shapes = tuple(leaf.shape for leaf in jax.tree.leaves(image))
            by_size.setdefault(shapes, []).append(position)
    started = []
    for positions in by_size.values():
        images = [entries[position][1] for position in positions]
        batch = jax.tree.map(lambda *leaves: np.stack(leaves), *images)
        started.append((positions, dispatch(batch)))
    return started


def _fetch(
    entries: Sequence[tuple[Any, Any]], started: Sequence[tuple[list[int], Any]]
) -> Iterator[tuple[Any, Row | DataError]]:
    """Yields the entries with a row of the outputs in the place of each image."""
    results = [result for _, result in entries]
    for positions, outputs in started:
        arrays = jax.tree.map(np.asarray, outputs)
        for row, position in enumerate(positions):
            results[position] = jax.tree.map(lambda array, row=row: array[row], arrays)
    yield from zip((item for item, _ in entries), results, strict=True)
