"""What it means that two detectors find the same."""

import numpy as np

from gcnet_jax.tasks.instances import Instances

SAMPLED = 256


def summary(values: np.ndarray) -> np.ndarray:
    """Some values of an array from all over it, and of the rest its largest and its sums.

    Returns:
      Up to `SAMPLED` values, then the largest absolute value, the mean and the mean of squares.
    """
    flat = np.asarray(values, np.float32).reshape(-1)
    positions = np.unique(np.linspace(0, flat.size - 1, SAMPLED).astype(int))
    wide = flat.astype(np.float64)
    rest = [np.abs(flat).max(), wide.mean(), np.square(wide).mean()]
    return np.concatenate([flat[positions], rest]).astype(np.float32)


def near(values: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference of two summaries over the largest value."""
    assert values.shape == expected.shape
    scale = np.full(len(values), expected[-3], np.float64)
    scale[-1] **= 2
    return float((np.abs(values - expected) / scale).max())


def same_boxes(
    ours: np.ndarray, theirs: np.ndarray, scores: np.ndarray, tolerance: float, exchange: float
) -> None:
    """Asserts that boxes are the same in the same order, if scores differ by more than rounding.

    Args:
      ours, theirs: Boxes, the best first.
      scores: Of theirs.
      tolerance: Of a coordinate.
      exchange: The largest difference of the scores of two boxes that may exchange their places.
    """
    assert ours.shape == theirs.shape
    distances = np.abs(ours[:, None] - theirs).max(axis=2)
    # Of two equal boxes each is the nearest of one of ours.
    places = np.arange(len(ours))
    is_there = distances[places, places] < tolerance
    match = np.where(is_there, places, distances.argmin(axis=1))
    assert sorted(match) == [*places]
    assert distances[places, match].max(initial=0) < tolerance
    rises = np.diff(scores[match])
    assert rises.max(initial=0) < exchange


def masks_differ(
    boxes: np.ndarray, masks: np.ndarray, expected: np.ndarray, doubt: float = 1e-4
) -> int:
    """How many pixels of the masks in the image differ, but for those nearly at a half.

    Args:
      boxes: In pixels of the image.
      masks: Probabilities on 28 x 28 cells.
      expected: The masks in the image.
      doubt: How far from a half a pixel may be that differs.
    """
    size, numbers = expected.shape[1:], np.arange(len(boxes))
    ours = Instances(
        boxes, np.ones(len(boxes)), tuple(map(str, numbers)), numbers, size, masks
    ).masks
    differ = ours != expected
    for index in np.flatnonzero(differ.any(axis=(1, 2))):
        left, top, right, bottom = boxes[index].astype(np.float64)
        down, across = _axis(top, bottom, size[0]), _axis(left, right, size[1])
        values = down @ masks[index].astype(np.float64) @ across.T
        differ[index] &= np.abs(values - 0.5) > doubt
    return int(differ.sum())


def _axis(low: float, high: float, size: int) -> np.ndarray:
    """Weights of the 28 cells at each pixel, linear between their centres and zero beyond."""
    places = (np.arange(size) + 0.5 - low) / (high - low) * 28 - 0.5
    return np.maximum(1 - np.abs(places[:, None] - np.arange(28)), 0)
