"""What commands share."""

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from gcnet_jax.errors import UserError, one_line

EXIT_ERROR = 1
EXIT_SOME_IMAGES_FAILED = 3
EXIT_INTERRUPTED = 130
EXIT_PIPE_CLOSED = 141
MAX_LINE = 2000


def is_given(value: Any) -> bool:
    """Whether a flag was given; a 0 was."""
    return value is not None and value is not False


def refuse_flags(options: argparse.Namespace, command: str, names: Sequence[str]) -> None:
    """Refuses flags that were given and that a command's other flags leave without meaning.

    Raises:
      UserError: Naming the first of them.
    """
    for name in names:
        if is_given(getattr(options, name)):
            raise UserError(f'--{name.replace("_", "-")} has no meaning with {command}')


def image_size(text: str) -> int | tuple[int, int]:
    """Reads the value of a flag: '224', or height and width as '96x160'."""
    if found := re.fullmatch(r'(\d+)x(\d+)', text):
        return int(found[1]), int(found[2])
    if re.fullmatch(r'-?\d+', text):
        return int(text)
    raise argparse.ArgumentTypeError(f'a number, or HEIGHTxWIDTH such as 96x160, not {text!r}')


def print_lines(lines: Iterable[str]) -> None:
    """Prints lines that contain names from files or of files; control characters are escaped."""
    for line in lines:
        print(one_line(line, MAX_LINE))


def report_choice(checkpoint: str, choose: str) -> None:
    """Names the checkpoint on stderr, where `best` chose another one than the newest.

    Raises:
      CheckpointError: There is no checkpoint.
    """
    from gcnet_jax.stored import find_checkpoint

    chosen = find_checkpoint(checkpoint, choose)
    newest = find_checkpoint(checkpoint, 'newest')
    if chosen != newest:
        print(
            f'checkpoint of step {chosen.name}, the best by its evaluation; the newest is of step '
            f'{newest.name} (--choose newest)',
            file=sys.stderr,
            flush=True,
        )
