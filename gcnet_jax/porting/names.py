"""Which PyTorch tensor is which parameter here: applies a family's table, for both directions.

A table pairs modules, see `porting.families`; what kind a module is decides how its arrays are
paired and how their layouts differ.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable

import numpy as np

from gcnet_jax.porting.families.rules import Family, Rule

Layout = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a module.

    Attributes:
      ours: Collection and name here, such as 'params/kernel'.
      theirs: Its name there, such as 'weight'.
      to_ours, to_theirs: The changes of layout, inverse to each other.
    """

    ours: str
    theirs: str
    to_ours: Layout = np.asarray
    to_theirs: Layout = np.asarray


_BIAS = Leaf('params/bias', 'bias')
_SCALE = Leaf('params/scale', 'weight')
KINDS: dict[str, tuple[Leaf, ...]] = {
    # [out, in, height, width] there, [height, width, in, out] here.
    'convolution': (
        Leaf(
            'params/kernel',
            'weight',
            lambda array: array.transpose(2, 3, 1, 0),
            lambda array: array.transpose(3, 2, 0, 1),
        ),
        _BIAS,
    ),
    'linear': (Leaf('params/kernel', 'weight', np.transpose, np.transpose), _BIAS),
    # A dense layer over a flattened 7x7 map: [out, channel * 7 * 7] there, [7 * 7 * channel, out].
    'linear_of_7x7': (
        Leaf(
            'params/kernel',
            'weight',
            lambda array: _channels_last(array).T,
            lambda array: _channels_first(array.T),
        ),
        _BIAS,
    ),
    # [in, out, height, width] there, [height, width, in, out] here.
    'transposed_convolution': (
        Leaf(
            'params/kernel',
            'weight',
            lambda array: array.transpose(2, 3, 0, 1),
            lambda array: array.transpose(2, 3, 0, 1),
        ),
        _BIAS,
    ),
    # A 1x1 convolution there, a dense layer here.
    'pointwise': (
        Leaf(
            'params/kernel',
            'weight',
            lambda array: _drop_last_ones(array).T,
            lambda array: array.T[:, :, None, None],
        ),
        _BIAS,
    ),
    'batch_norm': (
        _SCALE,
        _BIAS,
        Leaf('batch_stats/mean', 'running_mean'),
        Leaf('batch_stats/var', 'running_var'),
    ),
    'layer_norm': (_SCALE, _BIAS),
    # Normalised over [planes, 1, 1] there.
    'layer_norm_of_map': tuple(
        Leaf(
            leaf.ours, leaf.theirs, lambda array: _drop_last_ones(array), lambda a: a[:, None, None]
        )
        for leaf in (_SCALE, _BIAS)
    ),
}


def _drop_last_ones(array: np.ndarray) -> np.ndarray:
    # squeeze raises where the sizes are not 1, so a wrong shape is never reshaped into a right one
    return array.squeeze((-2, -1))


def _channels_last(array: np.ndarray) -> np.ndarray:
    return array.reshape(len(array), -1, 49).swapaxes(1, 2).reshape(array.shape)


def _channels_first(array: np.ndarray) -> np.ndarray:
    return array.reshape(len(array), 49, -1).swapaxes(1, 2).reshape(array.shape)


@dataclasses.dataclass(frozen=True)
class Pairing:
    """A leaf here, the tensor that it is there, and how one becomes the other."""

    ours: str
    theirs: str
    leaf: Leaf


def pair_names(
    family: Family, ours: Collection[str], prefix: str = ''
) -> tuple[list[Pairing], list[str]]:
    """Names every leaf of a network as `family` does.

    Args:
      family: Whose names.
      ours: Paths of leaves, such as 'params/stage1_0/conv1/kernel'.
      prefix: What precedes the names in the file, such as 'backbone.'.

    Returns:
      The pairings, and the paths that the family has no name for.
    """
    return pair_by_rules(family.rules('', prefix), ours)


def pair_by_rules(rules: Iterable[Rule], ours: Collection[str]) -> tuple[list[Pairing], list[str]]:
    """Does what `pair_names` does, by any table; the first rule that fits a leaf applies."""
    compiled = [(re.compile(_pattern(rule.ours)), rule) for rule in rules]
    modules = {path.split('/', 1)[1].rpartition('/')[0] for path in ours}
    pairings, nameless = [], []
    for path in ours:
        pairing = next(
            filter(None, (_apply(rule, pattern, path, modules) for pattern, rule in compiled)), None
        )
        if pairing is None:
            nameless.append(path)
        else:
            pairings.append(pairing)
    return pairings, nameless


def _apply(rule: Rule, pattern: re.Pattern, path: str, modules: set[str]) -> Pairing | None:
    collection, rest = path.split('/', 1)
    module, _, name = rest.rpartition('/')
    match = pattern.fullmatch(module)
    if match is None:
        return None
    block = '' if rule.beside.startswith('/') else f'{module.rpartition("/")[0]}/'
    if rule.beside and f'{block}{rule.beside.removeprefix("/")}' not in modules:
        return None
    numbers = {key: int(value) for key, value in match.groupdict().items()}
    theirs = re.sub(
        r'\{(\w+?)([+-]\d+)?\}', lambda m: str(numbers[m[1]] + int(m[2] or 0)), rule.theirs
    )
    for leaf in KINDS[rule.kind]:
        if leaf.ours == f'{collection}/{name}':
            return Pairing(path, f'{theirs}.{leaf.theirs}', leaf)
    return None


def _pattern(template: str) -> str:
    return re.sub(r'\{(\w+)\}', r'(?P<\1>\\d+)', template)
