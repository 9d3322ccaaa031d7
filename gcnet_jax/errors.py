"""Errors that a user can act on: one line that names the thing, its value, and what to do."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Base of the errors that the command line prints as one line, without a traceback."""


class ConfigError(UserError, ValueError):
    """A setting, an option or an argument that cannot work."""


class DataError(UserError, ValueError):
    """A data set, a split or a record that cannot be read."""


class CheckpointError(UserError, ValueError):
    """A checkpoint or a working directory that cannot be used."""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> str:
    """Returns the message for a name that does not exist, with the nearest names that do.

    Args:
      kind: What was looked up, such as 'model' or 'option of resnet50'.
      name: The name that was given.
      known: Every name that exists.
    """
    names = sorted(known)
    nearest = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    if nearest:
        return f'unknown {kind} {str(name)!r}; did you mean {" or ".join(map(repr, nearest))}?'
    return f'unknown {kind} {str(name)!r}; known: {", ".join(names) or "none"}'
