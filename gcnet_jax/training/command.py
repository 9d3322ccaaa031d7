"""The command line of train.py: flags, one line for each error, and an exit code.

Exit codes: 0 finished; 1 an error that one line explains; 75 stopped by SIGTERM and saved, so that
the same command continues; 130 interrupted (Ctrl-C), saved as well once a step is done.
"""

import re
import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict

from gcnet_jax.errors import ConfigError, UserError, one_line, unknown_name
from gcnet_jax.files import as_path, as_place, is_bucket
from gcnet_jax.training.overrides import explain_unknown_key, override

FAILED = 1
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, try again.
INTERRUPTED = 130
USAGE = """python train.py [--config FILE[:VARIANT]] [--workdir DIR] [--config.GROUP.KEY=VALUE ...]
The default is configs/digits.py into runs/digits. The same command again continues a run.
Exit codes: 0 finished, 1 failed, 75 stopped by SIGTERM and saved (run it again), 130 by Ctrl-C.
Every setting with its default: gcnet_jax/training/config.py."""


def run(arguments: Sequence[str], default_config_file: Path) -> int:
    """Runs `train.py` with its command-line arguments.

    Args:
      arguments: Of the process, the program's name first.
      default_config_file: The config where `--config` is not given.

    Returns:
      The exit code.
    """
    try:
        config, name, workdir = read_flags(arguments, default_config_file)
    except UserError as error:
        return _fail(error)
    workdir = workdir or Path('runs') / name
    # After the flags are read: a wrong flag should not wait for the imports.
    from gcnet_jax.training.loop import train
    from gcnet_jax.training.processes import Interrupted, Preempted, leave

    try:
        train(config, workdir)
        return 0
    except Preempted as stop:
        if jax.process_index() == 0:
            _fail(stop)
        return INTERRUPTED if isinstance(stop, Interrupted) else PREEMPTED
    except UserError as error:
        code = _fail(error)
    except KeyboardInterrupt:
        print(f'interrupted; the same command {_where(workdir)}', file=sys.stderr)
        code = INTERRUPTED
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        code = FAILED
    return leave(code)


def _where(workdir: Path) -> str:
    from gcnet_jax.stored_model import step_directories

    steps = step_directories(workdir)
    return f'continues from step {max(steps)}' if steps else 'starts again, nothing was saved yet'


def _fail(error: UserError) -> int:
    print(f'train.py: {" ".join(str(error).split())}', file=sys.stderr)
    return FAILED


def read_flags(
    arguments: Sequence[str], default_config_file: Path
) -> tuple[ConfigDict, str, Path | None]:
    """Reads `--config FILE[:VARIANT]`, `--config.GROUP.KEY=VALUE` and `--workdir DIR`.

    Returns:
      The config, a name for the run made of the config's file and variant, and the workdir if
      given.

    Raises:
      ConfigError: A flag, a config file or a setting that does not exist, or a value that cannot be
        read.
    """
    values = flags.FlagValues()
    flags.DEFINE_string('config', str(default_config_file), 'FILE[:VARIANT]', values)
    flags.DEFINE_string('workdir', None, 'Directory of the run.', values)
    flags.DEFINE_boolean('help', False, 'Shows how to use the command.', values)
    overrides = [text for text in arguments if re.match(r'--?(no)?config\.', text)]
    try:
        rest = values([text for text in arguments if text not in overrides])[1:]
    except flags.Error as error:
        raise ConfigError(str(error)) from error
    if rest:
        raise ConfigError(f'unknown argument {rest[0]!r}; settings are given as --config.KEY=VALUE')
    if values.help:
        print(USAGE)
        raise SystemExit(0)
    file, _, variant = values.config.partition(':')
    config = override(load_config(file, variant), overrides)
    name = Path(file).stem + (f'_{variant}' if variant else '')
    return config, name, _workdir(values.workdir)


def _workdir(text: str | None) -> Path | None:
    if not text:
        return None
    place = as_place(text, '--workdir')
    return place if is_bucket(place) else as_path(text, '--workdir')


def load_config(file: str, variant: str = '') -> ConfigDict:
    """Calls `get_config` of a config file, with the variant if there is one.

    Raises:
      ConfigError: There is no such file, or it cannot be used.
    """
    path = as_path(file, '--config')
    if not path.is_file():
        near = sorted(map(str, path.parent.glob('*.py'))) if path.parent.is_dir() else []
        raise ConfigError(unknown_name('config file (--config)', file, near))
    try:
        get_config = runpy.run_path(str(path))['get_config']
        return get_config(variant) if variant else get_config()
    except UserError:
        raise
    except SyntaxError as error:
        raise ConfigError(
            f'--config {file}: line {error.lineno} is no valid Python: {error.msg}: '
            f'{one_line((error.text or "").strip(), 80)}'
        ) from error
    except Exception as error:  # Whatever is wrong in the user's file.
        unknown = (
            explain_unknown_key(error) if isinstance(error, (AttributeError, KeyError)) else None
        )
        if unknown:
            raise ConfigError(f'--config {file}{_line_of(error, path)}: {unknown}') from None
        raise ConfigError(
            f'--config {file}: get_config({variant!r}) failed{_line_of(error, path)}: '
            f'{type(error).__name__}: {one_line(error, 300)}'
        ) from error


def _line_of(error: Exception, path: Path) -> str:
    """Returns ', line N' for the last line of a config file that an error passed through."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == str(path)
    ]
    return f', line {lines[-1]}' if lines else ''
