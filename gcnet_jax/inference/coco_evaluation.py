"""What the evaluation of a detector says, as text and as files."""

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from gcnet_jax.errors import one_line
from gcnet_jax.inference.report_files import write_report
from gcnet_jax.tasks.average_precision import CURVES, METRICS
from gcnet_jax.tasks.coco_evaluator import CocoEvaluation

PICTURE_FILE = 'precision_recall.png'
# Classes that are listed as text.
MAX_LISTED = 20
COLORS = ('tab:blue', 'tab:orange', 'black')


def format_coco_evaluation(evaluation: CocoEvaluation) -> str:
    """Lays a result out as text: the figures, and the classes from the worst to the best."""
    skipped = f' ({evaluation.skipped:,} left out)' if evaluation.skipped else ''
    lines = [
        f'{one_line(evaluation.data)} {one_line(evaluation.split)}: '
        f'{evaluation.examples:,} images{skipped}, '
        f'{evaluation.objects:,} objects, {evaluation.detections:,} detections',
        _row('', 9, evaluation.metrics),
        *(
            _row(name, 9, [_percent(metrics[name]) for metrics in evaluation.metrics.values()])
            for name in METRICS
        ),
        '',
    ]
    results = [result for result in evaluation.classes if result.objects]
    # By masks, where there are any.
    results.sort(key=lambda result: [*result.metrics.values()][-1]['AP'])
    listed = results[:MAX_LISTED]
    width = max((len(one_line(result.label, 60)) for result in listed), default=0)
    if listed:
        lines.append(_row('AP', width, evaluation.metrics) + ' of objects')
    for result in listed:
        figures = [_percent(metrics['AP']) for metrics in result.metrics.values()]
        label = one_line(result.label, 60)
        lines.append(f'{_row(label, width, figures)} of {result.objects:,}')
    if len(results) > MAX_LISTED:
        lines.append(f'  ... and {len(results) - MAX_LISTED} classes better than these')
    lines += [f'note: {note}' for note in evaluation.notes]
    return '\n'.join(lines)


def write_coco_evaluation(evaluation: CocoEvaluation, directory: str | os.PathLike) -> list[Path]:
    """Writes `evaluation.json`, and `precision_recall.png` where any object was annotated.

    Args:
      evaluation: The result.
      directory: Made if it does not exist; files of these names are replaced.

    Returns:
      The files, each of which is complete.

    Raises:
      DataError: It cannot be written.
    """
    figure = draw_precision(evaluation) if evaluation.objects else None
    return write_report(directory, evaluation.to_json(), PICTURE_FILE, figure)


def draw_precision(evaluation: CocoEvaluation) -> Any:
    """Draws precision over recall, a panel for boxes and one for masks, as a matplotlib Figure."""
    from matplotlib.figure import Figure

    kinds = list(evaluation.precision)
    figure = Figure(figsize=(4.6 * len(kinds) + 0.4, 4.8), layout='constrained')
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for panel, kind in zip(panels, kinds, strict=True):
        curves = evaluation.precision[kind]
        recalls = np.linspace(0, 1, curves.shape[1])
        for name, curve, color in zip(CURVES, curves, COLORS, strict=True):
            area = f'{curve.mean():.1%}'
            panel.plot(recalls, curve, color=color, label=f'{name}: {area}', linewidth=1.8)
        panel.set(xlabel='recall', xlim=(0, 1), ylim=(0, 1.02), title=kind)
        panel.grid(alpha=0.3)
        panel.legend(title='average precision', framealpha=0.9)
    panels[0].set_ylabel('precision, mean over classes')
    figure.suptitle(
        f'{one_line(evaluation.data, 60)} {one_line(evaluation.split, 30)}: '
        f'{evaluation.examples:,} images, {evaluation.objects:,} objects',
        parse_math=False,
    )
    return figure


def _row(name: str, width: int, figures: Iterable[str]) -> str:
    return f'  {name:<{width}}' + ''.join(f'  {figure:>8}' for figure in figures)


def _percent(value: float) -> str:
    return '-' if math.isnan(value) else f'{value:.2%}'
