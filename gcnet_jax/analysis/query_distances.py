"""How much a non-local block depends on the query: the paper's analysis (GCNet, section 3.2).

The mean distance between all pairs of positions, `1 / N^2 * sum over i, j of distance(v_i, v_j)`,
for three kinds of vectors: the block's input at a position, what the block adds to it, and the
attention map of a query. Where the input differs and the others do not, all queries attend alike,
and one map serves them all: that is what the global context block makes of it.

    cosine            (1 - cos(v_i, v_j)) / 2, from 0 (alike) to 1 (opposed)
    Jensen-Shannon    of two attention maps, in nats, from 0 to log 2
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Float

from gcnet_jax.analysis.attention_maps import in_order, sown_values
from gcnet_jax.errors import UserError

SOWN = ('attention', 'input', 'update')
# The divergence takes the cube of their number; the cosines are exact for any.
MAX_DIVERGENCE_QUERIES = 256


@dataclasses.dataclass(frozen=True)
class QueryDistances:
    """Mean distances over the images, `nan` where they are not defined.

    Attributes:
      input: Cosine distance of the block's inputs.
      output: Cosine distance of what the block adds; `nan` for a block that adds nothing yet.
      attention: Cosine distance of the attention maps; `nan` in the modes without a softmax.
      attention_divergence: Jensen-Shannon divergence of the attention maps.
    """

    input: float
    output: float
    attention: float
    attention_divergence: float

    def __str__(self) -> str:
        return (
            f'cosine distance: input {_short(self.input)}, output {_short(self.output)}, '
            f'attention {_short(self.attention)}; '
            f'Jensen-Shannon: attention {_short(self.attention_divergence)}'
        )


def format_distances(distances: Mapping[str, QueryDistances], images: int) -> str:
    """Returns the paper's table: a row for each block, averaged over `images` images."""
    rows = [('block', 'input', 'output', 'attention', 'attention (JS)')]
    rows += [(path, *map(_short, dataclasses.astuple(row))) for path, row in distances.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        '  '.join(
            text.rjust(width) if column else text.ljust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    title = (
        'mean cosine distance, and Jensen-Shannon divergence (JS), of all pairs of positions; '
        f'images: {images}'
    )
    return '\n'.join([title, *lines])


def query_distances(
    model: nn.Module, variables: Mapping[str, Any], *inputs: Any, **options: Any
) -> dict[str, QueryDistances]:
    """Runs the model once and returns the mean distances of each of its NonLocal blocks.

    Args:
      model: Any linen module that holds `NonLocal` blocks.
      variables: Its parameters and other collections.
      *inputs: Its inputs.
      **options: Keyword arguments of its call, such as `train=False`.

    Returns:
      The distances, averaged over the images, by the path of the block.

    Raises:
      UserError: The model holds no such block.
    """

    def apply(variables: Mapping[str, Any], *values: Any) -> dict[str, dict[str, Array]]:
        state = model.apply(variables, *values, **options, mutable=['intermediates'])[1]
        return sown_values(state, SOWN)

    distances = distances_of(jax.jit(apply)(variables, *inputs))
    if not distances:
        raise UserError(
            f'{type(model).__name__} holds no NonLocal block; the others have one attention map '
            'for all positions, so that there is nothing to compare'
        )
    return distances


def distances_of(sown: Mapping[str, Mapping[str, Array]]) -> dict[str, QueryDistances]:
    """Returns the distances of what the blocks have sown, by path; see `query_distances`."""
    found = {}
    for path, inputs in in_order(sown['input']).items():
        attention = sown['attention'].get(path)
        maps = None
        if attention is not None:
            count = math.prod(inputs.shape[1:-1])
            maps = np.asarray(attention).reshape(len(inputs), count, count)
        found[path] = QueryDistances(
            input=_mean(mean_cosine_distance, inputs),
            output=_mean(mean_cosine_distance, sown['update'][path]),
            attention=math.nan if maps is None else _mean(mean_cosine_distance, maps),
            attention_divergence=math.nan if maps is None else _mean(mean_divergence, maps),
        )
    return found


def mean_cosine_distance(vectors: Float[np.ndarray, 'count size']) -> float:
    """Returns the mean of `(1 - cos(v_i, v_j)) / 2` over all pairs of vectors that are not zero.

    The mean cosine of all pairs is the squared length of the mean of the unit vectors. `nan` where
    all are zero.
    """
    vectors = vectors.astype(np.float64)
    lengths = np.linalg.norm(vectors, axis=1)
    if not lengths.any():
        return math.nan
    mean = (vectors[lengths > 0] / lengths[lengths > 0, None]).mean(axis=0)
    return float(max(0.0, 1.0 - mean @ mean) / 2)


def mean_divergence(
    distributions: Float[np.ndarray, 'count size'], most: int = MAX_DIVERGENCE_QUERIES
) -> float:
    """Returns the mean Jensen-Shannon divergence of all pairs in nats.

    Of more than `most` distributions, as many at even distances stand for all.
    """
    chosen = np.linspace(0, len(distributions) - 1, min(most, len(distributions))).round()
    rows = distributions[chosen.astype(int)].astype(np.float64)
    entropies = _negative_entropy(rows)
    total = 0.0
    for row, entropy in zip(rows, entropies, strict=True):
        between = _negative_entropy((row + rows) / 2)
        total += float(((entropy + entropies) / 2 - between).sum())
    return max(0.0, total / len(rows) ** 2)


def _negative_entropy(rows: Float[np.ndarray, 'count size']) -> Float[np.ndarray, ' count']:
    return (rows * np.log(np.where(rows > 0, rows, 1.0))).sum(axis=1)


def _mean(distance: Any, images: Array) -> float:
    """Averages a distance over the images; their positions are joined into one dimension."""
    values = np.asarray(images, np.float32)
    values = values.reshape(len(values), -1, values.shape[-1])
    return float(np.mean([distance(image) for image in values]))


def _short(value: float) -> str:
    return 'undefined' if math.isnan(value) else f'{value:.2g}'
