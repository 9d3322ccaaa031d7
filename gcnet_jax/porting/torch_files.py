"""Reads `.pth`, `.pt` and `.bin` files: the tensors in them, as numpy arrays. Needs no torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gcnet_jax.errors import CheckpointError, one_line
from gcnet_jax.files import reason
from gcnet_jax.porting.pickled_values import (
    ITEM_BYTES,
    DamagedPickle,
    OtherTensor,
    Record,
    StoredTensor,
    TooLarge,
)
from gcnet_jax.porting.tensors import LazyTensor, check_names, refuse_kind
from gcnet_jax.porting.torch_containers import Container, read_container
from gcnet_jax.porting.wrappers import find_state_dict


def read_torch(path: Path, weights: str) -> tuple[dict[str, LazyTensor], str, dict[str, Any]]:
    """Describes the tensors of a file.

    Args:
      path: The file.
      weights: Which of its state dicts, see `read_checkpoint`.

    Returns:
      The tensors by name, the key of the state dict, and the plain values beside it.

    Raises:
      CheckpointError: Damaged, larger than what is read, holding objects of classes that are not
        plain data, without a state dict, or with a tensor of a kind that is not read.
    """
    try:
        container = read_container(path)
    except TooLarge as error:
        raise CheckpointError(f'{one_line(path)}: {one_line(error)}') from None
    except DamagedPickle as error:
        raise _damaged(path, str(error)) from None
    loaded = container.contents.value
    if container.contents.foreign:
        raise CheckpointError(_foreign(path, loaded, container.contents.foreign))
    wrapper, found, metadata = find_state_dict(path, loaded, weights)
    entries: dict[str, LazyTensor] = {}
    others = []
    for name, value in found.items():
        if isinstance(name, str) and isinstance(value, (StoredTensor, OtherTensor)):
            refuse_kind(path, name, _kind_of(value))
            entries[name] = LazyTensor(
                value.shape, value.storage.dtype, _reader(path, container, value)
            )
        else:
            others.append(f'{one_line(name, 60)}: {type_name(value)}')
    if others:
        raise CheckpointError(
            f'{one_line(path)} is not a state dict: it holds {", ".join(others[:4])}'
            f'{" and more" if len(others) > 4 else ""} among {len(entries)} tensors'
        )
    check_names(path, entries)
    return entries, wrapper, metadata


def type_name(value: Any) -> str:
    """Returns what an error calls an object of a file."""
    return one_line(value.of, 60) if isinstance(value, Record) else type(value).__name__


def _kind_of(value: StoredTensor | OtherTensor) -> str:
    return one_line(value.kind, 60) if isinstance(value, OtherTensor) else value.storage.dtype


def _reader(path: Path, container: Container, tensor: StoredTensor) -> Callable[[], np.ndarray]:
    storage = tensor.storage
    item = ITEM_BYTES[storage.dtype]
    place = container.places[storage.key] + tensor.offset * item
    is_empty = 0 in tensor.shape
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True))
    count = 0 if is_empty else last + 1
    is_bfloat16 = storage.dtype == 'bfloat16'
    dtype = np.dtype(ml_dtypes.bfloat16 if is_bfloat16 else storage.dtype).newbyteorder('<')

    def read() -> np.ndarray:
        data = bytearray(count * item)
        try:
            with path.open('rb') as file:
                file.seek(place)
                got = file.readinto(data)
        except OSError as error:
            raise _damaged(path, reason(error)) from None
        if got < len(data):
            raise _damaged(path, 'it was cut off since it was opened')
        if is_empty:
            return np.empty(tensor.shape, dtype)
        strides = tuple(step * item for step in tensor.strides)
        values = np.frombuffer(data, dtype)
        return np.asarray(np.lib.stride_tricks.as_strided(values, tensor.shape, strides), order='C')

    return read


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f'{one_line(path)} is a damaged or truncated PyTorch file ({one_line(why, 160)}): '
        'fetch it again'
    )


def _foreign(path: Path, loaded: Any, foreign: str) -> str:
    """Says what to do about a file with objects of classes: depends on where they are."""
    start = (
        f'{one_line(path)} holds an object of {one_line(foreign, 100)}, which could run code when '
        'loaded; it was not loaded. If you trust the file, load it with torch.load(FILE, '
        'weights_only=False) where that library is installed, '
    )
    if not isinstance(loaded, dict):
        return f'{start}save the state_dict() of the module that it gives, and port that'
    for key, value in loaded.items():
        if key in ('state_dict', 'model', 'ema', 'net', 'module') and isinstance(value, Record):
            return f'{start}save its [{key!r}].state_dict() with torch.save, and port that'
    key = next((k for k, v in loaded.items() if isinstance(v, dict) and _has_tensor(v)), None)
    if isinstance(key, str):
        return f'{start}save its [{one_line(key, 60)!r}] alone with torch.save, and port that'
    return f'{start}save the tensors of its network alone with torch.save, and port that'


def _has_tensor(values: dict[Any, Any]) -> bool:
    return any(isinstance(value, (StoredTensor, OtherTensor)) for value in values.values())
