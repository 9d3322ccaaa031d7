"""Reads the attention of every context block out of any linen model, without changing the model."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float

from gcnet_jax.errors import UserError


def attention_maps(
    model: nn.Module, variables: Mapping[str, Any], *inputs: Any, **options: Any
) -> dict[str, Float[Array, 'batch *positions']]:
    """Runs the model once and returns what each of its blocks attended to.

    Args:
      model: Any linen module that holds blocks of `gcnet_jax.context`.
      variables: Its parameters and other collections.
      *inputs: Its inputs.
      **options: Keyword arguments of its call, such as `train=False`.

    Returns:
      For each attention, by the path of its module such as 'stage3_0/context_after_conv3_0/pool': a
      float32 array `[batch, *spatial]` that sums to one over the positions, for GlobalContext and
      SimplifiedNonLocal; `[batch, *query, *key]`, that sums to one over the keys, for NonLocal's
      softmax modes. A module that is called several times has `path:0`, `path:1` and so on.

    Raises:
      UserError: The model holds no block that attends.
    """

    def apply(variables: Mapping[str, Any], *values: Any) -> Mapping[str, Any]:
        return model.apply(variables, *values, **options, mutable=['intermediates'])[1]

    sown = flatten_dict(dict(jax.jit(apply)(variables, *inputs).get('intermediates', {})), sep='/')
    maps = {}
    for path, calls in sown.items():
        module, _, name = path.rpartition('/')
        if name != 'attention':
            continue
        for index, attention in enumerate(calls):
            maps[module if len(calls) == 1 else f'{module}:{index}'] = attention
    if not maps:
        raise UserError(
            f'{type(model).__name__} holds no block that attends; average pooling and '
            'squeeze-excitation have no attention: use GlobalContext(pooling="attention"), '
            'SimplifiedNonLocal or NonLocal'
        )
    return maps
