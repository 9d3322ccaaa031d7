"""Figures of merit of segmentation from one confusion matrix, by the rules of mmsegmentation.

A confusion matrix counts pixels by their class (row) and the class that they were taken for
(column). Pixels without a class are not counted. The rules are those of `IoUMetric` of
mmsegmentation 1.2: a figure that would divide by zero is not a number, and means leave it out.
"""

import numpy as np
from jaxtyping import Float, Int


def iou(confusion: Int[np.ndarray, 'classes classes']) -> Float[np.ndarray, ' classes']:
    """Returns each class's intersection over union; NaN for one in neither labels nor answers."""
    confusion = np.asarray(confusion, np.float64)
    correct = np.diagonal(confusion)
    return _divide(correct, confusion.sum(0) + confusion.sum(1) - correct)


def accuracy(confusion: Int[np.ndarray, 'classes classes']) -> Float[np.ndarray, ' classes']:
    """Returns the share of each class's pixels that is right; NaN for a class without pixels."""
    confusion = np.asarray(confusion, np.float64)
    return _divide(np.diagonal(confusion), confusion.sum(1))


def summary(confusion: Int[np.ndarray, 'classes classes']) -> dict[str, float]:
    """Returns 'miou', 'pixel_accuracy' and 'mean_accuracy', from 0 to 1.

    Mean IoU and mean accuracy are over the classes that have one; all three are NaN where no pixel
    was counted.
    """
    total = np.asarray(confusion, np.float64)
    return {
        'miou': _mean(iou(total)),
        'pixel_accuracy': float(_divide(np.trace(total), total.sum())),
        'mean_accuracy': _mean(accuracy(total)),
    }


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    with np.errstate(invalid='ignore'):  # 0/0 is NaN, as wanted.
        return np.asarray(numerator, np.float64) / np.asarray(denominator, np.float64)


def _mean(values: Float[np.ndarray, ' classes']) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if len(present) else float('nan')
