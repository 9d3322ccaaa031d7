"""Errors that a user can act on: one line that names the thing, its value, and what to do."""

import collections
import difflib
import importlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any


class UserError(Exception):
    """Base of the errors that the command line prints as one line, without a traceback."""


class ConfigError(UserError, ValueError):
    """A setting, an option or an argument that cannot work."""


class DataError(UserError, ValueError):
    """A data set, a split or a record that cannot be read."""


class UnlabelledError(DataError):
    """A record whose label stands for no class, as in the test splits of competitions."""


class CheckpointError(UserError, ValueError):
    """A checkpoint or a working directory that cannot be used."""


def import_optional(name: str, needed_for: str, advice: str) -> Any:
    """Imports a library that only some functions need.

    Args:
      name: Of the module.
      needed_for: What cannot be done without it, for the error.
      advice: How to install it, for the error.

    Raises:
      ConfigError: It cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f'{needed_for} needs {name}, which cannot be imported ({error}); {advice}'
        ) from error


def one_line(text: object, limit: int = 200) -> str:
    """Returns text fit for one line of any output, whatever a file or a name contains.

    Control characters, line breaks and bytes that are no text are escaped, so that a terminal
    shows them and does not obey them. Longer text keeps its beginning and its end.

    Args:
      text: A path, a label, a tensor's name, another library's message, ...
      limit: Number of characters at most.
    """
    escaped = ''.join(
        letter if letter.isprintable() else letter.encode('unicode_escape').decode()
        for letter in str(text)[: 2 * limit] + str(text)[2 * limit :][-limit:]
    )
    if len(escaped) <= limit:
        return escaped
    tail = limit // 3
    return f'{escaped[: limit - tail - 3]}...{escaped[-tail:]}'


def unknown_name(kind: str, name: object, known: Iterable[str]) -> str:
    """Returns the message for a name that does not exist, with the nearest names that do.

    Args:
      kind: What was looked up, such as 'model' or 'option of resnet50'.
      name: The name that was given.
      known: Every name that exists.
    """
    names = sorted(known)
    shown = one_line(name)
    nearest = difflib.get_close_matches(shown, names, n=3, cutoff=0.5)
    if nearest:
        return f'unknown {kind} {shown!r}; did you mean {" or ".join(map(repr, nearest))}?'
    return f'unknown {kind} {shown!r}; known: {", ".join(names) or "none"}'


def changed_names(before: Sequence[str], now: Sequence[str]) -> str:
    """Returns how one set of names differs from another: "without 'tench', with 'fish'".

    Empty where they differ at most in their order.
    """
    lost = collections.Counter(before) - collections.Counter(now)
    new = collections.Counter(now) - collections.Counter(before)
    parts = []
    for word, names in (('without', sorted(lost)), ('with', sorted(new))):
        if names:
            more = f' and {len(names) - 3} more' if names[3:] else ''
            shown = ', '.join(repr(one_line(name, 60)) for name in names[:3])
            parts.append(f'{word} {shown}{more}')
    return ', '.join(parts)


def print_error(program: str, error: BaseException) -> None:
    """Prints an error on stderr as one line, whatever names of strangers it contains."""
    print(f'{program}: {one_line(" ".join(str(error).split()), 2000)}', file=sys.stderr, flush=True)


def make_output_safe() -> None:
    """Lets stdout and stderr escape what their encoding lacks, instead of ending the program.

    A terminal that is not UTF-8, and names of files that are not, would otherwise raise.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):  # Not where a notebook or a test has replaced them.
            stream.reconfigure(errors='backslashreplace')
