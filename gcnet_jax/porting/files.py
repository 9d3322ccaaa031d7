"""Reads PyTorch checkpoint files as numpy arrays: `.safetensors` without torch, `.pth` with it.

A file is recognised by its first bytes, not by its name. Nothing in it is ever executed: pickles go
through torch's `weights_only` reader, and there is no other way in. Tensors are read one by one
when they are asked for.
"""

import dataclasses
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (safetensors looks bfloat16 up among numpy's types)
import numpy as np

from gcnet_jax.errors import CheckpointError, unknown_name

WEIGHTS = ('auto', 'model', 'ema')

# The keys under which timm, torchvision, mmengine, Lightning and others put their tensors.
MODEL_WRAPPERS = ('state_dict', 'model', 'model_state_dict', 'model_state')
EMA_WRAPPERS = ('state_dict_ema', 'model_ema', 'ema_state_dict')

# What DataParallel, torch.compile and averaged copies put before every name.
WHOLE_PREFIXES = ('module.', '_orig_mod.')

# Before 2.6, torch's `weights_only` reader could be made to run code (CVE-2025-32434).
OLDEST_SAFE_TORCH = (2, 6)


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor that has not been read: its shape, its type's name and the way to read it."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


class LazyTensors(Mapping[str, np.ndarray]):
    """Tensors by name; indexing reads one from the file, as float32 where it is floating point."""

    def __init__(self, entries: Mapping[str, LazyTensor]):
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._entries[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape, without reading one."""
        return {name: entry.shape for name, entry in self._entries.items()}

    def without_prefix(self, prefix: str) -> 'LazyTensors':
        """Returns the same tensors with `prefix` taken off the names that start with it."""
        return LazyTensors({k.removeprefix(prefix): entry for k, entry in self._entries.items()})


@dataclasses.dataclass(frozen=True)
class TorchFile:
    """A checkpoint that was opened.

    Attributes:
      path: The file.
      tensors: Every tensor by the name that its network gave it, read when asked for.
      wrapper: The key under which the tensors lay, such as 'state_dict_ema'; '' without one.
      prefix: What was taken off the front of every name, such as 'module.'.
      metadata: What else the file says in plain text and numbers ('arch', 'epoch', ...).
    """

    path: Path
    tensors: LazyTensors
    wrapper: str = ''
    prefix: str = ''
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def read_checkpoint(path: str | os.PathLike[str], *, weights: str = 'auto') -> TorchFile:
    """Opens a `.safetensors`, `.pth`, `.pt` or `.bin` file.

    Args:
      path: The file. Its first bytes tell what it is, whatever its name.
      weights: 'ema' takes the averaged weights that some trainers keep beside the raw ones, 'model'
        the raw ones, 'auto' the averaged ones where there are any (as timm does).

    Returns:
      The names and shapes of all tensors; the values are read one by one when asked for,
      floating-point ones as float32.

    Raises:
      CheckpointError: No such file, a directory, a file that is damaged, not a checkpoint or that
        would run code, `weights` that it does not hold, or a `.pth` where torch is not installed.
    """
    if weights not in WEIGHTS:
        raise CheckpointError(unknown_name('choice of weights', weights, WEIGHTS))
    path = Path(path).expanduser()
    if path.is_dir():
        raise CheckpointError(
            f'{path} is a directory; give the checkpoint file in it, such as model.safetensors'
        )
    try:
        with path.open('rb') as file:
            start = file.read(16)
    except FileNotFoundError:
        raise CheckpointError(f'no such checkpoint: {path}') from None
    except OSError as error:
        raise CheckpointError(f'cannot read {path}: {error.strerror or error}') from None
    if not start:
        raise CheckpointError(f'{path} is empty; the download was cut off: fetch it again')
    if start[8:9] == b'{':
        return _read_safetensors(path, weights)
    if start[:4] == b'PK\x03\x04' or start[:1] == b'\x80':
        return _read_torch(path, weights, is_zip=start[:4] == b'PK\x03\x04')
    raise CheckpointError(
        f'{path} is neither a safetensors nor a PyTorch file: it starts with {start[:8]!r}'
    )


def _read_safetensors(path: Path, weights: str) -> TorchFile:
    import safetensors

    if weights == 'ema':
        raise CheckpointError(
            f"{path} holds one set of weights; weights='ema' needs a training checkpoint (.pth)"
        )

    def open_file():
        return safetensors.safe_open(path, framework='np')

    def read(name: str) -> np.ndarray:
        # Opened again for every tensor: the pages that a memory map has read count as memory in use
        # until it is closed.
        with open_file() as handle:
            return _as_float32(handle.get_tensor(name))

    try:
        with open_file() as handle:
            described = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            entries = {
                name: LazyTensor(
                    tuple(tensor.get_shape()), tensor.get_dtype(), lambda name=name: read(name)
                )
                for name, tensor in described.items()
            }
            metadata = handle.metadata() or {}
    except (safetensors.SafetensorError, OSError, TypeError) as error:
        raise CheckpointError(
            f'{path} is a damaged or truncated safetensors file ({error}): fetch it again'
        ) from None
    return _opened(path, entries, '', metadata)


def _read_torch(path: Path, weights: str, is_zip: bool) -> TorchFile:
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f'{path} is a pickle, which only PyTorch reads: pip install torch (the CPU build is '
            'enough), or convert it to .safetensors elsewhere'
        ) from None
    version = tuple(int(part) for part in re.findall(r'\d+', torch.__version__)[:2])
    if version < OLDEST_SAFE_TORCH:
        raise CheckpointError(
            f'torch {torch.__version__} can be made to run code by a checkpoint (CVE-2025-32434); '
            f'upgrade to 2.6 or newer to read {path}'
        )
    try:
        with torch.serialization.safe_globals(_harmless_globals()), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # the error says what a warning would
            # Files older than torch 1.6 are not zip archives and cannot be mapped.
            loaded = torch.load(path, map_location='cpu', weights_only=True, mmap=is_zip)
    except Exception as error:  # torch raises a dozen kinds for damaged files
        raise CheckpointError(_why_unreadable(path, error)) from None
    wrapper, found, metadata = _unwrap(path, loaded, weights)
    if not isinstance(found, Mapping):
        raise CheckpointError(
            f'{path} is not a state dict: it holds a {type(found).__name__}; save '
            "model.state_dict() with torch.save, or {'state_dict': model.state_dict()}"
        )
    entries, others = {}, []
    for name, value in found.items():
        if isinstance(value, torch.Tensor) and isinstance(name, str):
            entries[name] = LazyTensor(
                tuple(value.shape), str(value.dtype), lambda value=value: _from_torch(value)
            )
        else:
            others.append(f'{name}: {type(value).__name__}')
    if others:
        raise CheckpointError(
            f'{path} is not a state dict: it holds {", ".join(others[:4])}'
            f'{" and more" if len(others) > 4 else ""} among {len(entries)} tensors'
        )
    return _opened(path, entries, wrapper, metadata)


def _unwrap(path: Path, loaded: Any, weights: str) -> tuple[str, Any, dict[str, Any]]:
    """Finds the state dict that was asked for: (its key, itself, the plain values beside it)."""
    if not isinstance(loaded, Mapping):
        return '', loaded, {}
    present = [k for k in (*EMA_WRAPPERS, *MODEL_WRAPPERS) if isinstance(loaded.get(k), Mapping)]
    allowed = {
        'ema': EMA_WRAPPERS,
        'model': MODEL_WRAPPERS,
        'auto': (*EMA_WRAPPERS, *MODEL_WRAPPERS),
    }[weights]
    chosen = next((k for k in allowed if k in present), None)
    if chosen is None:
        if weights == 'ema' or present:
            raise CheckpointError(
                f'{path} holds no {weights} weights; it holds: '
                f"{', '.join(present) or 'one state dict without a wrapper'}; use weights='auto'"
            )
        return '', loaded, {}
    plain = {
        key: value
        for key, value in loaded.items()
        if isinstance(key, str) and isinstance(value, (str, int, float))
    }
    return chosen, loaded[chosen], plain


def _opened(
    path: Path, entries: dict[str, LazyTensor], wrapper: str, metadata: Mapping[str, Any]
) -> TorchFile:
    if not entries:
        raise CheckpointError(f'{path} holds no tensors')
    tensors, prefix = LazyTensors(entries), ''
    for part in WHOLE_PREFIXES * 2:
        # A torchvision average keeps its count beside the `module.` names.
        names = [name for name in tensors if name != 'n_averaged']
        if names and all(name.startswith(part) for name in names):
            tensors, prefix = tensors.without_prefix(part), prefix + part
    return TorchFile(path, tensors, wrapper, prefix, metadata)


def _as_float32(array: np.ndarray) -> np.ndarray:
    is_floating = array.dtype.kind == 'f' or 'float' in array.dtype.name
    return array.astype(np.float32, copy=False) if is_floating else array


def _from_torch(tensor: Any) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


class _HistoryBuffer:
    """Stands in for mmengine's record of past losses, so that it can be skipped."""


def _harmless_globals() -> list[Any]:
    """What training checkpoints hold beside tensors: the arguments of a run and numpy numbers.

    Each is plain data: rebuilding one calls nothing but its own constructor.
    """
    import argparse

    numpy_types = {type(np.dtype(code)) for code in 'bhilqBHILQefd?'}
    multiarray = np._core.multiarray
    return [
        argparse.Namespace,
        np.dtype,
        np.ndarray,
        *numpy_types,
        *(
            (getattr(multiarray, name), f'{module}.multiarray.{name}')
            for name in ('scalar', '_reconstruct')
            for module in ('numpy.core', 'numpy._core')
        ),
        (_HistoryBuffer, 'mmengine.logging.history_buffer.HistoryBuffer'),
    ]


def _why_unreadable(path: Path, error: Exception) -> str:
    text = str(error)
    refused = re.search(r'GLOBAL ([\w.]+)', text)
    if refused:
        return (
            f'{path} holds an object of {refused[1]}, which could run code when loaded; it was not '
            'loaded. If you trust the file, run torch.save(torch.load(FILE, weights_only=False)'
            "['state_dict'], NEW) where that library is installed, and port NEW"
        )
    if 'TorchScript' in text:
        return f'{path} is a TorchScript program, not a state dict; save model.state_dict() instead'
    if 'Unsupported operand' in text:
        return f'{path} is a pickle that torch.save did not write; save model.state_dict() with it'
    reason = text.strip().splitlines()[0][:160] if text.strip() else type(error).__name__
    return f'{path} is a damaged or truncated PyTorch file ({reason}): fetch it again'
