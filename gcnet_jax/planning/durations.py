"""How long compiling took, remembered between calls: compiling for a TPU takes minutes."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from gcnet_jax.compilation_cache import user_directory
from gcnet_jax.errors import UserError
from gcnet_jax.files import as_path, read_json, write_whole

FILE = 'plan_seconds.json'
MAX_ENTRIES = 200


def durations_file() -> Path:
    """Returns the file in the user's cache directory.

    Raises:
      UserError: The user has no home directory.
    """
    return as_path(user_directory().parent) / FILE


def announcer(
    say: Callable[[str], None],
) -> Callable[[str], contextlib.AbstractContextManager[None]]:
    """Returns what announces a compilation, and how long it took last time, and measures it.

    The result is called with what is compiled, in words, and is entered while that is done. Times
    are a convenience: a file of them that is missing, damaged or cannot be written changes nothing.

    Args:
      say: Called with each line.
    """

    @contextlib.contextmanager
    def announce(what: str) -> Iterator[None]:
        last = _read().get(what)
        known = 'this takes minutes' if last is None else f'{last:.0f} s last time'
        say(f'compiling {what} ({known})')
        began = time.perf_counter()
        yield
        _remember(what, time.perf_counter() - began)

    return announce


def _read() -> dict[str, float]:
    try:
        found = read_json(durations_file(), UserError)
    except UserError:
        return {}
    if not isinstance(found, dict):
        return {}
    return {
        what: seconds
        for what, seconds in found.items()
        if type(seconds) in (int, float) and 0 <= seconds < 1e6 and math.isfinite(seconds)
    }


def _remember(what: str, seconds: float) -> None:
    times = _read()
    times.pop(what, None)  # The newest comes last.
    times[what] = round(seconds, 1)
    with contextlib.suppress(UserError, OSError):
        file = durations_file()
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with write_whole(file, UserError) as partial:
            partial.write_text(json.dumps(dict(list(times.items())[-MAX_ENTRIES:])))
