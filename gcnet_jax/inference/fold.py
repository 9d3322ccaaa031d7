"""Folds BatchNorm into the convolutions before it, for any linen model and without changing it.

At inference BatchNorm is `x * scale + shift` with constants a channel. Where `x` is the output of a
convolution, the scale goes into its kernel, and the shift is all that is left of the norm. The
model's code does not change: its variables do, and under `folded_batch_norm()` a BatchNorm that has
no statistics only adds its bias.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from gcnet_jax.context.common import float32_or_wider
from gcnet_jax.models.layers import Conv

CONVOLUTIONS = (Conv, nn.Conv)

Path = tuple[str, ...]


def fold_batch_norms(
    model: nn.Module, variables: Mapping[str, Any], *inputs: Any, **options: Any
) -> dict[str, dict]:
    """Returns the variables of the same model with its BatchNorms folded into its convolutions.

    Use them under `folded_batch_norm()`. A BatchNorm is folded where its input is what a
    convolution returned and both are called once; that output may go nowhere else, as in every
    network of `gcnet_jax.models`. Any other BatchNorm keeps its statistics and works as before.
    The model computes nothing, it is only traced.

    Args:
      model: Any linen module.
      variables: {'params', 'batch_stats'}; not changed.
      *inputs: The model's inputs; `jax.ShapeDtypeStruct` will do.
      **options: Keyword arguments of its call, such as `train=False`.
    """
    params = flatten_dict(dict(variables['params']))
    statistics = flatten_dict(dict(variables.get('batch_stats', {})))
    for norm, (convolution, epsilon) in _find_pairs(model, variables, inputs, options).items():
        mean = np.asarray(statistics.pop((*norm, 'mean')), np.float64)
        variance = np.asarray(statistics.pop((*norm, 'var')), np.float64)
        scale = params.pop((*norm, 'scale'), 1.0) / np.sqrt(variance + epsilon)
        shift = params.get((*norm, 'bias'), 0.0) - mean * scale
        params[(*norm, 'bias')] = np.asarray(shift, np.float32)
        for name in ('kernel', 'bias'):
            leaf = params.get((*convolution, name))
            if leaf is not None:
                # Output channels come last in both.
                params[(*convolution, name)] = (np.asarray(leaf) * scale).astype(leaf.dtype)
    return {'params': unflatten_dict(params), 'batch_stats': unflatten_dict(statistics)}


def folded_batch_norm() -> contextlib.AbstractContextManager:
    """Under it, a BatchNorm without statistics adds its bias and does nothing else."""
    return nn.intercept_methods(_add_bias)


def _add_bias(method: Callable, args: tuple, keywords: dict, context: Any) -> Any:
    module = context.module
    if (
        context.method_name != '__call__'
        or not isinstance(module, nn.BatchNorm)
        or module.has_variable('batch_stats', 'mean')
    ):
        return method(*args, **keywords)
    features = args[0]
    bias = module.get_variable('params', 'bias').reshape((1,) * (features.ndim - 1) + (-1,))
    dtype = float32_or_wider(features.dtype)
    return (features.astype(dtype) + bias.astype(dtype)).astype(features.dtype)


def _find_pairs(
    model: nn.Module, variables: Mapping[str, Any], inputs: tuple, options: Mapping[str, Any]
) -> dict[Path, tuple[Path, float]]:
    """Returns for each BatchNorm that can be folded its convolution and its epsilon."""
    called: set[Path] = set()
    outputs: dict[Path, list[Any]] = {}
    norms: dict[Path, list[tuple[Any, float]]] = {}

    def watch(method: Callable, args: tuple, keywords: dict, context: Any) -> Any:
        output = method(*args, **keywords)
        module = context.module
        called.add(module.path)
        if context.method_name == '__call__' and isinstance(module, CONVOLUTIONS):
            outputs.setdefault(module.path, []).append(output)
        if context.method_name == '__call__' and isinstance(module, nn.BatchNorm):
            # super().__call__ of a subclass comes by here too, with the same input.
            norms.setdefault(module.path, []).append((args[0] if args else None, module.epsilon))
        return output

    with nn.intercept_methods(watch):
        jax.eval_shape(
            lambda tree, *values: model.apply(tree, *values, **options), variables, *inputs
        )
    # A block that was inserted behind a convolution lies within it, and changes what it returns.
    around = {path[:depth] for path in called for depth in range(len(path))}
    once = {
        path: values[0]
        for path, values in outputs.items()
        if len(values) == 1 and path not in around
    }
    pairs = {}
    for norm, calls in norms.items():
        features, epsilon = calls[0]
        before = [path for path, output in once.items() if output is features]
        if before and all(values is features for values, _ in calls):
            pairs[norm] = (before[0], epsilon)
    shared = [path for path, _ in pairs.values()]
    return {norm: pair for norm, pair in pairs.items() if shared.count(pair[0]) == 1}
