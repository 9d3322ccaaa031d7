"""The working directory of a run: what it may hold, and the config that is written there first."""

import contextlib
import json
import shutil
from pathlib import Path

import jax

from gcnet_jax.compilation_cache import compilation_cache, user_directory
from gcnet_jax.errors import CheckpointError, ConfigError
from gcnet_jax.files import is_bucket, reason, write_whole
from gcnet_jax.stored_model import ModelDescription, read_item, step_directories
from gcnet_jax.training.config import changed_keys

CONFIG_FILE = 'config.json'
COMPILATION_CACHE = 'compilation_cache'


def check_workdir(workdir: Path, config: dict, description: ModelDescription) -> None:
    """Refuses a directory that holds something else than an earlier part of this very run.

    Raises:
      CheckpointError: It is no directory, or holds another config or another network's checkpoints.
    """
    if workdir.exists() and not workdir.is_dir():
        raise CheckpointError(f'--workdir {workdir} is a file; name a directory')
    newest = list(step_directories(workdir).values())[-1:]
    for checkpoint in newest:
        with contextlib.suppress(CheckpointError):  # A damaged one is the restore's business.
            there = ModelDescription.from_json(read_item(checkpoint, 'description'), checkpoint)
            if there.name != description.name:
                raise ConfigError(
                    f'--workdir {workdir} holds checkpoints of {there.name}, and config.model.name '
                    f'is {description.name}; choose another --workdir'
                )
    path = workdir / CONFIG_FILE
    if not path.exists():
        if newest:
            raise CheckpointError(
                f'--workdir {workdir} holds checkpoints but no {CONFIG_FILE}; choose another '
                '--workdir, and name this one in config.training.init_from to start from it'
            )
        return
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f'{path} cannot be read: {error}; choose another --workdir'
        ) from error
    changed = changed_keys(before, config)
    if changed:
        keys = ', '.join(f'config.{key}' for key in changed[:5]) + (', ...' if changed[5:] else '')
        raise CheckpointError(
            f'--workdir {workdir} holds a run with another config ({keys}); choose another '
            '--workdir, or give the same settings to continue that run'
        )


def prepare_workdir(
    workdir: Path, config: dict, description: ModelDescription, checkpoint_bytes: int
) -> None:
    """Checks a working directory and writes the config there, all before anything is compiled.

    Args:
      workdir: Made if it does not exist.
      config: The plain config.
      description: Of the network.
      checkpoint_bytes: Size of one checkpoint.

    Raises:
      CheckpointError: As `check_workdir`; or it cannot be written, or has no space for one
        checkpoint.
    """
    check_workdir(workdir, config, description)
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

    What is there is run again by the next start, and by nothing else: a directory that one
    continues a run in is one's own, while a checkpoint that is only read may come from anybody.
    """
    # A bucket may be other people's too, and what is in there is run.
    default = user_directory() if is_bucket(workdir) else workdir / COMPILATION_CACHE
    return compilation_cache(default, setting)
