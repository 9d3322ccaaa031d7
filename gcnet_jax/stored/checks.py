"""What a checkpoint's files and arrays must be before they are used, whoever wrote them."""

import math
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gcnet_jax.errors import CheckpointError, one_line
from gcnet_jax.files import is_bucket

# Trained weights hardly compress: arrays that are far larger than the files they come from would
# only fill the memory.
MAX_FILES = 100_000
MAX_EXPANSION, ALWAYS_ALLOWED_BYTES = 20, 2**26


def check_files(checkpoint: Path) -> int:
    """Returns the size of a checkpoint in bytes; refuses what no checkpoint is made of.

    Raises:
      CheckpointError: It holds something that is neither a regular file nor a directory (reading a
        FIFO would wait for ever), or too many files.
    """
    if is_bucket(checkpoint):
        return sum(path.stat().length for path in _objects(checkpoint))
    total = stored = count = 0
    for folder, folders, names in os.walk(checkpoint):
        for name in (*folders, *names):
            path = os.path.join(folder, name)
            try:
                status = os.stat(path)
            except OSError as error:
                raise CheckpointError(
                    f'{checkpoint}: damaged: {one_line(path)}: {error.strerror}'
                ) from error
            is_folder = stat.S_ISDIR(status.st_mode) and not os.path.islink(path)
            if not is_folder and not stat.S_ISREG(status.st_mode):
                raise CheckpointError(
                    f'{checkpoint}: damaged: {one_line(path)} is neither a file nor a directory'
                )
            total += 0 if is_folder else status.st_size
            stored += getattr(status, 'st_blocks', status.st_size // 512 + 1) * 512
            count += 1
        if count > MAX_FILES:
            raise CheckpointError(f'{checkpoint}: damaged: more than {MAX_FILES:,} files')
    # TensorStore ends the process where it cannot allocate what it reads.
    if total > ALWAYS_ALLOWED_BYTES + MAX_EXPANSION * stored:
        raise CheckpointError(
            f'{checkpoint}: damaged: its files claim {total:,} bytes, and {stored:,} are stored'
        )
    return total


def _objects(folder: Any) -> Iterator[Any]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _objects(path)
        else:
            yield path


def check_size(metadata: Any, file_bytes: int, checkpoint: Path) -> None:
    """Refuses arrays that the files cannot hold: a few bytes can describe terabytes of zeros."""
    wanted = sum(
        math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(metadata)
    )
    if wanted > ALWAYS_ALLOWED_BYTES + MAX_EXPANSION * file_bytes:
        raise CheckpointError(
            f'{checkpoint}: damaged: its arrays would take {wanted:,} bytes and its files have '
            f'{file_bytes:,}'
        )


def check_weights(variables: Mapping[str, Any], place: object = None) -> None:
    """Refuses weights with which a network would answer nonsense without a sign of it.

    A NaN need not reach the logits: on a CPU, XLA's ReLU turns it into 0.

    Args:
      variables: {'params', 'batch_stats'}.
      place: Where they were read, named in errors; None leaves that to the caller.

    Raises:
      CheckpointError: A value is NaN or infinite, or a variance is negative; names the first leaf.
    """
    wrong = []
    for name, leaf in _leaves(variables):
        with np.errstate(over='ignore'):  # Of float64 values that are infinite in float32.
            values = np.asarray(leaf).astype(np.float32, copy=False)
        bad = int(np.count_nonzero(~np.isfinite(values)))
        if bad:
            wrong.append(f'{one_line(name)} has {bad:,} values that are NaN or infinite')
        elif name.startswith('batch_stats/') and name.endswith('/var') and (values < 0).any():
            wrong.append(f'{one_line(name)} has negative variances')
    if wrong:
        raise CheckpointError(
            f'{"" if place is None else f"{place}: "}{len(wrong)} of its arrays cannot be used, '
            f'the first: {wrong[0]}; its training went wrong or the file was changed: choose '
            'another checkpoint'
        )


def check_dtype(params: Mapping[str, Any], dtype: Any) -> None:
    """Refuses weights that are infinite in the type in which a network computes.

    That is kernels, and the biases beside them. Norms and the classifier compute in float32.

    Args:
      params: The network's, as they will be used: with its norms folded in, if they are.
      dtype: The type of the computation.

    Raises:
      CheckpointError: Names the first such leaf and the type.
    """
    dtype = jnp.dtype(dtype)
    largest = float(jnp.finfo(dtype).max)
    if largest >= np.finfo(np.float32).max:
        return
    with_kernels = {name.rpartition('/')[0] for name, _ in _leaves(params) if _is_kernel(name)}
    for name, leaf in _leaves(params):
        if name.rpartition('/')[0] not in with_kernels - {'classifier'}:
            continue
        values = np.asarray(leaf)
        with np.errstate(over='ignore'):
            cast = values[np.abs(values) > largest].astype(dtype)
        bad = int(np.count_nonzero(~np.isfinite(cast)))
        if bad:
            raise CheckpointError(
                f'params/{one_line(name)} has {bad:,} values that are infinite in {dtype.name}, '
                f'whose largest is {largest:.6g}: choose dtype float32'
            )


def _is_kernel(name: str) -> bool:
    return name.rpartition('/')[2] == 'kernel'


def _leaves(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields every leaf with its path, such as 'params/stem_conv/kernel'."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(dict(tree)):
        yield jax.tree_util.keystr(path, simple=True, separator='/'), leaf
