"""Reading files that may come from strangers, and writing files whole or not at all.

Every file that the package did not just write itself is read through this module: regular files
only, never more bytes than the caller allows. A FIFO or a device in a file's place would otherwise
block for ever, and a sparse file of terabytes would fill the memory.
"""

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gcnet_jax.errors import UserError, one_line

# Largest JSON file that is read: ample for a thousand label names of any length.
MAX_JSON_BYTES = 10_000_000


def read_bytes(path: str | os.PathLike, max_bytes: int, error: type[UserError]) -> bytes:
    """Reads a regular file of at most `max_bytes`.

    Raises:
      UserError: Of the type `error`, in one line that names the file and the reason.
    """
    try:
        with open(path, 'rb', opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise error(f'{one_line(path)} is not a regular file')
            if status.st_size > max_bytes:
                raise error(
                    f'{one_line(path)} has {status.st_size:,} bytes; at most {max_bytes:,} are read'
                )
            return file.read(max_bytes)
    except UserError:
        raise
    except (OSError, ValueError) as problem:  # A ValueError: a name with a NUL byte.
        raise error(f'cannot read {one_line(path)}: {reason(problem)}') from problem


def _open_at_once(path: str, flags: int) -> int:
    """Opens a file; without O_NONBLOCK a FIFO would wait until somebody writes to it."""
    return os.open(path, flags | getattr(os, 'O_NONBLOCK', 0))


def read_text(path: str | os.PathLike, max_bytes: int, error: type[UserError]) -> str:
    """Reads a regular file of UTF-8 text; see `read_bytes`. A byte order mark is dropped."""
    try:
        return read_bytes(path, max_bytes, error).decode('utf-8-sig')
    except UnicodeDecodeError as problem:
        raise error(
            f'{one_line(path)} is not UTF-8 text: byte {problem.start} is '
            f'0x{problem.object[problem.start]:02x}; save it as UTF-8'
        ) from problem


def read_json(
    path: str | os.PathLike, error: type[UserError], max_bytes: int = MAX_JSON_BYTES
) -> Any:
    """Reads a JSON file; see `read_bytes`. What is in it is for the caller to check."""
    try:
        return json.loads(read_text(path, max_bytes, error))
    except RecursionError as problem:
        raise error(f'{one_line(path)} is damaged JSON: it is nested too deeply') from problem
    except ValueError as problem:
        if isinstance(problem, UserError):
            raise
        raise error(f'{one_line(path)} is damaged JSON: {reason(problem)}') from problem


@contextlib.contextmanager
def write_whole(path: str | os.PathLike, error: type[UserError]) -> Iterator[Path]:
    """Gives a path beside `path` to write to, which takes the place of `path` at the end.

    An exception inside leaves what was at `path` intact and removes what was written.

    Raises:
      UserError: Of the type `error`, in one line, where the system does not let the file be
        written. The reason of a removal that also fails is not reported.
    """
    path = Path(path)
    partial = path.with_name(f'.{path.name}.partial')
    try:
        yield partial
        os.replace(partial, path)
    except OSError as problem:
        raise error(f'cannot write {one_line(path)}: {reason(problem)}') from problem
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def reason(problem: BaseException) -> str:
    """Returns why something failed, in a few words on one line."""
    text = getattr(problem, 'strerror', None) or str(problem) or type(problem).__name__
    return one_line(text.strip().splitlines()[0] if text.strip() else type(problem).__name__, 200)
