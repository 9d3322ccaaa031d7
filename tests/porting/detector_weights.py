"""Weights and images for detectors, drawn from a seed: the same in mmdetection and here.

`seeded.py` draws networks whose logits are near one. A detector of such weights finds nothing: over
81 classes every probability is near 0.012, and 0.05 is the least that counts. Here each kind of
layer has a gain, so that attention differs between positions, offsets of deformable convolutions
are a pixel or two, boxes move by a fraction of their size, and some classes stand out. Gains are
those of the weights that the rules of mmdetection were checked with, `shared/DETECTORS.md`.

All is uniform numbers times constants: nothing rounds differently on another machine but means.
"""

import re
from collections.abc import Mapping

import numpy as np

from tests.porting.seeded import Shapes, generator

# By the end of a name: gain of a weight, whose inputs are of unit size; the first match counts.
GAINS = {
    r'conv_mask\.weight': 5.0,
    r'channel_\w+_conv\.3\.weight': 0.4,
    r'conv_offset\.weight': 0.9,
    r'lateral_convs\.\d\.conv\.weight': 0.4,
    r'fpn_convs\.\d\.conv\.weight': 1.0,
    r'rpn_cls\.weight': 2.0,
    r'rpn_reg\.weight': 0.25,
    r'bbox_head\.\d\.fc_cls\.weight': 8.0,  # Three of them are averaged.
    r'fc_cls\.weight': 5.0,
    r'fc_reg\.weight': 1.0,
    r'conv_logits\.weight': 4.0,
    r'conv_seg\.weight': 4.0,  # Of segmenters.
    r'weight': 1.5,
}
# Mean and spread of a bias.
BIASES = {
    r'rpn_cls\.bias': (-1.0, 0.5),
    r'fc_cls\.bias': (0.0, 0.5),
    r'conv_offset\.bias': (0.0, 0.7),
    r'bias': (0.0, 0.2),
}


def detector_weights(shapes: Shapes, seed: int, background: float = 0.0) -> dict[str, np.ndarray]:
    """One array for every name in mmdetection's layout, of its shape.

    Args:
      shapes: Of the state dict.
      seed: Of all.
      background: Added to the bias of the background, so that fewer boxes are of an object.
    """
    weights = {name: _weight(name, tuple(shape), seed) for name, shape in shapes.items()}
    return weights | with_background(weights, background)


def with_background(weights: Mapping[str, np.ndarray], more: float) -> dict[str, np.ndarray]:
    """The biases of the class logits, with `more` for the background."""
    found = {name: value.copy() for name, value in weights.items() if name.endswith('fc_cls.bias')}
    for value in found.values():
        value[-1] += np.float32(more)
    return found


def _weight(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    if name.endswith('num_batches_tracked'):
        return np.zeros(shape, np.int64)
    draw = generator(name, seed).random(shape, np.float32)
    values = (draw - np.float32(0.5)) * np.float32(np.sqrt(12))  # Mean 0, variance 1.
    if name.endswith('running_mean'):
        return 0.2 * values
    if name.endswith('running_var'):
        return 1 + 0.25 * values
    if name.endswith('bias'):
        mean, spread = _first(BIASES, name)
        return mean + spread * values
    if len(shape) in (1, 3):  # The scale of a norm; that of a residual branch is small.
        return (0.2 if name.endswith('bn3.weight') else 1.0) * (1 + 0.2 * values)
    # A transposed convolution of stride 2 adds up over its first dimension alone.
    axes = (0,) if name.endswith('upsample.weight') else tuple(range(1, len(shape)))
    # Without the mean, deep networks of positive activations would give the same everywhere.
    values -= values.mean(axes, keepdims=True)
    fan_in = np.prod([shape[axis] for axis in axes])
    return values * np.float32(_first(GAINS, name) / np.sqrt(fan_in))


def _first(table, name):
    return next(value for pattern, value in table.items() if re.search(f'{pattern}$', name))


def detector_image(height: int, width: int, seed: int) -> np.ndarray:
    """An RGB image of overlapping rectangles, ramps and noise, in whole numbers throughout."""
    draw = generator(f'image {height}x{width}', seed)
    rows, columns = np.arange(height)[:, None, None], np.arange(width)[None, :, None]
    image = (
        rows * draw.integers(-90, 90, 3) // height + columns * draw.integers(-90, 90, 3) // width
    )
    image = image + draw.integers(60, 190, 3)
    for _ in range(30):
        top, left = draw.integers(0, height - 8), draw.integers(0, width - 8)
        tall, wide = draw.integers(6, max(height // 2, 8)), draw.integers(6, max(width // 2, 8))
        image[top : top + tall, left : left + wide] += draw.integers(-80, 80, 3)
    image += draw.integers(-12, 13, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)
