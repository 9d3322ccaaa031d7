"""Configs from the command line: `--config FILE[:VARIANT]`, and settings on top of it."""

import re
import runpy
import traceback
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from gcnet_jax.errors import ConfigError, UserError, one_line, unknown_name
from gcnet_jax.files import as_path, as_place, is_bucket
from gcnet_jax.training.config import all_paths, explain_unread
from gcnet_jax.training.overrides import override

USAGE = """python train.py [--config FILE[:VARIANT]] [--workdir DIR] [--config.GROUP.KEY=VALUE ...]
The default is configs/digits.py into runs/digits. The same command again continues a run.
Exit codes: 0 finished, 1 failed, 75 stopped by SIGTERM and saved (run it again), 130 by Ctrl-C.
Every setting with its default: gcnet_jax/training/config.py."""


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
    arguments = ['--help' if text == '-h' else text for text in arguments]
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
    name = Path(file).stem + (f'_{variant}' if variant else '')
    workdir = _workdir(values.workdir)
    place = as_place(workdir or default_workdir(name), '--workdir')
    return override(load_config(file, variant), overrides, place), name, workdir


def default_workdir(name: str) -> Path:
    """Returns the directory of a run that is given none; for `name` see `read_flags`."""
    return Path('runs') / name


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
    path = _find_config(as_path(file, '--config'))
    try:
        get_config = runpy.run_path(str(path)).get('get_config')
        if get_config is None:
            raise ConfigError(
                f'--config {file}: it defines no get_config(), which returns a config'
            )
        config = get_config(variant) if variant else get_config()
    except UserError:
        raise
    except SyntaxError as error:
        raise ConfigError(f'--config {file}: {_explain_syntax(error, path)}') from error
    except (Exception, SystemExit) as error:  # Whatever is wrong in the user's file.
        call = f'get_config({variant!r})' if variant else 'get_config()'
        place = _line_of(error, path)
        raise ConfigError(f'--config {file}: {call} failed{place}: {_explain(error)}') from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f'--config {file}: get_config() returned {type(config).__name__}; it must return a '
            'ConfigDict, such as gcnet_jax.training.config.default_config() with changes'
        )
    return config


def _explain_syntax(error: SyntaxError, path: Path) -> str:
    name = Path(error.filename or path).name
    line = f', line {error.lineno} of {name}' if error.lineno else f' ({name})'
    text = (error.text or '').strip()
    return f'{error.msg}{line}: {text}' if text else f'{error.msg}{line}'


def _line_of(error: BaseException, path: Path) -> str:
    """Returns where in the config file an error came from: ', line N of NAME'; '' if unknown."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    return f', line {lines[-1]} of {path.name}' if lines else ''


def _explain(error: BaseException) -> str:
    """Returns an error in a config file in words; ConfigDict's own errors list the whole config."""
    text = ' '.join(map(str, error.args)) or type(error).__name__
    unknown = re.search(r'Key "(.+?)" does not exist|instead of "(.+?)"', text)
    if unknown:
        return _nearest_setting(unknown[1] or unknown[2])
    return one_line(f'{type(error).__name__}: {text}', 300)


def _nearest_setting(key: str) -> str:
    """Returns the message for a key that no group has, with the settings that it may stand for."""
    paths = all_paths()
    groups = {path.partition('.')[0] for path in paths}
    names = {path.rpartition('.')[2]: path for path in (*paths, *groups)}
    same = [path for path in paths if path.rpartition('.')[2] == key]
    unread = [text for text in map(explain_unread, same) if text]
    if unread and len(same) == 1:
        return unread[0]
    if same:
        shown = ' or '.join(f"'config.{path}'" for path in same)
        return f'unknown setting {key!r} in this group; did you mean {shown}?'
    text = unknown_name('setting', key, names)
    return re.sub(r"(?<=[ ])'(\w+)'(?=[ ?])", lambda m: f"'config.{names.get(m[1], m[1])}'", text)


def shipped_configs() -> Path:
    """Returns the directory of the configs that come with the package."""
    package = Path(__file__).parents[1]
    installed = package / 'configs'
    return installed if installed.is_dir() else package.parent / 'configs'


def _find_config(path: Path) -> Path:
    """Returns the file itself, or the config of that name that comes with the package."""
    if path.is_file():
        return path
    shipped = shipped_configs()
    if path.parent in (Path(), Path('configs')) and (shipped / f'{path.stem}.py').is_file():
        return shipped / f'{path.stem}.py'
    near = sorted(map(str, path.parent.glob('*.py'))) if path.parent.is_dir() else []
    names = {found.stem for found in shipped.glob('*.py')} - {'__init__'}
    raise ConfigError(unknown_name('config file (--config)', path, {*near, *names}))
