"""Reads `.safetensors` files: the header's limits here, everything else by the library."""

import json
import math
import struct
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (safetensors looks bfloat16 up among numpy's types)
import numpy as np

from gcnet_jax.errors import CheckpointError, one_line
from gcnet_jax.files import reason
from gcnet_jax.porting.tensors import LazyTensor, check_count, check_names, refuse_kind

# Limit of the header: names, types, shapes, places and metadata of all tensors.
MAX_HEADER_BYTES = 16 * 2**20

_DTYPES = {
    'F64': 'float64',
    'F32': 'float32',
    'F16': 'float16',
    'BF16': 'bfloat16',
    'I64': 'int64',
    'I32': 'int32',
    'I16': 'int16',
    'I8': 'int8',
    'U64': 'uint64',
    'U32': 'uint32',
    'U16': 'uint16',
    'U8': 'uint8',
    'BOOL': 'bool',
    'C64': 'complex64',
    'F8_E4M3': 'float8_e4m3',
    'F8_E5M2': 'float8_e5m2',
}


def read_safetensors(path: Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """Describes the tensors of a file.

    Returns:
      The tensors by name, and the metadata that the file carries.

    Raises:
      CheckpointError: Damaged, larger than what is read, or with a tensor of a kind that is not.
    """
    import safetensors

    header = _header(path)
    metadata = header.pop('__metadata__', {})
    check_names(path, header)
    for name, entry in header.items():
        kind = entry.get('dtype') if isinstance(entry, dict) else None
        refuse_kind(path, name, _DTYPES.get(str(kind), one_line(kind, 30)))

    def read(name: str) -> np.ndarray:
        # Opened again for every tensor: the pages that a memory map has read count as memory in use
        # until it is closed.
        try:
            with safetensors.safe_open(path, framework='np') as handle:
                return handle.get_tensor(name)
        except (safetensors.SafetensorError, OSError, TypeError, ValueError) as error:
            raise _damaged(path, reason(error)) from None

    try:
        with safetensors.safe_open(path, framework='np') as handle:
            described = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            entries = {
                name: LazyTensor(
                    tuple(tensor.get_shape()),
                    _DTYPES[tensor.get_dtype()],
                    lambda name=name: read(name),
                )
                for name, tensor in described.items()
            }
    except (safetensors.SafetensorError, OSError, TypeError, ValueError, KeyError) as error:
        raise _damaged(path, reason(error)) from None
    if entries.keys() != header.keys() or not isinstance(metadata, dict):
        raise _damaged(path, 'its header can be read in two ways')
    for name, entry in entries.items():
        if math.prod(entry.shape) and len(entry.shape) > 32:
            raise _damaged(path, f'{one_line(name)} has {len(entry.shape)} dimensions')
    return entries, metadata


def _header(path: Path) -> dict[str, Any]:
    """The header as the JSON object that it is, within limits."""
    with path.open('rb') as file:
        (size,) = struct.unpack('<Q', file.read(8))
        if size > MAX_HEADER_BYTES:
            raise CheckpointError(
                f'{one_line(path)} has a header of {size:,} bytes; '
                f'at most {MAX_HEADER_BYTES:,} are read'
            )
        text = file.read(size)
    # Each tensor gives its place: a header of too many is not worth parsing.
    check_count(path, text.count(b'"data_offsets"'))
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise _damaged(path, 'its header is nested too deeply') from None
    except ValueError as error:
        raise _damaged(path, reason(error)) from None
    if not isinstance(header, dict):
        raise _damaged(path, 'its header is no JSON object')
    return header


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError('its header has one name twice')
    return found


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f'{one_line(path)} is a damaged or truncated safetensors file ({one_line(why, 160)}): '
        'fetch it again'
    )
