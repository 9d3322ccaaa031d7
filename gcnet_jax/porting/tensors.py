"""Tensors of a checkpoint file by name, each read when it is asked for."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from gcnet_jax.errors import CheckpointError, one_line

# Limits of what is read.
MAX_TENSORS = 50_000
MAX_NAME_LENGTH = 1_000

_FLOATING = ('float64', 'float32', 'float16', 'bfloat16')
_INTEGERS = ('int64', 'int32', 'int16', 'int8', 'uint64', 'uint32', 'uint16', 'uint8')


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor that has not been read: its shape, its type's name and the way to read it."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


class LazyTensors(Mapping[str, np.ndarray]):
    """Tensors by name; indexing reads one from the file, as float32 where it is floating point.

    Integers are read where they are a single number, as `num_batches_tracked` is; an integer
    tensor of any other shape raises a CheckpointError.
    """

    def __init__(self, entries: Mapping[str, LazyTensor]):
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        array = as_float32(entry.read())
        if array.dtype != np.float32 and array.shape:
            raise CheckpointError(
                f'the tensor {one_line(name)} holds {entry.dtype} numbers, and weights are '
                'floating point: save it with .float(), or dequantised if it was quantised'
            )
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def entries(self) -> dict[str, LazyTensor]:
        """Every tensor as it was described, without reading one."""
        return dict(self._entries)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape, without reading one."""
        return {name: entry.shape for name, entry in self._entries.items()}

    @property
    def dtypes(self) -> dict[str, str]:
        """The name of every tensor's type in the file, such as 'float16'."""
        return {name: entry.dtype for name, entry in self._entries.items()}

    def without_prefix(self, prefix: str) -> 'LazyTensors':
        """Returns the same tensors with `prefix` taken off the names that start with it."""
        return LazyTensors({k.removeprefix(prefix): entry for k, entry in self._entries.items()})

    def leaving(self, prefix: str) -> 'LazyTensors':
        """Returns the tensors whose names do not start with `prefix`."""
        return LazyTensors(
            {k: entry for k, entry in self._entries.items() if not k.startswith(prefix)}
        )

    def only(self, prefix: str) -> 'LazyTensors':
        """Returns the tensors whose names start with `prefix`, without it."""
        return LazyTensors(
            {k.removeprefix(prefix): v for k, v in self._entries.items() if k.startswith(prefix)}
        )


def as_float32(array: np.ndarray) -> np.ndarray:
    """Returns floating-point numbers as float32, others as they are."""
    is_floating = array.dtype.kind == 'f' or 'float' in array.dtype.name
    # What float32 cannot hold becomes infinite, which whoever takes the weights checks for.
    with np.errstate(over='ignore'):
        return array.astype(np.float32, copy=False) if is_floating else array


def refuse_kind(path: object, name: str, kind: str) -> None:
    """Refuses a tensor that no network here has.

    Args:
      path: The file.
      name: The tensor's.
      kind: Its type, such as 'bool', or what else it is, such as 'sparse'.

    Raises:
      CheckpointError: Unless it is a dense tensor of floating-point numbers or integers.
    """
    if kind not in (*_FLOATING, *_INTEGERS):
        raise CheckpointError(
            f'{one_line(path)}: the tensor {one_line(name)} is {kind}, which is not read; weights '
            'are dense floating-point tensors: save it as one, or without it'
        )


def check_count(path: object, count: int) -> None:
    """Raises a CheckpointError for more tensors than are read."""
    if count > MAX_TENSORS:
        raise CheckpointError(
            f'{one_line(path)} names {count:,} tensors; at most {MAX_TENSORS:,} are read'
        )


def check_names(path: object, names: Mapping[str, object]) -> None:
    """Raises a CheckpointError for more or longer names than are read."""
    check_count(path, len(names))
    for name in names:
        if len(name) > MAX_NAME_LENGTH:
            raise CheckpointError(
                f'{one_line(path)} has a tensor whose name has {len(name):,} characters, '
                f'{one_line(name, 60)}; at most {MAX_NAME_LENGTH:,} are read'
            )
