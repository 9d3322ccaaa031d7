"""Checksums of arrays and of JSON, by which damaged checkpoints are recognised.

They find damage, not malice: whoever writes a file can write its checksums too.
"""

import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from gcnet_jax.errors import CheckpointError


def json_checksum(value: Any) -> int:
    """Returns a checksum of what JSON holds; the order of keys does not count."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def checksums(tree: Any) -> dict[str, int]:
    """Returns a checksum of every leaf, the same on any number of devices and processes.

    Every 32 bits count with their position in the full array, so a changed bit or two swapped
    values are seen whichever way the array is split.
    """
    partial = {
        jax.tree_util.keystr(path): _leaf_sum(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        own = np.asarray(list(partial.values()), np.uint32)
        total = np.sum(multihost_utils.process_allgather(own), axis=0, dtype=np.uint32)
        partial = dict(zip(partial, map(int, total), strict=True))
    return partial


def _leaf_sum(leaf: Any) -> int:
    """Sums the parts of an array that this process is the first to hold."""
    if not isinstance(leaf, jax.Array):
        leaf = np.asarray(leaf)
        parts = [((slice(None),) * leaf.ndim, leaf)] if jax.process_index() == 0 else []
    else:
        shards = leaf.addressable_shards
        parts = [(shard.index, shard.data) for shard in shards if shard.replica_id == 0]
    total = 0
    for index, data in parts:
        values = np.ascontiguousarray(np.asarray(data))
        unsigned = np.dtype(f'u{values.dtype.itemsize}')
        bits = values.view(unsigned).astype(np.uint32)
        position = np.zeros((), np.uint32)
        stride = 1
        for axis in reversed(range(leaf.ndim)):
            start = index[axis].start or 0
            along = np.arange(start, start + bits.shape[axis], dtype=np.uint32)
            along = along.reshape((-1,) + (1,) * (leaf.ndim - 1 - axis))
            position = position + along * np.uint32(stride % 2**32)
            stride *= leaf.shape[axis]
        total += int(np.sum(bits * (2 * position + 1), dtype=np.uint32))
    return total % 2**32


def check_checksums(tree: Any, expected: Any, place: object) -> None:
    """Raises CheckpointError where a leaf is not what was saved.

    Args:
      tree: The arrays.
      expected: What `checksums` gave for them, as it was read from the file.
      place: The checkpoint, named in errors.
    """
    if not isinstance(expected, Mapping):
        raise CheckpointError(f'{place}: damaged: its checksums are {type(expected).__name__}')
    actual = checksums(tree)
    wrong = sorted(key for key in actual if actual[key] != expected.get(key))
    if wrong:
        raise CheckpointError(f'{place}: damaged: {len(wrong)} arrays differ, first {wrong[0]}')


def check_json(value: Any, expected: Any, name: str, place: object) -> None:
    """Raises CheckpointError where a JSON item is not what was saved."""
    if json_checksum(value) != expected:
        raise CheckpointError(f'{place}: damaged: the {name} differs')
