"""Checkpoints of a run: what is in one, and when one is good.

One checkpoint is one directory `checkpoints/STEP` with Orbax items: `variables`, `description` and
`checksums`, which `gcnet_jax.stored` reads without the rest; `training`, what else the next step
needs; `position`, how far the run has come (JSON); `metrics`, the evaluation at this step, if there
was one. Orbax writes them together or not at all.
"""

import contextlib
import errno
import logging
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from gcnet_jax.errors import CheckpointError, one_line
from gcnet_jax.files import as_place, explain_bucket, is_bucket
from gcnet_jax.stored.checks import check_files
from gcnet_jax.stored.checksums import check_checksums, check_json, checksums, json_checksum
from gcnet_jax.stored.description import ModelDescription
from gcnet_jax.stored.places import CHECKPOINTS, METRICS, read_item, step_directories
from gcnet_jax.stored.variables import first_error_only
from gcnet_jax.training.processes import any_process, wait_for_all
from gcnet_jax.training.state import TrainState


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

    With several processes each writes and reads its own part, and all of them must call each
    method.

    Args:
      workdir: The run's directory.
      description: Description of the network, stored in every checkpoint.
      best: The metric of an evaluation whose highest value marks the best checkpoint.
      keep: Number of newest checkpoints that are kept, beside the best.
      say: Called with a line about each damaged checkpoint.
    """

    def __init__(
        self,
        workdir: Path,
        description: ModelDescription,
        best: str,
        keep: int,
        say: Callable[[str], None] = print,
    ) -> None:
        self._root = as_place(workdir) / CHECKPOINTS
        self._description = description.to_json()
        self._say = say
        self._set_aside_unreadable()
        policies = checkpoint_managers

        def score(metrics):
            return metrics.get(f'eval/{best}', -math.inf)

        self._manager = ocp.CheckpointManager(
            self._root,
            options=ocp.CheckpointManagerOptions(
                best_fn=score,
                preservation_policy=policies.AnyPreservationPolicy(
                    [
                        policies.LatestN(keep),
                        policies.BestN(
                            get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False
                        ),
                    ]
                ),
                cleanup_tmp_directories=True,
            ),
        )
        # Orbax logs what fails in the background with a traceback, and then raises it here.
        self._filter = _WithoutExplained(is_bucket(self._root))
        logging.getLogger('absl').addFilter(self._filter)
        # The threads that save start when they like: for as long as this store is open.
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(first_error_only())

    @property
    def newest(self) -> int | None:
        """The step of the newest checkpoint that is complete on disk or being written."""
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
          CheckpointError: No space is left; earlier checkpoints are intact.
        """
        items = _split(state)
        metrics = dict(metrics)
        with self.explain_errors(), explain_bucket(self._root, CheckpointError):
            sums = {name: checksums(item) for name, item in items.items()}
            items_of_json = {
                'position': position,
                METRICS: metrics,
                'description': self._description,
            }
            sums |= {name: json_checksum(value) for name, value in items_of_json.items()}
            self._manager.save(
                position['step'],
                args=ocp.args.Composite(
                    variables=ocp.args.StandardSave(items['variables']),
                    training=ocp.args.StandardSave(items['training']),
                    position=ocp.args.JsonSave(position),
                    description=ocp.args.JsonSave(self._description),
                    checksums=ocp.args.JsonSave(sums),
                ),
                metrics=metrics,
            )

    def restore(self, target: TrainState) -> tuple[TrainState, dict] | None:
        """Restores the newest intact checkpoint; damaged ones are reported and moved aside.

        Args:
          target: The state's shapes, types and shardings.

        Returns:
          The state and its position, or None if there is no checkpoint.

        Raises:
          CheckpointError: There are checkpoints, but none is intact, or they are another network's.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        damaged = {}
        for step in steps:
            try:
                restored = self._restore(step, target)
            except CheckpointError as error:
                damaged[step] = str(error)
                self._say_damaged(step, damaged[step])
                continue
            if damaged:
                self._set_aside(damaged)
                wait_for_all('damaged checkpoints set aside')
                self._manager.reload()
            return restored
        if damaged:
            raise CheckpointError(
                f'{self._root}: none of the checkpoints {", ".join(map(str, steps))} can be read '
                f'({damaged[steps[0]]}); choose another --workdir to start again'
            )
        return None

    def _restore(self, step: int, target: TrainState) -> tuple[TrainState, dict]:
        """Reads one checkpoint; what is damaged for one process is damaged for all of them."""
        place = self._root / str(step)
        problem = None
        try:
            restored, sums, position = self._read(step, target)
        except Exception as error:  # Damage makes Orbax and TensorStore raise many kinds.
            problem = error
        if any_process(problem is not None):
            reason = ' '.join(str(problem or 'another process cannot read its part').split())
            raise CheckpointError(reason[:200] or type(problem).__name__) from problem
        for name in restored:
            check_checksums(restored[name], sums.get(name), place)
        return _join(restored), position

    def _read(self, step: int, target: TrainState) -> tuple[dict, dict, dict]:
        """Reads this process's part of one checkpoint: the items, all checksums, the position."""
        place = self._root / str(step)
        check_files(place)
        items = _split(target)
        with first_error_only():
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    variables=ocp.args.StandardRestore(items['variables']),
                    training=ocp.args.StandardRestore(items['training']),
                ),
            )
        sums, position = read_item(place, 'checksums'), read_item(place, 'position')
        check_json(position, sums.get('position'), 'position', place)
        _check_position(position, step, place)
        check_json(read_item(place, METRICS), sums.get(METRICS), METRICS, place)
        return {name: restored[name] for name in items}, sums, position

    def _say_damaged(self, step: int, reason: str) -> None:
        place = self._root / str(step)
        self._say(f'checkpoint {place} is damaged, trying the one before: {reason}')

    def _set_aside_unreadable(self) -> None:
        """Sets aside what Orbax's manager stops at: it reads the metrics of all checkpoints."""
        if jax.process_index() == 0:
            for step, place in step_directories(self._root).items():
                try:
                    if (place / METRICS / METRICS).exists():
                        read_item(place, METRICS)
                except CheckpointError as error:
                    self._say_damaged(step, str(error))
                    self._set_aside([step])
        wait_for_all('unreadable checkpoints set aside')

    def _set_aside(self, steps: Iterable[int]) -> None:
        """Renames damaged checkpoints, so that their steps can be saved again."""
        if jax.process_index() != 0:
            return
        for step in steps:
            target = self._root.parent / f'damaged-checkpoint-{step}'
            if is_bucket(target):
                target.rmtree(missing_ok=True)
            else:
                shutil.rmtree(target, ignore_errors=True)
            (self._root / str(step)).rename(target)

    def wait(self) -> None:
        """Waits until what is being saved is on disk.

        Raises:
          CheckpointError: No space is left; earlier checkpoints are intact.
        """
        with self.explain_errors(), explain_bucket(self._root, CheckpointError):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Finishes what is being saved."""
        try:
            with self.explain_errors(), explain_bucket(self._root, CheckpointError):
                self._manager.close()
        finally:
            self._quiet.close()
            logging.getLogger('absl').removeFilter(self._filter)

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


def _check_position(position: Mapping[str, Any], step: int, place: Path) -> None:
    """Refuses a position that the loop could not go on from: counts, and groups of numbers."""

    def is_right(value: Any) -> bool:
        if isinstance(value, dict):
            return all(isinstance(item, (int, float)) for item in value.values())
        return value is None or (type(value) is int and value >= 0)

    if position.get('step') != step or not all(map(is_right, position.values())):
        raise CheckpointError(f'{place}: damaged: its position is {one_line(position, 120)}')


class _WithoutExplained(logging.Filter):
    """Drops the log records of errors that `CheckpointStore.explain_errors` reports in one line."""

    def __init__(self, in_bucket: bool) -> None:
        super().__init__()
        self._in_bucket = in_bucket

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return error is None or not (self._in_bucket or no_space_left(error))


def no_space_left(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is a full disk or an exhausted quota."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if 'No space left' in str(error) or 'Disk quota exceeded' in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
