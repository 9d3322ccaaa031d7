"""Kernels as 8-bit integers with a scale for each output channel; a quarter of the memory.

Only the weights: they are turned back into floating point where they are used, inside the compiled
function, and everything else is computed as before.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

WEIGHTS = (None, 'int8')


class QuantizedKernel(NamedTuple):
    """A kernel `values * scale`; the output channel is the last axis."""

    values: Int8[Array, '*kernel out']
    scale: Float[Array, ' out']


def quantize_kernels(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the variables with every leaf named `kernel` as a QuantizedKernel, rest untouched.

    Rounded to the nearest of 255 values between the channel's largest absolute value and its
    negative: an element is off by at most 1/254 of the largest in its channel.
    """

    def convert(path: tuple, leaf: Any) -> Any:
        if path[-1].key != 'kernel':
            return leaf
        kernel = np.asarray(leaf, np.float32)
        largest = np.abs(kernel).max(axis=tuple(range(kernel.ndim - 1)))
        scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
        return QuantizedKernel(np.round(kernel / scale).astype(np.int8), scale)

    return jax.tree_util.tree_map_with_path(convert, dict(variables))


def dequantize_kernels(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the variables with floating-point kernels again; to be called under `jax.jit`."""

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, QuantizedKernel):
            return leaf
        channels_last = (1,) * (leaf.values.ndim - 1) + (-1,)
        return leaf.values.astype(jnp.float32) * leaf.scale.reshape(channels_last)

    return jax.tree.map(
        convert, dict(variables), is_leaf=lambda leaf: isinstance(leaf, QuantizedKernel)
    )
