"""The size of an image, as settings and functions take it: one number, or height and width."""

from typing import Any

# Height and width in pixels: one number for a square.
Size = int | tuple[int, int]


def height_and_width(size: Size) -> tuple[int, int]:
    """Returns a size as height and width in pixels."""
    return (size, size) if isinstance(size, int) else size


def format_size(size: Size) -> str:
    """Returns a size in words: '224', or '96x160' (height first)."""
    return str(size) if isinstance(size, int) else 'x'.join(map(str, size))


def plain_size(size: Any) -> Any:
    """Returns a size that comes from a config, where a pair that was stored is a list."""
    return tuple(size) if isinstance(size, (tuple, list)) else size
