"""What a checkpoint's files and arrays must be before they are used, whoever wrote them."""

import math
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
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


def check_finite(variables: Mapping[str, Any], place: object) -> None:
    """Refuses weights with which a network would answer nonsense without a sign of it.

    A NaN need not reach the logits: on a CPU, XLA's ReLU turns it into 0.

    Raises:
      CheckpointError: A value is NaN or infinite, or a variance is negative; names the first leaf.
    """
    wrong = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(dict(variables)):
        values = np.asarray(leaf).astype(np.float32, copy=False)
        name = '/'.join(str(part.key) for part in path)
        bad = int(np.count_nonzero(~np.isfinite(values)))
        if bad:
            wrong.append(f'{one_line(name)} has {bad:,} values that are NaN or infinite')
        elif name.startswith('batch_stats/') and name.endswith('/var') and (values < 0).any():
            wrong.append(f'{one_line(name)} has negative variances')
    if wrong:
        raise CheckpointError(
            f'{place}: {len(wrong)} of its arrays cannot be used, the first: {wrong[0]}; its '
            'training went wrong or the file was changed: choose another checkpoint'
        )
