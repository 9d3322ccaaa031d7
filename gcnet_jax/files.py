"""Reading files that may come from strangers, and writing files completely or not at all.

Every file that the package did not just write itself is read through this module: regular files
only, never more bytes than the caller allows. A FIFO or a device in a file's place would otherwise
block for ever, and a sparse file of terabytes would fill the memory.
"""

import contextlib
import importlib.util
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gcnet_jax.errors import ConfigError, UserError, one_line

# Largest JSON file that is read: ample for a thousand label names of any length.
MAX_JSON_BYTES = 10_000_000
# Two letters or more: 'C:/' is a drive. pathlib makes 'gs:/' of 'gs://'.
_URL = re.compile(r'([A-Za-z][A-Za-z0-9+.-]+):/')


def as_path(place: str | os.PathLike, what: str = 'path') -> Path:
    """Returns the path of a local file or directory, with a leading `~` expanded.

    Args:
      place: The path as the user wrote it.
      what: The flag or setting, named in errors.

    Raises:
      ConfigError: It is a URL, or the home directory is unknown.
    """
    text = os.fsdecode(place)
    if _scheme(text):
        raise ConfigError(f'{what} {one_line(text)} is a URL; name a local path')
    try:
        return Path(text).expanduser()
    except RuntimeError as problem:
        raise ConfigError(
            f'{what} {one_line(text)}: the home directory is unknown; write the path in full'
        ) from problem


def as_place(place: str | os.PathLike, what: str = 'path') -> Any:
    """Returns the absolute path of a run or a checkpoint, locally or in a bucket.

    Args:
      place: A local path, or `gs://BUCKET/PATH`.
      what: The flag or setting, named in errors.

    Returns:
      A `pathlib.Path`, or for a bucket an `etils.epath.Path`, which has the same methods except
      that `absolute()` must not be called.

    Raises:
      ConfigError: Another kind of URL, no bucket, or buckets cannot be read in this environment.
    """
    text = os.fsdecode(place)
    scheme = _scheme(text)
    if scheme is None:
        return as_path(text, what).absolute()
    if scheme != 'gs':
        raise ConfigError(
            f'{what} {one_line(text)}: {scheme}:// is not supported; name a local path, or a '
            'bucket of Google Cloud Storage as gs://BUCKET/PATH'
        )
    inside = text[len('gs:') :].strip('/')
    if not inside:
        raise ConfigError(f'{what} {one_line(text)} names no bucket; write gs://BUCKET/PATH')
    # Orbax asks google.cloud.storage about the bucket; etils.epath takes either of the others.
    if not (
        _can_import('google.cloud.storage') and (_can_import('gcsfs') or _can_import('tensorflow'))
    ):
        raise ConfigError(
            f'{what} {one_line(text)}: buckets are read through gcsfs, which is not installed; '
            'pip install gcsfs, or name a local path'
        )
    from etils import epath

    return epath.Path(f'gs://{inside}')


def is_bucket(place: object) -> bool:
    """Returns whether `as_place` takes a path to be in a bucket."""
    return _scheme(str(place)) == 'gs'


def _can_import(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # Raised by a parent package.
        return False


@contextlib.contextmanager
def explain_bucket(place: object, error: type[UserError], what: str = '') -> Iterator[None]:
    """Turns what a bucket's client library raises into one line; does nothing for local paths.

    Raises:
      UserError: One of the type `error`: no credentials, no such bucket, no permission, no network.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as problem:  # Each library has its own kinds.
        if not is_bucket(place):
            raise
        raise error(
            f'{what} {one_line(place)} cannot be used: '.lstrip()
            + f'{type(problem).__name__}: {reason(problem)}'
        ) from problem


def _scheme(text: str) -> str | None:
    found = _URL.match(text)
    return found[1].lower() if found else None


def read_bytes(path: str | os.PathLike, max_bytes: int, error: type[UserError]) -> bytes:
    """Reads a regular file of at most `max_bytes`.

    Raises:
      UserError: One of the type `error`, in one line that names the file and the reason.
    """
    if is_bucket(path):
        return _read_object(path, max_bytes, error)
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


def _read_object(path: Any, max_bytes: int, error: type[UserError]) -> bytes:
    """Reads a file in a bucket, where there is nothing but regular files."""
    with explain_bucket(path, error):
        size = path.stat().length
        if size > max_bytes:
            raise error(f'{one_line(path)} has {size:,} bytes; at most {max_bytes:,} are read')
        return path.read_bytes()


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
    return parse_json(read_text(path, max_bytes, error), path, error)


def parse_json(text: str, path: str | os.PathLike, error: type[UserError]) -> Any:
    """Parses the text of a JSON file; `path` is for errors."""
    try:
        return json.loads(text)
    except RecursionError as problem:
        raise error(f'{one_line(path)} is damaged JSON: it is nested too deeply') from problem
    except ValueError as problem:
        raise error(f'{one_line(path)} is damaged JSON: {reason(problem)}') from problem


@contextlib.contextmanager
def write_whole(path: str | os.PathLike, error: type[UserError]) -> Iterator[Path]:
    """Gives a path beside `path` to write to, which takes the place of `path` at the end.

    An exception inside leaves what was at `path` intact and removes what was written.

    Raises:
      UserError: One of the type `error`, in one line, where the system does not let the file be
        written. The reason of a removal that also fails is not reported.
    """
    path = path if is_bucket(path) else Path(path)
    # Not to be guessed: in a directory that others can write to, a link could wait under the name.
    partial = path.with_name(f'.{path.name[:100]}.{secrets.token_hex(4)}.partial')
    try:
        yield partial
        partial.replace(path)
    except OSError as problem:
        raise error(f'cannot write {one_line(path)}: {reason(problem)}') from problem
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def make_directory(place: str | os.PathLike, what: str, error: type[UserError] = UserError) -> Path:
    """Makes a directory if need be, and returns its path.

    Args:
      place: The directory.
      what: The flag that named it, for errors.
      error: What to raise if it cannot be made.
    """
    path = as_path(place, what)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        message = f'cannot make the directory {one_line(path)}: {reason(problem)}'
        raise error(message) from problem
    return path


def unique_name(name: str, taken: set[str]) -> str:
    """Returns a name that is not among those taken, and takes it: 'a', then 'a_2', 'a_3', ..."""
    found, number = name, 2
    while found in taken:
        found, number = f'{name}_{number}', number + 1
    taken.add(found)
    return found


def reason(problem: BaseException) -> str:
    """Returns why something failed, in a few words on one line."""
    text = getattr(problem, 'strerror', None) or str(problem) or type(problem).__name__
    return one_line(text.strip().splitlines()[0] if text.strip() else type(problem).__name__, 200)
