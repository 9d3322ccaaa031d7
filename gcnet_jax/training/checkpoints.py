"""Checkpoints of a run: what is in one, when one is good, and what a working directory may hold.

One checkpoint is one directory `checkpoints/STEP` with Orbax items: `variables`, `description` and
`checksums`, which `gcnet_jax.stored_model` reads without the rest; `training`, what else the next
step needs; `position`, where the run stands (JSON); `metrics`, the evaluation there, if there was
one. Orbax writes them together or not at all.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import checkpoint_managers

from gcnet_jax.errors import CheckpointError, ConfigError
from gcnet_jax.stored_model import (
    CHECKPOINTS,
    ModelDescription,
    check_checksums,
    checksums,
    first_error_only,
    load_variables,
    read_item,
    read_model_description,
    step_directories,
    write_ported,
)
from gcnet_jax.training.config import changed_keys
from gcnet_jax.training.state import TrainState

__all__ = [
    'CheckpointStore',
    'ModelDescription',
    'load_variables',
    'merge_initial',
    'prepare_workdir',
    'read_model_description',
    'write_ported',
]

CONFIG_FILE = 'config.json'


def _split(state: TrainState) -> dict[str, Any]:
    """The state as the two items of a checkpoint: what evaluation uses, and the rest."""
    training = {'step': state.step, 'key': state.key, 'opt_state': state.opt_state}
    if state.ema is not None:
        training['trained'] = {'params': state.params, 'batch_stats': state.batch_stats}
    return {'variables': state.evaluation_variables(), 'training': training}


def _join(items: Mapping[str, Any]) -> TrainState:
    variables, training = items['variables'], items['training']
    trained = training.get('trained', variables)
    return TrainState(
        step=training['step'],
        key=training['key'],
        params=trained['params'],
        batch_stats=trained['batch_stats'],
        opt_state=training['opt_state'],
        ema=variables if 'trained' in training else None,
    )


class CheckpointStore:
    """Writes and reads a run's checkpoints; saving goes on in the background.

    Args:
      workdir: The run's directory.
      description: Of the network, stored in every checkpoint.
      keep: Number of newest checkpoints that are kept, beside the best by eval/accuracy.
    """

    def __init__(self, workdir: Path, description: ModelDescription, keep: int) -> None:
        self._root = workdir.absolute() / CHECKPOINTS
        self._description = description.to_json()
        policies = checkpoint_managers

        def accuracy(metrics):
            return metrics.get('eval/accuracy', -1.0)

        self._manager = ocp.CheckpointManager(
            self._root,
            options=ocp.CheckpointManagerOptions(
                best_fn=accuracy,
                preservation_policy=policies.AnyPreservationPolicy(
                    [
                        policies.LatestN(keep),
                        policies.BestN(
                            get_metric_fn=accuracy, n=1, keep_checkpoints_without_metrics=False
                        ),
                    ]
                ),
                cleanup_tmp_directories=True,
            ),
        )

    @property
    def newest(self) -> int | None:
        """The step of the newest checkpoint that is whole on disk or being written."""
        return self._manager.latest_step()

    def last_good(self) -> str:
        """Names the newest checkpoint in words."""
        found = step_directories(self._root)
        if not found:
            return 'there is no checkpoint yet'
        return f'the last good checkpoint is {found[max(found)]}'

    def save(self, state: TrainState, position: dict, metrics: Mapping[str, float]) -> None:
        """Starts to save a state that is known to be good.

        Raises:
          CheckpointError: No space is left; the checkpoints before are whole.
        """
        items = _split(state)
        with self.explain_errors():
            self._manager.save(
                position['step'],
                args=ocp.args.Composite(
                    variables=ocp.args.StandardSave(items['variables']),
                    training=ocp.args.StandardSave(items['training']),
                    position=ocp.args.JsonSave(position),
                    description=ocp.args.JsonSave(self._description),
                    checksums=ocp.args.JsonSave(
                        {name: checksums(item) for name, item in items.items()}
                    ),
                ),
                metrics=dict(metrics),
            )

    def restore(self, target: TrainState, say: Any = print) -> tuple[TrainState, dict] | None:
        """Reads the newest checkpoint that is whole; damaged ones are said and set aside.

        Args:
          target: The state's shapes, types and shardings.
          say: Called with a line about each damaged checkpoint.

        Returns:
          The state and its position, or None if there is no checkpoint.

        Raises:
          CheckpointError: There are checkpoints, but none is whole, or they are another network's.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        damaged = {}
        for step in steps:
            try:
                restored = self._restore(step, target)
            except Exception as error:  # Damage makes Orbax and TensorStore raise many kinds.
                reason = ' '.join(str(error).split())[:200] or type(error).__name__
                place = self._root / str(step)
                say(f'checkpoint {place} is damaged, trying the one before: {reason}')
                damaged[step] = reason
                continue
            self._set_aside(damaged)
            return restored
        if damaged:
            raise CheckpointError(
                f'{self._root}: none of the checkpoints {", ".join(map(str, steps))} can be read '
                f'({damaged[steps[0]]}); choose another --workdir to start again'
            )
        return None

    def _restore(self, step: int, target: TrainState) -> tuple[TrainState, dict]:
        place = self._root / str(step)
        items = _split(target)
        with first_error_only():
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    variables=ocp.args.StandardRestore(items['variables']),
                    training=ocp.args.StandardRestore(items['training']),
                ),
            )
        expected = read_item(place, 'checksums')
        for name in items:
            check_checksums(restored[name], expected[name], place)
        return _join(restored), read_item(place, 'position')

    def _set_aside(self, steps: Mapping[int, str]) -> None:
        """Renames damaged checkpoints, so that their steps can be saved again."""
        if not steps:
            return
        if jax.process_index() == 0:
            for step in steps:
                target = self._root.parent / f'damaged-checkpoint-{step}'
                shutil.rmtree(target, ignore_errors=True)
                os.replace(self._root / str(step), target)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices('damaged checkpoints set aside')
        self._manager.reload()

    def wait(self) -> None:
        """Waits until what is being saved is on disk.

        Raises:
          CheckpointError: No space is left; the checkpoints before are whole.
        """
        with self.explain_errors():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Finishes what is being saved."""
        with self.explain_errors():
            self._manager.close()

    @contextlib.contextmanager
    def explain_errors(self) -> Iterator[None]:
        """Turns 'no space left' of any kind into one clear line."""
        try:
            yield
        except Exception as error:
            if no_space_left(error):
                raise CheckpointError(
                    f'no space left on the device of {self._root.parent}; {self.last_good()}: '
                    'make room and run the same command again'
                ) from error
            raise


def no_space_left(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is a full disk or an exhausted quota."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if 'No space left' in str(error) or 'Disk quota exceeded' in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


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
        free = shutil.disk_usage(workdir).free
        if free < checkpoint_bytes:
            raise CheckpointError(
                f'no space left for a checkpoint in --workdir {workdir}: it takes '
                f'{checkpoint_bytes / 2**20:,.0f} MiB, free are {free / 2**20:,.0f} MiB; make room'
            )
        temporary = workdir / f'{CONFIG_FILE}.tmp'
        temporary.write_text(json.dumps(config, indent=2) + '\n')
        os.replace(temporary, workdir / CONFIG_FILE)
    except OSError as error:
        raise CheckpointError(
            f'--workdir {workdir} cannot be written: {error.strerror or error}; choose another one'
        ) from error


def merge_initial(
    fresh: Mapping[str, Any], loaded: Mapping[str, Any], *, new_classifier: bool, place: str
) -> tuple[dict, list[str], list[str]]:
    """Fills a network's variables from a checkpoint of the same or of the plain network.

    Args:
      fresh: The network's own {'params', 'batch_stats'}: arrays, or shapes.
      loaded: The checkpoint's.
      new_classifier: Leave the classifier as it is in `fresh` where its size differs.
      place: The checkpoint, named in errors.

    Returns:
      The variables; the parameters of context blocks that the checkpoint does not have; and the
      classifier's parameters that were left out. Both stay as they are in `fresh`.

    Raises:
      CheckpointError: Anything else is missing, left over, or of another shape; lists both sides.
    """
    ours, theirs = flatten_dict(dict(fresh), sep='/'), flatten_dict(dict(loaded), sep='/')
    missing = sorted(ours.keys() - theirs.keys())
    extra = sorted(theirs.keys() - ours.keys())
    common = sorted(ours.keys() & theirs.keys())
    differ = [key for key in common if ours[key].shape != theirs[key].shape]
    context = [key for key in missing if any(part.startswith('context') for part in key.split('/'))]
    classifier = [key for key in differ if 'classifier' in key.split('/')]
    if classifier and not new_classifier:
        raise CheckpointError(
            f'{place}: its classifier has {theirs[classifier[0]].shape[-1]} classes, the network '
            f'{ours[classifier[0]].shape[-1]}; set config.training.new_classifier=True to start '
            'it anew'
        )
    lost = sorted(set(missing) - set(context))
    wrong = [
        f'{key} {theirs[key].shape} for {ours[key].shape}'
        for key in differ
        if key not in classifier
    ]
    if lost or extra or wrong:
        parts = {'missing': lost, 'not in the network': extra, 'of another shape': wrong}
        raise CheckpointError(
            f'{place} is of another network: '
            + '; '.join(
                f'{len(keys)} {what}, first {keys[0]}' for what, keys in parts.items() if keys
            )
        )
    keep = {*context, *classifier}
    merged = {key: value if key in keep else theirs[key] for key, value in ours.items()}
    filled = unflatten_dict(merged, sep='/')
    variables = {'params': filled['params'], 'batch_stats': filled.get('batch_stats', {})}
    return variables, context, classifier
