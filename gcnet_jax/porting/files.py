"""Reads PyTorch checkpoint files as numpy arrays: `.safetensors`, and `.pth` without torch.

A file is recognised by its first bytes, not by its name. Nothing in it is ever executed: pickles
are read by a machine that knows no class and calls no function (`pickles.py`). Tensors are read
one by one when they are asked for. Files may come from strangers: the limits of what is read stand
as constants at the top of the modules that this one imports.
"""

import dataclasses
import datetime
import hashlib
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gcnet_jax.errors import CheckpointError, one_line, unknown_name
from gcnet_jax.files import reason
from gcnet_jax.porting.safetensors_files import read_safetensors
from gcnet_jax.porting.tensors import LazyTensor, LazyTensors
from gcnet_jax.porting.torch_files import read_torch
from gcnet_jax.porting.wrappers import WEIGHTS, take_prefixes_off

# Limit of a file, with an optimizer's state and an average: a ResNet-152 with both takes 1 GB.
MAX_FILE_BYTES = 8 * 2**30

__all__ = ['LazyTensor', 'LazyTensors', 'TorchFile', 'read_checkpoint']


@dataclasses.dataclass(frozen=True)
class TorchFile:
    """A checkpoint that was opened.

    Attributes:
      path: The file.
      tensors: Every tensor by the name that its network gave it, read when asked for.
      wrapper: The key under which the tensors lay, such as 'state_dict_ema'; '' without one.
      prefix: What was taken off the front of every name, such as 'module.'.
      metadata: What else the file says in plain text and numbers: 'arch', 'epoch', 'meta', ...
        Lists and dictionaries are nested as they are in the file; the fields of an
        `argparse.Namespace` are a dictionary. Anything else is left out.
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
      CheckpointError: No such file, not a regular file, a file that is damaged, not a checkpoint or
        that holds objects of classes, a hash in its name that is not its own, `weights` that it
        does not hold, or tensors that are not dense floating-point numbers or integers.
    """
    if weights not in WEIGHTS:
        raise CheckpointError(unknown_name('choice of weights', weights, WEIGHTS))
    path = Path(path).expanduser()
    shown = one_line(path)
    start = _first_bytes(path)
    if not start:
        raise CheckpointError(f'{shown} is empty; the download was cut off: fetch it again')
    is_safetensors = start[8:9] == b'{'
    if not (is_safetensors or start[:4] == b'PK\x03\x04' or start[:1] == b'\x80'):
        raise CheckpointError(
            f'{shown} is neither a safetensors nor a PyTorch file: it starts with {start[:8]!r}'
        )
    if is_safetensors and weights == 'ema':
        raise CheckpointError(
            f"{shown} holds one set of weights; weights='ema' needs a training checkpoint (.pth)"
        )
    _check_hash_in_name(path)
    if is_safetensors:
        entries, metadata = read_safetensors(path)
        wrapper = ''
    else:
        entries, wrapper, metadata = read_torch(path, weights)
    if not entries:
        raise CheckpointError(f'{shown} holds no tensors')
    tensors, prefix = take_prefixes_off(path, LazyTensors(entries), weights)
    return TorchFile(path, tensors, wrapper, prefix, metadata)


def _first_bytes(path: Path) -> bytes:
    try:
        # Without O_NONBLOCK a FIFO would wait until somebody writes to it.
        number = os.open(path, os.O_RDONLY | getattr(os, 'O_NONBLOCK', 0))
        with open(number, 'rb', closefd=True) as file:
            status = os.fstat(number)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f'{one_line(path)} is not a regular file')
            if status.st_size > MAX_FILE_BYTES:
                raise CheckpointError(
                    f'{one_line(path)} has {status.st_size:,} bytes; '
                    f'at most {MAX_FILE_BYTES:,} are read'
                )
            return file.read(16)
    except FileNotFoundError:
        raise CheckpointError(f'no such checkpoint: {one_line(path)}') from None
    except IsADirectoryError:
        raise CheckpointError(
            f'{one_line(path)} is a directory; give the checkpoint file in it, such as '
            'model.safetensors'
        ) from None
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:  # A ValueError: a name with a NUL byte.
        raise CheckpointError(f'cannot read {one_line(path)}: {reason(error)}') from None


def _check_hash_in_name(path: Path) -> None:
    """Compares the hash that torchvision and mmdetection put into a published file's name."""
    found = re.search(r'-([0-9a-f]{8})\.(pth|pt)$', path.name)
    if not found or _is_date(found[1]):
        return
    with path.open('rb') as file:
        digest = hashlib.file_digest(file, 'sha256').hexdigest()
    if not digest.startswith(found[1]):
        raise CheckpointError(
            f'{one_line(path)} is damaged or was changed: its SHA-256 begins with {digest[:8]}, '
            f'and its name says {found[1]}. Fetch it again, or rename it if that was on purpose'
        )


def _is_date(digits: str) -> bool:
    for form in ('%Y%m%d', '%d%m%Y', '%m%d%Y'):
        try:
            year = datetime.datetime.strptime(digits, form).year
        except ValueError:
            continue
        if 1990 <= year < 2100:
            return True
    return False
