"""Directories that nobody else can write to, for programs that are run without being checked."""

import os
import stat
from pathlib import Path

from gcnet_jax.errors import UserError, one_line


def who_else_can_write(path: str | os.PathLike) -> str:
    """Returns why a directory or a file is not the user's alone; '' where it is.

    Looks at the path itself and at every directory above it, up to the root, with links and what
    they lead to: each must belong to the user or to root, and let nobody else write. In a
    directory with the sticky bit, such as /tmp, others cannot rename what is not theirs.
    """
    if not hasattr(os, 'geteuid'):  # On Windows, where modes say nothing.
        return ''
    path = Path(path).absolute()
    for place in dict.fromkeys((path, *path.parents, path.resolve(), *path.resolve().parents)):
        status = place.lstat()
        if status.st_uid not in (os.geteuid(), 0):
            return f'{one_line(place)} belongs to another user'
        if stat.S_ISLNK(status.st_mode):
            continue  # Its mode means nothing; where it leads to is looked at as well.
        is_shared_safely = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
        if _others_write(status) and not (is_shared_safely and place != path):
            return f'others can write to {one_line(place)}'
    return ''


def is_own_file(path: str | os.PathLike) -> bool:
    """Whether this is a regular file, no link, that belongs to the user and nobody else changes."""
    status = os.lstat(path)
    is_own = not hasattr(os, 'geteuid') or status.st_uid == os.geteuid()
    return stat.S_ISREG(status.st_mode) and is_own and not _others_write(status)


def private_directory(path: str | os.PathLike) -> Path:
    """Makes a directory, or takes the one that is there, if it is the user's alone.

    Raises:
      UserError: Somebody else can write to it or to a directory above it, or it cannot be made.
    """
    path = Path(path)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        reason = who_else_can_write(path)
    except OSError as error:
        raise UserError(f'cannot use {one_line(path)}: {error.strerror or error}') from error
    if reason:
        raise UserError(
            f'{one_line(path)} is not used, because programs are run from it and {reason}; '
            'remove it or change its owner and mode'
        )
    return path


def _others_write(status: os.stat_result) -> bool:
    # By convention a user's private group has the user's own number.
    is_private_group = status.st_gid == os.getegid() == os.geteuid()
    return bool(status.st_mode & (0o002 if is_private_group else 0o022))
