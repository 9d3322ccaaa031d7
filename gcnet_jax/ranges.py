"""What a setting may be: a test of its value, and the words for it in an error."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple


class Range(NamedTuple):
    """The values of one setting.

    Attributes:
      allows: Whether a value is one of them.
      text: What they are, to follow 'it must be'.
    """

    allows: Callable[[Any], bool]
    text: str


def number(
    low: int | float,
    high: int | float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> Range:
    """Numbers between two bounds, which are included unless they are open."""

    def allows(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        return (value > low if open_low else value >= low) and (
            value < high if open_high else value <= high
        )

    left, right = '(' if open_low else '[', ')' if open_high or high == math.inf else ']'
    return Range(allows, f'a number in {left}{low:g}, {high:g}{right}')


def whole(low: int) -> Range:
    """Whole numbers from `low` on."""

    def allows(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= low

    return Range(allows, f'a whole number from {low}')


def choice(*values: str) -> Range:
    """One of a few strings."""
    return Range(lambda value: value in values, 'one of ' + ', '.join(map(repr, values)))


def kind(type_: type, text: str) -> Range:
    """Every value of a type."""
    return Range(lambda value: isinstance(value, type_), text)
