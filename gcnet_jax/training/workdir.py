"""The working directory of a run: what it may hold, and the config that is written there first."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import jax

from gcnet_jax.compilation_cache import compilation_cache, user_directory
from gcnet_jax.errors import CheckpointError, ConfigError, one_line
from gcnet_jax.files import is_bucket, reason, write_whole
from gcnet_jax.stored import ModelDescription, read_item, step_directories
from gcnet_jax.tasks import find_task
from gcnet_jax.training.config import EXTENDABLE, changed_keys, leaves

CONFIG_FILE = 'config.json'
COMPILATION_CACHE = 'compilation_cache'


def check_workdir(
    workdir: Path,
    config: dict,
    description: ModelDescription,
    *,
    extend: bool = False,
    total_steps: int | None = None,
) -> None:
    """Refuses a directory that holds something else than an earlier part of this very run.

    Raises:
      CheckpointError: It is no directory, or holds another config, another network's checkpoints,
        or a network that was trained with another preprocessing or, by the task's comparison, on
        other data.
    """
    if workdir.exists() and not workdir.is_dir():
        raise CheckpointError(f'--workdir {workdir} is a file; name a directory')
    there, before = read_own_description(workdir), read_own_config(workdir)
    if before is not None:
        _check_data_set(workdir, before, config)
    if there is not None:
        _check_description(workdir, there, description)
    if before is None:
        if step_directories(workdir):
            raise CheckpointError(
                f'--workdir {workdir} holds checkpoints but no {CONFIG_FILE}; choose another '
                '--workdir, and name this one in config.training.init_from to start from it'
            )
        return
    changed = changed_keys(before, config)
    longer = [key for key in changed if key in EXTENDABLE]
    if longer and (extend or changed == longer):
        _check_extension(workdir, longer[0], extend, total_steps)
        changed = [key for key in changed if key not in EXTENDABLE]
    if changed:
        keys = ', '.join(f'config.{key}' for key in changed[:5]) + (', ...' if changed[5:] else '')
        raise CheckpointError(
            f'--workdir {workdir} holds a run with another config ({keys}); choose another '
            '--workdir, or give the same settings to continue that run'
        )


def read_own_description(workdir: Path) -> ModelDescription | None:
    """Returns the description in the newest intact checkpoint of a run; None where it has none."""
    for checkpoint in reversed(step_directories(workdir).values()):
        try:
            return ModelDescription.from_json(read_item(checkpoint, 'description'), checkpoint)
        except CheckpointError:  # A damaged one is the restore's business.
            continue
    return None


def read_own_config(workdir: Path) -> dict | None:
    """Returns the config that a run began with; None where the directory holds none.

    Raises:
      CheckpointError: It cannot be read.
    """
    path = workdir / CONFIG_FILE
    if not path.exists():
        return None
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f'{path} cannot be read: {error}; choose another --workdir'
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(f'{path} is damaged: it holds no settings; choose another --workdir')
    return config


def _check_extension(workdir: Path, key: str, extend: bool, total_steps: int | None) -> None:
    """Refuses another length of a run unless it is asked for and not shorter than what is done."""
    if not extend:
        raise CheckpointError(
            f'--workdir {workdir} holds a run with another config.{key}; give '
            '--config.training.extend too, to continue it by the schedule of the new total, or '
            'choose another --workdir'
        )
    reached = max(step_directories(workdir), default=0)
    if total_steps is not None and total_steps < reached:
        raise CheckpointError(
            f'--workdir {workdir} holds a run that is already at step {reached}, and with '
            f'config.{key} it would end at step {total_steps}; raise it, or choose another '
            '--workdir'
        )


def _check_data_set(workdir: Path, before: dict, config: dict) -> None:
    """Refuses a data set of another name, before its contents are compared."""
    old, new = (dict(leaves(tree)).get('data.name') for tree in (before, config))
    if old is not None and old != new:
        raise CheckpointError(
            f'--workdir {workdir} holds a run on data set {one_line(old)!r}, and config.data.name '
            f'is {one_line(new)!r}; choose another --workdir, where '
            'config.training.init_from can name this one, or give '
            f'--config.data.name={one_line(old)} to continue that run'
        )


def _check_description(workdir: Path, there: ModelDescription, here: ModelDescription) -> None:
    """Refuses to continue a network under another name, on other data or with other images."""
    if there.name != here.name:
        raise ConfigError(
            f'--workdir {workdir} holds checkpoints of {there.name}, and config.model.name '
            f'is {here.name}; choose another --workdir'
        )
    find_task(here.task).check_continued(f'--workdir {workdir}', there, here)
    old, new = (dataclasses.asdict(side.preprocessing) for side in (there, here))
    changed = [key for key in old if old[key] != new[key]]
    if changed:
        key = changed[0]
        raise CheckpointError(
            f'--workdir {workdir} holds a run whose images have {key} {old[key]}, and now it is '
            f'{new[key]}; give the settings of config.data and the init_from that it began with, '
            'or choose another --workdir'
        )


def prepare_workdir(
    workdir: Path,
    config: dict,
    description: ModelDescription,
    checkpoint_bytes: int,
    *,
    extend: bool = False,
    total_steps: int | None = None,
) -> None:
    """Checks a working directory and writes the config there, all before anything is compiled.

    Args:
      workdir: Made if it does not exist.
      config: The plain config.
      description: Description of the network.
      checkpoint_bytes: Size of one checkpoint.
      extend: Allow another length of the run than before.
      total_steps: That length, which must not lie before the newest checkpoint.

    Raises:
      CheckpointError: As `check_workdir`; or it cannot be written, or has no space for one
        checkpoint.
    """
    check_workdir(workdir, config, description, extend=extend, total_steps=total_steps)
    if jax.process_index() != 0:
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        free = None if is_bucket(workdir) else shutil.disk_usage(workdir).free
        if free is not None and free < checkpoint_bytes:
            raise CheckpointError(
                f'no space left for a checkpoint in --workdir {workdir}: it takes '
                f'{checkpoint_bytes / 2**20:,.0f} MiB, free are {free / 2**20:,.0f} MiB; make room'
            )
    except OSError as error:
        raise CheckpointError(
            f'--workdir {workdir} cannot be written: {reason(error)}; choose another one'
        ) from error
    with write_whole(workdir / CONFIG_FILE, CheckpointError) as partial:
        partial.write_text(json.dumps(config, indent=2) + '\n')


def keep_compiled(workdir: Path, setting: str | None) -> contextlib.AbstractContextManager:
    """Keeps what is compiled meanwhile in the working directory, or where the setting says.

    Only the next start of this run executes these files: you continue a run in a directory of your
    own, whereas a checkpoint that you merely read may come from anyone.
    """
    # A bucket may be other people's too, and what is in there is run.
    default = user_directory() if is_bucket(workdir) else workdir / COMPILATION_CACHE
    return compilation_cache(default, setting)
