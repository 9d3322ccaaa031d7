"""The loop: save, take a batch, dispatch the step, look at the step before.

The order makes a run resumable exactly: a checkpoint at step N holds everything that step N + 1
needs, and the position in the data is the step itself. A step's metrics are fetched after the next
step was dispatched, so the devices never wait for the host; a state is saved only after the metrics
of the step that made it were seen to be finite.
"""

import collections
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from gcnet_jax.errors import UserError, one_line
from gcnet_jax.files import as_place
from gcnet_jax.training.checkpoints import CheckpointStore
from gcnet_jax.training.checks import check_config
from gcnet_jax.training.config import is_due, plain
from gcnet_jax.training.experiment import Experiment, build, check_batches, state_bytes
from gcnet_jax.training.lock import WorkdirLock, hold_workdir
from gcnet_jax.training.mesh import batch_shardings, to_global
from gcnet_jax.training.metrics import (
    Clock,
    MetricsWriter,
    Progress,
    Window,
    read_metrics,
)
from gcnet_jax.training.processes import (
    Interrupted,
    Preemption,
    connect,
    explain_lost_process,
    from_first_process,
    sum_over_processes,
)
from gcnet_jax.training.start import Initial, find_start, read_initial
from gcnet_jax.training.state import TrainState
from gcnet_jax.training.statistics import (
    jit_statistics_step,
    make_statistics_step,
    refresh_statistics,
)
from gcnet_jax.training.steps import (
    jit_evaluation_step,
    jit_train_step,
    make_evaluation_step,
    make_train_step,
)
from gcnet_jax.training.workdir import keep_compiled, prepare_workdir


class TrainingError(UserError):
    """A run that cannot go on."""


def train(config: ConfigDict, workdir: str | Path) -> dict[str, float]:
    """Trains a network, or continues where an earlier call with this config and workdir stopped.

    Args:
      config: Every setting, see `gcnet_jax.training.config`.
      workdir: Directory of the run: config.json, metrics.jsonl, TensorBoard events and checkpoints;
        a local path, or gs://BUCKET/PATH. One run at a time holds it.

    Returns:
      The last values of everything in metrics.jsonl, and 'seconds', the time this call took. Of
      several processes only the first reads metrics.jsonl.

    Raises:
      UserError: A setting, a data set, a checkpoint or a directory that cannot be used, or a loss
        that is not finite; one line that says what to do. Earlier checkpoints stay intact.
      Preempted: SIGTERM or Ctrl-C (`Interrupted`) came; the state was saved.
    """
    began = time.perf_counter()
    check_config(config)  # What is wrong with it should not wait for the other processes.
    workdir = as_place(workdir, '--workdir')
    connect(config)
    experiment = build(config, workdir=workdir)
    check_batches(experiment)
    initial = read_initial(experiment, workdir)
    with (
        explain_lost_process(),
        hold_workdir(workdir) as lock,
        keep_compiled(workdir, config.runtime.compilation_cache),
        Preemption() as preemption,
    ):
        prepare_workdir(
            workdir,
            plain(experiment.config),
            experiment.description,
            state_bytes(experiment),
            extend=experiment.durations.extend,
            total_steps=experiment.durations.total,
        )
        run = _Run(experiment, workdir, initial, preemption, lock)
        with contextlib.closing(run):
            finished = run.to_the_end()
    final = {'step': run.step, 'seconds': time.perf_counter() - began}
    if jax.process_index() != 0:
        return final
    for line in read_metrics(workdir):
        final.update(line)
    metric, best = f'eval/{experiment.task.best}', ''
    values = f'{metric} {run.shown(final[metric])}'
    if 'eval/loss' in final:
        values += f', eval/loss {final["eval/loss"]:.4f}'
    if run.best is not None and run.best['step'] != run.step:
        best = f' (best {run.shown(run.best["value"])} at step {run.best["step"]})'
    how = f'trained in {final["seconds"]:.0f} s' if finished else 'was complete already'
    run.progress.say(f'{values} after step {run.step}{best}; {how}; see {workdir}')
    return final


class _Run:
    """One call of `train`: the state, its step, and where results are reported."""

    def __init__(
        self,
        experiment: Experiment,
        workdir: Path,
        initial: Initial | None,
        preemption: Preemption,
        lock: WorkdirLock | None = None,
    ) -> None:
        self.experiment = experiment
        self.lock = lock
        self.preemption = preemption
        self.config, self.durations = experiment.config, experiment.durations
        self.task = experiment.task
        self.mesh = experiment.mesh
        self.progress = Progress('none', 0, 0, self.task)
        self.writer = self.batches = None
        first = jax.process_index() == 0
        progress = self.config.runtime.progress
        say = _print if first and progress != 'none' else _silent
        keep = self.config.training.keep_checkpoints
        self.store = CheckpointStore(workdir, experiment.description, self.task.best, keep, say)
        # The processes agree on a later step than any was asked about: none before this one.
        preemption.stops_at(self.store.newest or 0)
        with contextlib.ExitStack() as stack:
            stack.callback(self.close)
            start = find_start(experiment, self.store, initial, say)
            self.state, self.step = start.state, start.step
            self.window, self.bad_in_a_row = start.window, start.bad_in_a_row
            self.best, self.pending = start.best, None
            if first:
                self.writer = MetricsWriter(workdir, self.step, self.config.runtime.tensorboard)
                self.progress = Progress(progress, self.step, self.durations.total, self.task)
            self._compile(start.shardings)
            stack.pop_all()
        self.clock = Clock()

    def close(self) -> None:
        """Finishes the save that is under way and closes all files."""
        if self.batches is not None:
            self.batches.close()
        self.progress.close()
        if self.writer is not None:
            self.writer.close()
        self.store.close()

    def _compile(self, shardings: TrainState) -> None:
        experiment = self.experiment
        model, task, options = experiment.model, experiment.task, experiment.step_options
        train_step = make_train_step(model, experiment.optimizer, task, options, self.mesh)
        self.train_step = jit_train_step(train_step, task, self.mesh, shardings)
        evaluation_step = make_evaluation_step(model, task, self.mesh)
        self.evaluation_step = jit_evaluation_step(evaluation_step, task, self.mesh, shardings)
        statistics_step = make_statistics_step(model, task, options, self.mesh)
        self.statistics_step = jit_statistics_step(statistics_step, task, self.mesh, shardings)

    def to_the_end(self) -> bool:
        """Runs the remaining steps; returns whether there were any."""
        if self._is_done():
            return False
        with self.store.explain_errors():
            self._stop_if_preempted()
            self.progress.compiling()
            self.batches = self.experiment.train_batches(start_step=self.step)
            for batch, skipped in self._prefetched(self.batches):
                self.state, metrics = self.train_step(self.state, batch)
                self.step += 1
                self.preemption.begin()
                previous, self.pending = self.pending, (self.step, metrics, skipped)
                self._look_at(previous)
                self._evaluate_and_save()
                if self._is_done():
                    break
                self._stop_if_preempted()
            self.store.wait()
        return True

    def _is_done(self) -> bool:
        """Whether the last step was taken, or evaluation has not improved for too long."""
        if self.step >= self.durations.total:
            return True
        patience = self.durations.early_stopping
        if patience is None or self.best is None:
            return False
        evaluated = is_due(self.step, self.durations.evaluation)
        if not evaluated or self.step - self.best['step'] < patience:
            return False
        self.progress.say(
            f'stopped early after step {self.step} of {self.durations.total}: '
            f'eval/{self.task.best} has not exceeded {self.shown(self.best["value"])} since step '
            f'{self.best["step"]}'
        )
        return True

    def _prefetched(self, batches: Any) -> Iterator[tuple[dict, int]]:
        """Yields batches, sent to the devices ahead of time, and the images skipped for each."""
        shardings = batch_shardings(self.mesh, self.task.batch_spec())
        queue, counted, failure = collections.deque(), 0, None
        while True:
            while len(queue) < self.config.runtime.prefetch_batches and failure is None:
                try:
                    with self.clock.waiting():
                        batch = next(batches)
                    batch = to_global(batch, shardings)
                except Exception as error:  # What was read before is still used.
                    failure = error
                    break
                queue.append((batch, batches.skipped - counted))
                counted = batches.skipped
            if not queue:
                self._stop_if_preempted()  # The signal may have ended the readers first.
                raise failure
            yield queue.popleft()

    def _look_at(self, done: tuple[int, dict, int] | None) -> None:
        """Fetches the metrics of a step that is done, checks them, and logs when it is time."""
        if done is None:
            return
        step, metrics, skipped = done
        metrics = jax.device_get(metrics)
        self.window.add(metrics, skipped)
        self.bad_in_a_row = 0 if metrics['finite'] else self.bad_in_a_row + 1
        if self.bad_in_a_row >= self.config.training.max_bad_steps:
            loss = metrics['loss'] / max(metrics['weight'], 1.0)
            self._stop_at(step, f'loss {loss:g}, gradient norm {metrics["gradient_norm"]:g}')
        self.clock.step_done()
        self.clock.start()  # The first step was compiled until now.
        self.progress.advance()
        if step % self.config.training.log_steps == 0 or step == self.durations.total:
            waited = self.clock.waited_fraction()
            rate = self.clock.rate()
            self._add_up_skipped()
            values = self.window.means(self.task)
            values['train/learning_rate'] = float(self.experiment.schedule(step - 1))
            values['train/images_per_second'] = rate * self.experiment.batch_size
            values['train/data_wait_fraction'] = waited
            self._write(step, values, rate)
            self.window = Window()

    def _stop_at(self, step: int, what: str) -> None:
        self.store.wait()
        raise TrainingError(
            f'step {step} is not finite ({what}); {self.store.last_good()}. Lower '
            'config.schedule.peak_learning_rate or set config.optimizer.clip_norm, with another '
            '--workdir'
        )

    def _write(self, step: int, values: dict[str, float], rate: float = 0.0) -> None:
        epoch = step / self.durations.epoch
        if self.writer is not None:
            self.writer.write(step, epoch, values)
        self.progress.report(step, epoch, values, rate)

    def _evaluate_and_save(self) -> None:
        """Does what is due at this step, after its metrics were looked at."""
        at_end = self.step == self.durations.total
        evaluate = at_end or is_due(self.step, self.durations.evaluation)
        if not evaluate and not is_due(self.step, self.durations.checkpoint):
            return
        self._look_at_pending()
        self.clock.stop()
        self.state = refresh_statistics(
            self.state, self.step, self.experiment, self.statistics_step
        )
        values = {}
        if evaluate:
            values = self._evaluate()
            self._write(self.step, values)
            value = values[f'eval/{self.task.best}']
            if self.best is None or value > self.best['value']:
                self.best = {'step': self.step, 'value': value}
        self._save(values)
        self.clock.start()

    def _look_at_pending(self) -> None:
        """Makes sure that the state is of steps that were seen to be good."""
        pending, self.pending = self.pending, None
        self._look_at(pending)

    def _save(self, metrics: dict[str, float]) -> None:
        self._add_up_skipped()
        if self.lock is not None:
            self.lock.check()
        if self.writer is not None:
            self.writer.flush()  # What a checkpoint counts as logged must be on disk before it.
        position = {
            'step': self.step,
            'seed': self.experiment.seed,
            'global_batch_size': self.experiment.batch_size,
            'examples': len(self.experiment.train_source),
            'window': dict(self.window.sums),
            'bad_in_a_row': self.bad_in_a_row,
            'best': self.best,
        }
        self.store.save(self.state, position, metrics)

    def _stop_if_preempted(self) -> None:
        """Saves and ends the run, in all processes at the same step, if one was signalled to."""
        if not self.preemption.stops_at(self.step):
            return
        self._look_at_pending()
        if self.store.newest != self.step:
            self._save({})
        self.store.wait()
        stop = self.preemption.stop
        raise stop(
            f'{"Ctrl-C" if stop is Interrupted else "SIGTERM"}: stopped after step {self.step} of '
            f'{self.durations.total}, which is saved; the same command continues from there'
        )

    def _add_up_skipped(self) -> None:
        """Makes the count of damaged images that of all processes, held by the first one."""
        if self.experiment.skip_damaged:
            total = sum_over_processes(self.window.sums['skipped'])
            self.window.sums['skipped'] = total if jax.process_index() == 0 else 0.0

    def _evaluate(self) -> dict[str, float]:
        """Returns the task's metrics over the evaluation split, every example once."""
        began = time.perf_counter()
        shardings = batch_shardings(self.mesh, self.task.evaluation_spec())
        variables = self.state.evaluation_variables()
        evaluation, pending = self.task.evaluation(self.experiment.evaluation_source), None
        with contextlib.closing(self.experiment.evaluation_batches()) as batches:
            for batch in batches:
                previous = pending
                pending = self.evaluation_step(variables, to_global(batch, shardings))
                if previous is not None:
                    evaluation.add(jax.device_get(previous))
        evaluation.add(jax.device_get(pending))
        # The hosts may compute them differently in the last bit, and what follows must be the same.
        metrics = from_first_process(evaluation.metrics())
        wrong = [
            f'eval/{name} {value:g}' for name, value in metrics.items() if not np.isfinite(value)
        ]
        if wrong:
            self._stop_at(self.step, f'{", ".join(wrong)} over {metrics["examples"]:g} images')
        values = {f'eval/{name}': value for name, value in metrics.items()}
        return values | {'eval/seconds': time.perf_counter() - began}

    def shown(self, value: float) -> str:
        """Returns a value of the metric that decides which checkpoint is the best, as text."""
        return f'{value:.2%}' if self.task.best in self.task.percentages else f'{value:.4g}'


def _print(text: str) -> None:
    print(one_line(text, 2000))  # Names of data sets and files may come from strangers.


def _silent(text: str) -> None:
    """Takes the place of print in every process but the first."""
