"""Compiled programs kept in a directory, so that the next start does not compile them again.

This is JAX's persistent compilation cache with a place, a bound and some housekeeping. What is in
it is machine code that JAX runs: a directory that others can write to is one through which they
can run programs. So the place is never inside a checkpoint that somebody may have handed on.
"""

import contextlib
import errno
import hashlib
import os
import platform
import zlib
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from gcnet_jax.errors import ConfigError, one_line
from gcnet_jax.files import as_path
from gcnet_jax.private_directories import is_own_file, who_else_can_write

OFF = 'off'
# Far above what one run needs: the digits' programs take 1 MB, a ResNet-50's step some MB.
MAX_BYTES = 2**30
# Largest size of a program before compression; those of the largest networks have some tens of MB.
MAX_PROGRAM_BYTES = 2**29
_CHECKED = '.checked'
_CHECKING = '.checking'
_ZSTANDARD = b'\x28\xb5\x2f\xfd'


def user_directory() -> Path:
    """Returns where commands keep what they compile: `gcnet_jax/compiled` in the user's cache.

    A '~' is left to whoever uses it: not every user has a home, which must not end a command.
    """
    caches = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
    return Path(caches) / 'gcnet_jax' / 'compiled'


@contextlib.contextmanager
def compilation_cache(default: Path, setting: str | None = None) -> Iterator[None]:
    """Keeps what is compiled meanwhile, and takes from there what an earlier process compiled.

    JAX's own settings win: with JAX_ENABLE_COMPILATION_CACHE=false nothing is kept, and a
    JAX_COMPILATION_CACHE_DIR is kept unless `setting` says otherwise. They are as before
    afterwards. Among several processes only the first one writes.

    Args:
      default: The directory if nobody asked for another one; without a cache if it cannot be used,
        or if others can write to it.
      setting: 'off', a directory, or None.

    Raises:
      ConfigError: `setting` is a directory that cannot be used.
    """
    enabled, given = jax.config.jax_enable_compilation_cache, jax.config.jax_compilation_cache_dir
    if not enabled or (given and setting is None):
        yield
        return
    place = None if setting == OFF else _prepare(Path(setting or default), setting is not None)
    settings = {
        'jax_compilation_cache_dir': None if place is None else str(place),
        # Everything: a start compiles few programs, and the small ones add up.
        'jax_persistent_cache_min_compile_time_secs': 0.0,
        'jax_persistent_cache_min_entry_size_bytes': -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        _apply(settings)
        yield
    finally:
        _apply(before)


def _apply(settings: dict) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    reset_cache()  # It looks at the settings once, when the first program is compiled.


def _prepare(directory: Path, asked_for: bool) -> Path | None:
    """Makes the part of a directory that is for this kind of machine, and tidies it up."""
    if asked_for and ':/' in str(directory):
        as_path(directory, 'config.runtime.compilation_cache')  # Refuses URLs.
    machine = _machine()
    try:
        place = directory.expanduser().absolute() / machine
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(place, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, 'it belongs to somebody else')
        if reason := who_else_can_write(place):
            raise PermissionError(errno.EACCES, f'its programs would be run, and {reason}')
        if jax.process_index() == 0:
            tidy(place)
        if strangers := [entry for entry in place.glob('*-cache') if not _is_own(entry)]:
            raise PermissionError(errno.EACCES, f'{one_line(strangers[0])} is not your own file')
    except (OSError, RuntimeError) as error:  # A RuntimeError: a '~' of somebody without a home.
        if asked_for:
            raise ConfigError(
                f'config.runtime.compilation_cache {directory} cannot be used: '
                f'{getattr(error, "strerror", None) or error}; name another directory, or {OFF!r}'
            ) from error
        return None
    return place


def _is_own(entry: Path) -> bool:
    try:
        return is_own_file(entry)
    except FileNotFoundError:  # Another process has removed it.
        return True


def _machine() -> str:
    """Names the kind of machine that programs are compiled for.

    JAX tells accelerators apart, not processors: a program compiled for one that knows more
    instructions would end the process on another. And programs are split for so many cores.
    """
    backend = jax.default_backend()
    if backend != 'cpu':
        return backend
    features = f'{platform.machine()} {platform.processor()} {os.cpu_count()}'
    if hasattr(os, 'sched_getaffinity'):
        features += f' {len(os.sched_getaffinity(0))}'
    with contextlib.suppress(OSError):  # On Linux.
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        names = ('vendor_id', 'cpu family', 'model', 'stepping', 'flags', 'Features')
        features += ' '.join(sorted({line for line in lines if line.split('\t')[0] in names}))
    return f'cpu-{hashlib.sha256(features.encode()).hexdigest()[:12]}'


def tidy(place: Path, max_bytes: int = MAX_BYTES) -> None:
    """Removes entries that are damaged or somebody else's, and the oldest ones beyond a bound.

    JAX warns of an entry that a kill or a full disk cut short, compiles, and never writes it again.
    (Its own bound needs a file beside each entry and fails for good once a kill has left one out.)
    """
    checked = place / _CHECKED
    since = checked.stat().st_mtime if checked.exists() else 0.0
    # Dated before the entries are looked at: what is written meanwhile is for the next time.
    checking = place / _CHECKING
    with contextlib.suppress(OSError):
        checking.touch()
    entries = []
    # Another process may remove them at the same time.
    for entry in place.glob('*-cache'):
        with contextlib.suppress(OSError):
            status = entry.lstat()
            if not is_own_file(entry) or (status.st_mtime >= since and _is_damaged(entry)):
                entry.unlink()
            else:
                entries.append((status.st_mtime, status.st_size, entry))
    total = sum(size for _, size, _ in entries)
    for _, size, entry in sorted(entries):
        if total <= max_bytes:
            break
        total -= size
        with contextlib.suppress(OSError):
            entry.unlink()
    with contextlib.suppress(OSError):
        os.replace(checking, checked)


def _is_damaged(entry: Path) -> bool:
    """Whether JAX could not read it, or it would take more than `MAX_PROGRAM_BYTES`."""
    with entry.open('rb') as file:
        start = file.read(len(_ZSTANDARD))
        if start == _ZSTANDARD:  # Where that package is installed; left to JAX.
            return False
        file.seek(0)
        decompressor, size = zlib.decompressobj(), 0
        try:
            while chunk := decompressor.unconsumed_tail or file.read(2**20):
                size += len(decompressor.decompress(chunk, 2**20))
                if size > MAX_PROGRAM_BYTES:
                    return True
        except zlib.error:
            return True
    return not decompressor.eof
