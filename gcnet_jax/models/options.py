"""Checks of a network's options: their types, from the module's annotations, and their ranges.

Options come from configs, from the command line and from checkpoints of strangers. What passes
here builds a network that can be traced in seconds; everything else is one clear error.
"""

import dataclasses
import numbers
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn

from gcnet_jax.errors import ConfigError, one_line, unknown_name

# More than any published network has: ResNet-1202 has 600 blocks, and widths end at some thousands.
MAX_BLOCKS = 1000
MAX_STAGES = 16
MAX_WIDTH = 16_384
MAX_CLASSES = 1_000_000
MAX_WINDOW = 4096


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_real and abs(value) <= sys.float_info.max  # False for a NaN too.


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


# What an annotation accepts, and its name in errors. Other annotations are checked by whoever reads
# the option.
_TYPES: dict[Any, tuple[Callable[[Any], bool], str]] = {
    bool: (lambda value: isinstance(value, bool), 'True or False'),
    int: (_is_whole, 'a whole number'),
    float: (_is_number, 'a finite number'),
    str: (lambda value: isinstance(value, str), 'a string'),
    int | None: (lambda value: value is None or _is_whole(value), 'a whole number or None'),
    float | None: (lambda value: value is None or _is_number(value), 'a finite number or None'),
    Sequence[int]: (
        lambda value: _is_list(value) and all(map(_is_whole, value)),
        'a list of whole numbers',
    ),
}


def _between(low: int, high: int) -> tuple[Callable[[Any], bool], str]:
    return lambda value: low <= value <= high, f'from {low} to {high:,}'


def _none_or_between(low: int, high: int) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value is None or low <= value <= high, f'None, or from {low} to {high:,}'


def _each_between(low: int, high: int) -> tuple[Callable[[Any], bool], str]:
    return (
        lambda value: 0 < len(value) <= MAX_STAGES and all(low <= item <= high for item in value),
        f'1 to {MAX_STAGES} numbers from {low} to {high:,}',
    )


_RATE = (lambda value: 0 <= value < 1), 'in [0, 1)'
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    'num_classes': (
        lambda value: 0 <= value <= MAX_CLASSES,
        f'0 (pooled features) or more, at most {MAX_CLASSES:,}',
    ),
    'stage_sizes': (
        lambda value: 0 < len(value) <= MAX_STAGES and min(value) > 0 and sum(value) <= MAX_BLOCKS,
        f'1 to {MAX_STAGES} numbers from 1, at most {MAX_BLOCKS:,} blocks in all',
    ),
    'widths': _each_between(1, MAX_WIDTH),
    'stem_widths': _each_between(1, MAX_WIDTH),
    'stem_width': _between(1, MAX_WIDTH),
    'head_width': _between(0, MAX_WIDTH),
    'groups': _between(1, MAX_WIDTH),
    'base_width': _between(1, MAX_WIDTH),
    'channels': _between(1, MAX_WIDTH),
    'box_channels': _between(1, MAX_WIDTH),
    'auxiliary_channels': _between(0, MAX_WIDTH),
    'window': _none_or_between(1, MAX_WINDOW),
    'window_stride': _none_or_between(1, MAX_WINDOW),
    'group_size': _between(0, MAX_WIDTH),
    'hidden_channels': (
        lambda value: value is None or 1 <= value <= MAX_WIDTH,
        f'from 1 to {MAX_WIDTH:,}',
    ),
    'output_stride': (lambda value: value in (None, 4, 8, 16, 32), '4, 8, 16, 32 or None'),
    'norm_epsilon': (lambda value: 0 < value < 1, 'in (0, 1)'),
    'context_ratio': (lambda value: value is None or 0 < value <= 1, 'None, or in (0, 1]'),
    'dropout_rate': _RATE,
    'stochastic_depth_rate': _RATE,
}


def check_options(kind: str, module: type[nn.Module], options: Mapping[str, Any]) -> None:
    """Refuses options of a module that are unknown, of another type, or out of range.

    Args:
      kind: What is configured, for errors: a network's or a block's name.
      module: Its class.
      options: By the name of the attribute.

    Raises:
      ConfigError: Names the option, its value and what it may be.
    """
    known = module_options(module)
    for option, value in options.items():
        if option not in known:
            raise ConfigError(unknown_name(f'option of {kind}', option, known))
        for accepts, wanted in (
            _TYPES.get(known[option], _ANYTHING),
            _RANGES.get(option, _ANYTHING),
        ):
            if not accepts(value):
                raise ConfigError(
                    f'{kind}: {option} must be {wanted}, got {one_line(repr(value), 80)}'
                )


_ANYTHING = (lambda value: True), 'anything'


def module_options(module: type[nn.Module]) -> dict[str, Any]:
    """Returns the attributes that a module class is configured by, with their annotations."""
    hints = typing.get_type_hints(module)
    names = (field.name for field in dataclasses.fields(module) if field.init)
    return {name: hints[name] for name in names if name not in ('parent', 'name')}
