"""Which parameters are trained, by patterns over their paths, and how deep each of them lies."""

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from gcnet_jax.errors import ConfigError

_BLOCK = re.compile(r'stage(\d+)_(\d+)$')
_HEAD = re.compile(r'(head|classifier)(_|$)')


def parse_patterns(setting: Any) -> tuple[str, ...]:
    """Returns the patterns of `config.optimizer.frozen`: a sequence, or one string with commas."""
    if setting is None:
        return ()
    if isinstance(setting, str):
        setting = setting.split(',')
    return tuple(pattern.strip() for pattern in setting if pattern.strip())


def frozen_paths(params: Mapping[str, Any], patterns: Sequence[str]) -> frozenset[str]:
    """Returns the paths of the parameters that the patterns freeze.

    A pattern is a glob over paths such as `stage1_0/conv1/kernel`, where `*` also matches `/`. One
    that matches a module freezes everything below it. A pattern that starts with `!` keeps what it
    matches trainable. Where several match, the last one decides, so `('*', '!classifier')` trains
    the classifier alone.

    Args:
      params: Nested parameters; only the paths are read.
      patterns: As returned by `parse_patterns`.

    Raises:
      ConfigError: A pattern matches nothing, or nothing is left to train.
    """
    if not patterns:
        return frozenset()
    paths = ['/'.join(path) for path in flatten_dict(dict(params))]
    frozen = set()
    for pattern in patterns:
        glob = pattern.removeprefix('!')
        matched = {path for path in paths if _matches(path, glob)}
        if not matched:
            modules = sorted({path.split('/')[0] for path in paths}, key=_natural)
            raise ConfigError(
                f'config.optimizer.frozen has the pattern {pattern!r}, which matches no parameter; '
                f'the modules are {", ".join(modules)}, and a parameter has a path such as '
                f'{max(paths, key=lambda path: path.count("/"))}'
            )
        frozen = frozen - matched if pattern.startswith('!') else frozen | matched
    if paths and len(frozen) == len(paths):
        raise ConfigError(
            f'config.optimizer.frozen={",".join(patterns)!r} freezes every parameter; leave some '
            f"to train, for example with the further pattern '!{_last_layer(params)}'"
        )
    return frozenset(frozen)


def _last_layer(params: Mapping[str, Any]) -> str:
    return next(name for name in ('head', 'box_head_0', 'classifier', *params) if name in params)


def _matches(path: str, glob: str) -> bool:
    parts = path.split('/')
    return any(
        fnmatch.fnmatchcase('/'.join(parts[:length]), glob) for length in range(1, len(parts) + 1)
    )


def _natural(name: str) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r'(\d+)', name)]


def split(tree: Mapping[str, Any], chosen: Iterable[str]) -> tuple[dict, dict]:
    """Splits nested dicts into the leaves that are not among `chosen` and those that are."""
    chosen = frozenset(chosen)
    if not chosen:
        return dict(tree), {}
    rest, taken = {}, {}
    for path, leaf in flatten_dict(dict(tree)).items():
        (taken if '/'.join(path) in chosen else rest)[path] = leaf
    return unflatten_dict(rest), unflatten_dict(taken)


def merge(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict:
    """Puts the two parts that `split` returns together again."""
    if not second:
        return dict(first)
    return unflatten_dict({**flatten_dict(dict(first)), **flatten_dict(dict(second))})


def is_frozen_module(path: Sequence[str], params: Mapping[str, Any], frozen: frozenset) -> bool:
    """Whether every parameter of a module is frozen.

    Args:
      path: Names of the modules down to this one. A module that has no parameters counts with the
        nearest one around it that does.
      params: All parameters, nested.
      frozen: As returned by `frozen_paths`.
    """
    below = params
    path = list(path)
    for place, name in enumerate(path):
        if name not in below:
            path = path[:place]
            break
        below = below[name]
    names = ['/'.join([*path, *rest]) for rest in flatten_dict(dict(below))]
    return all(name in frozen for name in names)


def frozen_statistics(
    batch_stats: Mapping[str, Any], params: Mapping[str, Any], frozen: frozenset
) -> frozenset[str]:
    """Returns the paths of the running statistics that belong to frozen modules."""
    return frozenset(
        '/'.join(path)
        for path in flatten_dict(dict(batch_stats))
        if frozen and is_frozen_module(path[:-1], params, frozen)
    )


def evaluate_frozen(params: Mapping[str, Any], frozen: frozenset) -> Callable:
    """Returns a method interceptor that runs frozen modules with `train=False`.

    Their norms use the running statistics and leave them unchanged, and they drop nothing.
    """

    def intercept(method, arguments, keywords, context):
        if keywords.get('train') and is_frozen_module(context.module.path, params, frozen):
            keywords = {**keywords, 'train': False}
        return method(*arguments, **keywords)

    return intercept


def layer_distances(params: Mapping[str, Any]) -> dict[str, int]:
    """Returns how many layers below the classifier each module lies, by its path.

    Modules are those at the top, and those in a `backbone`. The classifier and the convolution and
    norm in front of it (`head_*`), and everything beside a backbone, have distance 0, the last
    residual block 1, the block before it 2, and so on; the stem, and every other name, comes below
    all blocks.
    """
    if 'backbone' in params:
        below = {f'backbone/{name}': d for name, d in layer_distances(params['backbone']).items()}
        others = params.keys() - {'backbone'}
        return below | dict.fromkeys(sorted(others), 0)
    blocks = {name: _BLOCK.match(name) for name in params}
    order = sorted((int(found[1]), int(found[2]), name) for name, found in blocks.items() if found)
    distances = {name: len(order) - place for place, (_, _, name) in enumerate(order)}
    for name in params:
        if name not in distances:
            distances[name] = 0 if _HEAD.match(name) else len(order) + 1
    return distances
