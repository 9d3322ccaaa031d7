"""Copies the plain values that a checkpoint file holds beside its tensors, within limits."""

from collections.abc import Mapping
from typing import Any

from gcnet_jax.porting.pickled_values import Record

# Limits of the metadata; what goes beyond is left out.
MAX_METADATA_DEPTH = 8
MAX_METADATA_VALUES = 20_000
MAX_METADATA_TEXT = 2_000_000


def plain_values(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Returns the strings, numbers, lists and dictionaries among values, to any depth.

    The fields of an object, such as argparse.Namespace, become a dictionary; tensors, arrays and
    what lies beyond the limits above are left out. Tuples become lists.
    """
    return _Plain().mapping(values, 0)


_LEFT_OUT = object()


class _Plain:
    """Copies values while the limits last; a value that holds itself ends at the depth's."""

    def __init__(self):
        self.values, self.text = MAX_METADATA_VALUES, MAX_METADATA_TEXT

    def copy(self, value: Any, depth: int) -> Any:
        self.values -= 1
        if self.values < 0 or depth > MAX_METADATA_DEPTH:
            return _LEFT_OUT
        if value is None or type(value) in (bool, float):
            return value
        if type(value) is int:
            return value if abs(value) < 2**64 else _LEFT_OUT
        if isinstance(value, str):
            self.text -= len(value)
            return value if self.text >= 0 else _LEFT_OUT
        if isinstance(value, Record):
            return self.mapping(value.fields, depth) or _LEFT_OUT
        if isinstance(value, dict):
            copied = self.mapping(value, depth)
            return copied if copied or not value else _LEFT_OUT
        if isinstance(value, (list, tuple)):
            return self.sequence(value, depth)
        return _LEFT_OUT

    def mapping(self, values: Mapping[Any, Any], depth: int) -> dict[str, Any]:
        made = {}
        for key, value in values.items():
            if self.values < 0:
                break
            if isinstance(key, (str, int)) and len(str(key)) <= 1000:
                copied = self.copy(value, depth + 1)
                if copied is not _LEFT_OUT:
                    made[str(key)] = copied
        return made

    def sequence(self, values: list[Any] | tuple[Any, ...], depth: int) -> Any:
        """A list that would have gaps is left out as a whole."""
        if len(values) > self.values:
            return _LEFT_OUT
        made = []
        for value in values:
            copied = self.copy(value, depth + 1)
            if copied is _LEFT_OUT:
                return _LEFT_OUT
            made.append(copied)
        return made
