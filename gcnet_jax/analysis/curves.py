"""Compares runs: the loss and the task's best metric, read from their metrics.jsonl."""

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gcnet_jax.analysis.pictures import png_bytes, save_figure
from gcnet_jax.errors import CheckpointError, ConfigError, one_line, unknown_name
from gcnet_jax.files import as_place
from gcnet_jax.metrics_file import METRICS_FILE, read_metrics
from gcnet_jax.tasks import TASKS

PARTS = ('train', 'eval')
# Beside the loss what makes a checkpoint the best one, for each task.
METRICS = ('loss', *dict.fromkeys(task.best for task in TASKS.values()))
PERCENTAGES = frozenset().union(*(task.percentages for task in TASKS.values()))
KEYS = frozenset(f'{part}/{metric}' for part in PARTS for metric in METRICS)
AXES = ('epoch', 'step')
STYLES = {
    'train': {'linewidth': 1, 'alpha': 0.5},
    'eval': {'linewidth': 2, 'marker': 'o', 'markersize': 4},
}
Lines = list[dict[str, Any]]


def write_curves(
    runs: Sequence[str | os.PathLike], out: str | os.PathLike, *, by: str = 'epoch'
) -> Path:
    """Draws the curves of runs into a PNG file; see `draw_curves`."""
    return save_figure(draw_curves(runs, by=by), out)


def draw_curves(runs: Sequence[str | os.PathLike], *, by: str = 'epoch') -> Any:
    """Draws the loss of one or more runs, and the metric that is best for their task.

    That is accuracy, or mAP of runs with several labels an image; runs of both make three panels.

    Args:
      runs: Working directories of train.py; the run may still be going on.
      by: What the horizontal axis counts, 'epoch' or 'step'.

    Returns:
      A matplotlib Figure; `save_figure` writes it.

    Raises:
      CheckpointError: A run has no metrics, or damaged ones.
      ConfigError: There is no such axis, or no run.
    """
    if by not in AXES:
        raise ConfigError(unknown_name('horizontal axis', by, AXES))
    if not runs:
        raise ConfigError('name one run or more, working directories of train.py')
    lines = {name: _read(run, by) for name, run in zip(_names(runs), runs, strict=True)}
    return _draw(lines, by)


@contextlib.contextmanager
def watch_curves(
    runs: Sequence[str | os.PathLike], *, seconds: float = 30.0, by: str = 'epoch'
) -> Iterator[None]:
    """Shows the curves in a notebook, and redraws them while the block under it runs.

        with watch_curves(['runs/digits']):
            train(config, 'runs/digits')

    Args:
      runs: See `draw_curves`; a run need not have begun.
      seconds: Time between two drawings.
      by: See `draw_curves`.
    """
    from IPython.display import Image, display

    shown = []
    done = threading.Event()

    def show() -> None:
        try:
            picture = Image(data=png_bytes(draw_curves(runs, by=by)))
        except CheckpointError:  # Nothing to draw yet.
            return
        if shown:
            shown[0].update(picture)
        else:
            shown.append(display(picture, display_id=True))

    def show_until_done() -> None:
        while not done.wait(seconds):
            show()

    thread = threading.Thread(target=show_until_done, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        show()


def _read(run: str | os.PathLike, by: str) -> Lines:
    path = as_place(run, 'run')
    if not path.is_dir():
        raise CheckpointError(f'{run} is not a directory; name the working directory of a run')
    if not (path / METRICS_FILE).exists():
        raise CheckpointError(f'{run} holds no {METRICS_FILE}; name the working directory of a run')
    lines = read_metrics(path)
    drawn = [line for line in lines if not KEYS.isdisjoint(line)]
    if not drawn:
        raise CheckpointError(f'{path / METRICS_FILE} holds no metrics yet; train for longer')
    for line in drawn:
        for key in (by, *KEYS.intersection(line)):
            value = line.get(key)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise CheckpointError(
                    f'{path / METRICS_FILE}, step {line["step"]}: {key} is {value!r}, not a '
                    'number; repair or remove that line'
                )
    return drawn


def _names(runs: Sequence[str | os.PathLike]) -> list[str]:
    """Returns what distinguishes the runs: their paths below the directory that holds them all."""
    paths = [as_place(run, 'run') for run in runs]
    if len(set(paths)) < len(paths):
        raise ConfigError('a run is named twice; name each once')
    common = os.path.commonpath([path.parent for path in paths])
    return [one_line(path.relative_to(common)) for path in paths]


def _draw(runs: Mapping[str, Lines], by: str) -> Any:
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import PercentFormatter

    found = {key for lines in runs.values() for line in lines for key in line}
    metrics = [
        name
        for name in METRICS
        if name == 'loss' or not found.isdisjoint(f'{part}/{name}' for part in PARTS)
    ]
    figure = Figure(figsize=(5 * max(2, len(metrics)), 4.2), layout='constrained')
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    axes = dict(zip(metrics, panels, strict=True))
    colours = colormaps['tab10' if len(runs) <= 10 else 'viridis'].resampled(max(10, len(runs)))
    colours = [colours(index) for index in range(len(runs))]
    for colour, lines in zip(colours, runs.values(), strict=True):
        for metric, panel in axes.items():
            for part in PARTS:
                points = _points(lines, f'{part}/{metric}', by)
                panel.plot(*points, color=colour, **STYLES[part])
    for metric, panel in axes.items():
        panel.set(xlabel=by, title=metric)
        panel.grid(alpha=0.3)
        panel.spines[['top', 'right']].set_visible(False)
        if metric in PERCENTAGES:
            # As many decimals as the range needs: short ones would repeat their labels.
            panel.yaxis.set_major_formatter(PercentFormatter(1.0))
    # The first evaluations can be far off; a logarithm shows them and the end as well.
    axes['loss'].set_yscale('log')
    for formatter in (
        axes['loss'].yaxis.set_major_formatter,
        axes['loss'].yaxis.set_minor_formatter,
    ):
        formatter(_log_formatter())
    handles = [Line2D([], [], color='0.3', label=part, **STYLES[part]) for part in PARTS]
    handles += [
        Line2D([], [], color=colour, linewidth=4, label=name)
        for colour, name in zip(colours, runs, strict=True)
    ]
    legend = figure.legend(handles=handles, loc='outside lower center', ncols=4, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # A directory's name may look like TeX.
    return figure


def _log_formatter() -> Any:
    """Labels the ticks that matplotlib would, as plain numbers: 0.6, not 6e-01."""
    from matplotlib.ticker import LogFormatter

    class PlainLogFormatter(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f'{x:g}' if super().__call__(x, pos) else ''

    return PlainLogFormatter(minor_thresholds=(2, 0.5))


def _points(lines: Lines, key: str, by: str) -> tuple[list[float], list[float]]:
    """Returns where and what the values of a key are."""
    points = [(line[by], line[key]) for line in lines if key in line]
    return [place for place, _ in points], [value for _, value in points]
