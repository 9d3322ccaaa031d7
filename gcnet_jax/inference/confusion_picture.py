"""The picture of a confusion matrix."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

# More names than this cannot be read along the axes of a picture.
MAX_NAMED_CLASSES = 60
COLOR_MAP = 'Blues'


def draw_matrix(
    confusion: Int[np.ndarray, 'classes classes'],
    label_names: Sequence[str],
    title: str,
    cell: Callable[[int, float], str] = lambda count, share: f'{count:,}',
) -> Any:
    """Draws a confusion matrix, each row as shares of its class, as a matplotlib Figure.

    Args:
      confusion: Counts by class (row) and by the class that was taken for it (column).
      label_names: Name of each class; written along the axes of up to 60 classes.
      title: Above the matrix.
      cell: What is written in the cells of up to 20 classes, from a count and its share of the row.
    """
    from matplotlib.figure import Figure

    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    classes = len(confusion)
    side = min(max(5.0, 0.32 * classes + 2.5), 20.0)
    figure = Figure(figsize=(side + 1.2, side), layout='constrained')
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap=COLOR_MAP, vmin=0, vmax=1, interpolation='nearest')
    figure.colorbar(image, ax=axes, label='share of the true class', shrink=0.8)
    axes.set_title(title, parse_math=False)
    axes.set_xlabel('predicted class')
    axes.set_ylabel('true class')
    if classes <= MAX_NAMED_CLASSES:
        # A dollar sign in a name is no formula.
        names = [_shortened(name) for name in label_names]
        axes.set_xticks(range(classes), names, rotation=90, parse_math=False)
        axes.set_yticks(range(classes), names, parse_math=False)
    if classes <= MAX_NAMED_CLASSES // 3:
        for row, column in np.ndindex(confusion.shape):
            if confusion[row, column]:
                color = 'white' if shares[row, column] > 0.6 else 'black'
                text = cell(int(confusion[row, column]), float(shares[row, column]))
                axes.text(column, row, text, ha='center', va='center', color=color, fontsize=8)
    return figure


def _shortened(name: str, length: int = 24) -> str:
    return name if len(name) <= length else name[: length - 1] + '…'
