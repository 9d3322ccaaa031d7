"""What a run reports: metrics.jsonl, TensorBoard events, and progress on the terminal.

Only the first process writes. `metrics.jsonl` has one JSON object a line: `step`, `epoch`, and
`train/*` or `eval/*`. All values but those of `TIMING` follow from config and data alone: a run
that was killed and continued has the same lines.
"""

import collections
import contextlib
import functools
import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tqdm

from gcnet_jax.errors import CheckpointError, one_line
from gcnet_jax.files import is_bucket, write_whole
from gcnet_jax.metrics_file import METRICS_FILE, read_metrics
from gcnet_jax.tasks import Task

# Depends on the machine, so it differs from run to run.
TIMING = ('train/images_per_second', 'train/data_wait_fraction', 'eval/seconds')
# A file in a bucket is written again at most this often, and before each checkpoint.
BUCKET_SECONDS = 10.0


class Window:
    """Sums over the steps since the last line of metrics; saved, so that they survive a kill."""

    def __init__(self, sums: dict[str, float] | None = None) -> None:
        self.sums = collections.defaultdict(float, sums or {})
        if 'count' in self.sums and 'weight' not in self.sums:  # Saved by an earlier version.
            self.sums['weight'] = self.sums['count']

    def add(self, metrics: Mapping[str, Any], skipped: int) -> None:
        """Takes in the metrics of one step; of one that is not finite only that it was."""
        if metrics['finite']:
            for name in metrics.keys() - {'finite'}:
                self.sums[name] += float(metrics[name])
            self.sums['steps'] += 1
        else:
            self.sums['bad_steps'] += 1
        self.sums['skipped'] += skipped

    def means(self, task: Task) -> dict[str, float]:
        """Returns what is reported of these steps, by the names in metrics.jsonl."""
        sums, values = self.sums, {}
        if sums['count']:
            values = {f'train/{k}': v for k, v in task.training_metrics(sums).items()}
            values['train/gradient_norm'] = sums['gradient_norm'] / sums['steps']
        if sums['bad_steps']:
            values['train/bad_steps'] = sums['bad_steps']
        if sums['skipped']:
            values['train/skipped_images'] = sums['skipped']
        return values


class MetricsWriter:
    """Appends to metrics.jsonl and to TensorBoard's events.

    Args:
      workdir: The run's directory.
      step: The step that the run continues from; lines after it are dropped.
      tensorboard: Whether to write events.
    """

    def __init__(self, workdir: Path, step: int, tensorboard: bool) -> None:
        path = workdir / METRICS_FILE
        kept = [line for line in read_metrics(workdir) if line['step'] <= step]
        text = ''.join(_to_line(line) for line in kept)
        with write_whole(path, CheckpointError) as partial:
            partial.write_text(text)
        # Unbuffered: a line is one write, so a killed run leaves complete lines.
        self._file = _LinesInBucket(path, text) if is_bucket(path) else path.open('ab', buffering=0)
        self._events = None
        self._open_events = None
        if tensorboard and is_bucket(path):
            print(f'TensorBoard events are not written to a bucket; {path} has all the values')
        elif tensorboard:
            self._open_events = functools.partial(_open_events, workdir, step)

    def write(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """Writes one line; every value must be a finite number."""
        self._file.write(_to_line({'step': step, 'epoch': epoch, **values}).encode())
        # Each start makes a new file, so only when there is something to write.
        if self._events is None and self._open_events is not None:
            self._events = self._open_events()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def flush(self) -> None:
        """Makes sure that all lines can be read by others."""
        self._file.flush()

    def close(self) -> None:
        """Closes both."""
        self._file.close()
        if self._events is not None:
            self._events.close()


class _LinesInBucket:
    """Lines of a file in a bucket. Objects cannot be appended to: each write replaces all."""

    def __init__(self, path: Any, text: str) -> None:
        self._path = path
        self._content = text.encode()
        self._written = time.monotonic()
        self._changed = False

    def write(self, line: bytes) -> None:
        self._content += line
        self._changed = True
        if time.monotonic() - self._written >= BUCKET_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self._changed:
            self._path.write_bytes(self._content)
            self._written, self._changed = time.monotonic(), False

    def close(self) -> None:
        self.flush()


def _open_events(workdir: Path, step: int) -> Any:
    import tensorboardX

    # What an earlier run wrote after this step is hidden from then on.
    return tensorboardX.SummaryWriter(str(workdir), purge_step=step + 1 if step else None)


def _to_line(line: Mapping[str, Any]) -> str:
    return json.dumps(line, allow_nan=False) + '\n'


# What has a line of its own above the bar, beside the evaluation's best metric.
ABOVE_BAR = ('eval/loss', 'train/bad_steps', 'train/skipped_images')
# With counts of six digits and ten hours left this fits 80 columns, with a short bar.
BAR_FORMAT = '{bar}| {n_fmt}/{total_fmt} {remaining} left{postfix}'


class Progress:
    """A bar on a terminal, with what fits one line of it; plain lines with every value elsewhere.

    Beside the bar stand the time left, images per second, the loss, and the task's best metric
    where training has it too. The other values are in metrics.jsonl; steps that were not finite and
    skipped images have a line above the bar.

    Args:
      mode: 'auto', 'bar', 'lines' or 'none'.
      step, total_steps: Current and last step of the run.
      task: Says how its metrics are shown.
    """

    def __init__(self, mode: str, step: int, total_steps: int, task: Task) -> None:
        if mode == 'auto':
            mode = 'bar' if sys.stderr.isatty() else 'lines'
        self._mode = mode
        self._task = task
        self._total = total_steps
        self._bar, self._first = None, True
        if mode == 'bar':
            self._bar = tqdm.tqdm(
                initial=step,
                total=total_steps,
                dynamic_ncols=True,
                smoothing=0.1,
                bar_format=BAR_FORMAT,
            )

    def say(self, text: str) -> None:
        """Prints a line, above the bar if there is one; control characters are escaped."""
        text = one_line(text, 2000)
        if self._mode == 'bar':
            self._bar.write(text)
        elif self._mode == 'lines':
            print(text, flush=True)

    def compiling(self) -> None:
        """Announces the first step, which takes longer than the others."""
        self.say('compiling the training step')

    def advance(self) -> None:
        """Counts one step; the time of the first, which is compiled, does not count."""
        if self._bar is None:
            return
        if self._first:
            self._first = False
            self._bar.n += 1
            self._bar.initial = self._bar.last_print_n = self._bar.n
            self._bar.unpause()
            self._bar.refresh()
        else:
            self._bar.update()

    def report(self, step: int, epoch: float, values: Mapping[str, float], rate: float) -> None:
        """Shows metrics; `rate` is in steps a second, 0 if unknown."""
        if self._bar is not None:
            self._report_beside_bar(step, epoch, values)
            return
        left = (
            f', {_duration((self._total - step) / rate)} left'
            if rate and step < self._total
            else ''
        )
        shown = ', '.join(f'{name} {self._short(name, value)}' for name, value in values.items())
        self.say(f'step {step}/{self._total} (epoch {epoch:.2f}): {shown}{left}')

    def _report_beside_bar(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        above = (*ABOVE_BAR, f'eval/{self._task.best}')
        names = [name for name in values if name in above]
        if names:
            shown = ', '.join(f'{name} {self._short(name, values[name])}' for name in names)
            self.say(f'step {step}/{self._total} (epoch {epoch:.2f}): {shown}')
        if 'train/loss' in values:
            shown = [f'loss {self._short("train/loss", values["train/loss"])}']
            if values.get('train/images_per_second'):
                shown.insert(0, f'{values["train/images_per_second"]:,.0f} images/s')
            best = f'train/{self._task.best}'
            if best in values:
                shown.append(f'{self._task.best} {self._short(best, values[best])}')
            # tqdm puts a comma before it.
            self._bar.set_postfix_str(', '.join(shown))

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.close()

    def _short(self, name: str, value: float) -> str:
        metric = name.rpartition('/')[2]
        if metric in self._task.percentages:
            return f'{value:.2%}'
        return f'{value:,.0f}' if metric == 'images_per_second' else f'{value:.4g}'


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'


class Clock:
    """Measures the time that steps take, without compiling, evaluating and saving."""

    def __init__(self) -> None:
        self._started = None
        self._steps = 0
        self._seconds = 0.0
        self._waited = 0.0

    def start(self) -> None:
        """Begins to measure, or goes on."""
        if self._started is None:
            self._started = time.perf_counter()

    def stop(self) -> None:
        """Stops measuring until the next start."""
        if self._started is not None:
            self._seconds += time.perf_counter() - self._started
            self._started = None

    def step_done(self) -> None:
        """Counts a finished step, if the clock ran while it did."""
        if self._started is not None:
            self._steps += 1

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time of the block as waited for data, if the clock runs."""
        began = time.perf_counter()
        try:
            yield
        finally:
            if self._started is not None:
                self._waited += time.perf_counter() - began

    def waited_fraction(self) -> float:
        """Returns the share of the time since the last call of `rate` that was waited for data."""
        seconds = self._seconds
        if self._started is not None:
            seconds += time.perf_counter() - self._started
        return self._waited / seconds if seconds else 0.0

    def rate(self) -> float:
        """Returns the steps a second since the last call, 0 if there were none."""
        running = self._started is not None
        self.stop()
        rate = self._steps / self._seconds if self._steps and self._seconds else 0.0
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0
        if running:
            self.start()
        return rate
