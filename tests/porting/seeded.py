"""Weights and images drawn from a seed, the same with and without torch: a name and a shape is all.

Every statistic and every bias is off its default, and the scales keep activations of deep networks
and the logits of their attention near one.
"""

import hashlib
from collections.abc import Mapping

import numpy as np

from gcnet_jax.porting.tensors import LazyTensor, LazyTensors

Shapes = Mapping[str, tuple[int, ...]]


def generator(name: str, seed: int) -> np.random.Generator:
    """A generator of its own for every name, whatever the order."""
    digest = hashlib.sha256(f'{seed}/{name}'.encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], 'little')))


def seeded_tensors(shapes: Shapes, seed: int = 0) -> dict[str, np.ndarray]:
    """One array for every PyTorch name, of its shape."""
    return {name: seeded_tensor(name, tuple(shape), seed) for name, shape in shapes.items()}


def seeded_tensor(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    draw = generator(name, seed)
    if name.endswith('num_batches_tracked'):
        return np.array(draw.integers(1, 1000), np.int64)
    if name.endswith('running_var'):
        values = draw.uniform(0.5, 1.5, shape)
    elif name.endswith(('bias', 'running_mean')):
        values = 0.1 * draw.standard_normal(shape)
    elif sum(size > 1 for size in shape) <= 1 and 'conv_' not in name and 'attn.conv.' not in name:
        values = draw.uniform(0.5, 1.0, shape)  # the scale of a normalisation
    else:
        fan_in = np.prod(shape[1:])
        # one output: the logits of an attention, which must not all fall on one position
        gain = 0.2 if shape[0] == 1 else 2.0
        values = draw.standard_normal(shape) * np.sqrt(gain / fan_in)
    return values.astype(np.float32)


def in_memory(tensors: Mapping[str, np.ndarray]) -> LazyTensors:
    """Tensors as a file that was opened gives them."""
    return LazyTensors(
        {k: LazyTensor(v.shape, str(v.dtype), lambda v=v: v) for k, v in tensors.items()}
    )


def seeded_images(height: int, width: int, *, batch: int = 1, channels: int = 3) -> np.ndarray:
    """Normalised images with a colour, slopes and noise: `[batch, height, width, channel]`.

    Noise alone would be averaged away, and every image would get the same logits.
    """
    draw = generator(f'images {batch}x{height}x{width}x{channels}', 0)
    rows = np.linspace(-1, 1, height)[None, :, None, None]
    columns = np.linspace(-1, 1, width)[None, None, :, None]
    colour, down, across = draw.standard_normal((3, batch, 1, 1, channels))
    noise = draw.standard_normal((batch, height, width, channels))
    return (colour + rows * down + columns * across + noise).astype(np.float32)
