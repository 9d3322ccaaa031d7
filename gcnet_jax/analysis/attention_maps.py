"""Reads the attention of every context block out of any linen model, without changing the model."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
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
      For each attention, by the path of its module such as 'stage3_0/context_after_conv2_0/pool': a
      float32 array `[batch, *spatial]` that sums to one over the positions, for GlobalContext and
      SimplifiedNonLocal; `[batch, *query, *key]`, that sums to one over the keys, for NonLocal's
      softmax modes. A module that is called several times has `path:0`, `path:1` and so on. In the
      order of the names, numbers by their value.

    Raises:
      UserError: The model holds no block that attends.
    """

    def apply(variables: Mapping[str, Any], *values: Any) -> dict[str, dict[str, Array]]:
        sown = model.apply(variables, *values, **options, mutable=['intermediates'])[1]
        return sown_values(sown, ('attention',))

    maps = jax.jit(apply)(variables, *inputs)['attention']
    if not maps:
        raise no_attention(model)
    return in_order(maps)


def sown_values(state: Mapping[str, Any], names: Collection[str]) -> dict[str, dict[str, Array]]:
    """Sorts what blocks have sown by its name.

    Args:
      state: What `apply(..., mutable=['intermediates'])` returns beside the output.
      names: What to keep, such as 'attention'.

    Returns:
      For each name the values by the path of the module that has sown them; with `:0`, `:1`, ...
      behind the path where it was called several times.
    """
    found: dict[str, dict[str, Array]] = {name: {} for name in names}
    for path, calls in flatten_dict(dict(state.get('intermediates', {}))).items():
        if path[-1] not in found:
            continue
        module = '/'.join(path[:-1])
        for index, value in enumerate(calls):
            found[path[-1]][module if len(calls) == 1 else f'{module}:{index}'] = value
    return found


def in_order(by_path: Mapping[str, Any]) -> dict[str, Any]:
    """Sorts by path, numbers by their value: 'stage3_2' comes before 'stage3_10'."""

    def key(path: str) -> list[str | int]:
        return [int(part) if part.isdigit() else part for part in re.split(r'(\d+)', path)]

    return {path: by_path[path] for path in sorted(by_path, key=key)}


def padding_share(
    attention: Float[np.ndarray, '*queries map_height map_width'],
    canvas: tuple[int, int],
    size: Sequence[float],
) -> float:
    """Returns which part of the attention lies on the padding of an image.

    Args:
      attention: One image's map, or the maps of all queries, of which those in the image count. A
        value covers an equal part of the canvas and counts by how much of that is padding.
      canvas: Height and width of the padded image.
      size: Those of the image, which is at the top left.
    """
    inside = [
        np.clip(part * cells / whole - np.arange(cells), 0, 1)
        for part, whole, cells in zip(size, canvas, attention.shape[-2:], strict=True)
    ]
    cover = np.outer(*inside)
    shares = 1 - (attention.astype(np.float64) * cover).sum(axis=(-2, -1))
    return float(shares if shares.ndim == 0 else (shares * cover).sum() / cover.sum())


def no_attention(model: nn.Module) -> UserError:
    """Returns the error for a model without a block that attends."""
    return UserError(
        f'{type(model).__name__} holds no block that attends; average pooling and '
        'squeeze-excitation have no attention: use GlobalContext(pooling="attention"), '
        'SimplifiedNonLocal or NonLocal'
    )
