"""Writes `.pth` files as `torch.save` does, without torch: a zip archive of a pickle and data.

The pickle is written opcode by opcode, with nothing in it but what `torch.load(weights_only=True)`
admits. Format: `torch/serialization.py` (version 3 of the archive, protocol 2 of the pickle).
"""

import os
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gcnet_jax.errors import CheckpointError
from gcnet_jax.files import as_path, write_whole

STORAGES = {
    'float64': 'DoubleStorage',
    'float32': 'FloatStorage',
    'float16': 'HalfStorage',
    'int64': 'LongStorage',
    'int32': 'IntStorage',
}
# Where torch puts the data of every record, so that a file can be mapped into memory.
ALIGNMENT = 64
_LOCAL_HEADER_BYTES = 30


def write_torch(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    *,
    meta: Mapping[str, Any] | None = None,
) -> None:
    """Writes a state dict as a file that `torch.load` reads; whole or not at all.

    Args:
      path: The file.
      tensors: By name, in the order in which they are written.
      meta: Plain values (texts, numbers, tuples, lists and dictionaries of them). With them the
        file holds `{'meta': meta, 'state_dict': tensors}`, as mmdetection's do; without, the
        tensors alone.

    Raises:
      CheckpointError: It cannot be written, or a tensor is of a type that torch does not have.
    """
    path = as_path(path)
    # Row by row; ascontiguousarray would make a vector of a single number.
    arrays = {name: np.asarray(array, order='C') for name, array in tensors.items()}
    state = _state_dict(arrays)
    contents = (
        state
        if meta is None
        else b'}(' + _text('meta') + _value(meta) + _text('state_dict') + state + b'u'
    )
    with write_whole(path, CheckpointError) as partial:
        _write_archive(partial, b'\x80\x02' + contents + b'.', arrays)


def _write_archive(path: Path, pickle: bytes, arrays: Mapping[str, np.ndarray]) -> None:
    with zipfile.ZipFile(path, 'w') as archive:

        def put(name: str, data: Any) -> None:
            record = zipfile.ZipInfo(f'archive/{name}')
            start = archive.fp.tell() + _LOCAL_HEADER_BYTES + len(record.filename) + 4
            # An extra field of torch's own, 'FB', whose length is that of the padding.
            padding = -start % ALIGNMENT
            record.extra = struct.pack('<2sH', b'FB', padding) + b'Z' * padding
            archive.writestr(record, data)

        put('data.pkl', pickle)
        put('.format_version', b'1')
        put('.storage_alignment', str(ALIGNMENT).encode())
        put('byteorder', b'little')
        for key, array in enumerate(arrays.values()):
            little = array.astype(array.dtype.newbyteorder('<'), copy=False)
            put(f'data/{key}', memoryview(little.reshape(-1).view(np.uint8)))
        put('version', b'3\n')


def _state_dict(arrays: Mapping[str, np.ndarray]) -> bytes:
    items = (_text(name) + _tensor(key, array) for key, (name, array) in enumerate(arrays.items()))
    return _ordered_dict() + b'(' + b''.join(items) + b'u'


def _tensor(key: int, array: np.ndarray) -> bytes:
    kind = STORAGES.get(array.dtype.name)
    if kind is None:
        raise CheckpointError(
            f'a tensor of type {array.dtype.name} cannot be written for torch; '
            f'it has {", ".join(STORAGES)}'
        )
    strides = tuple(stride // array.itemsize for stride in array.strides)
    storage = (
        *(_text('storage'), _global('torch', kind), _text(str(key)), _text('cpu')),
        _value(array.size),
    )
    arguments = (
        _tuple(storage) + b'Q',  # A reference to what lies outside the pickle.
        *(_value(value) for value in (0, array.shape, strides, False)),
        _ordered_dict(),  # Hooks, which nobody has.
    )
    return _global('torch._utils', '_rebuild_tensor_v2') + _tuple(arguments) + b'R'


def _ordered_dict() -> bytes:
    return _global('collections', 'OrderedDict') + b')R'


def _global(module: str, name: str) -> bytes:
    return f'c{module}\n{name}\n'.encode()


def _tuple(parts: Any) -> bytes:
    return b'(' + b''.join(parts) + b't'


def _text(value: str) -> bytes:
    data = value.encode()
    return b'X' + struct.pack('<I', len(data)) + data


def _value(value: Any) -> bytes:
    """The opcodes that push a plain value."""
    if value is None or isinstance(value, bool):
        return {None: b'N', True: b'\x88', False: b'\x89'}[value]
    if isinstance(value, int):
        if -(2**31) <= value < 2**31:
            return b'J' + struct.pack('<i', value)
        data = value.to_bytes(value.bit_length() // 8 + 1, 'little', signed=True)
        return b'\x8a' + struct.pack('<B', len(data)) + data
    if isinstance(value, float):
        return b'G' + struct.pack('>d', value)
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, tuple):
        return _tuple(map(_value, value))
    if isinstance(value, list):
        return b'](' + b''.join(map(_value, value)) + b'e'
    if isinstance(value, Mapping):
        return b'}(' + b''.join(_value(k) + _value(v) for k, v in value.items()) + b'u'
    raise TypeError(f'{type(value).__name__} is no plain value')
