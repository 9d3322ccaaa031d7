"""The size of an image, as settings and functions take it: one number, or height and width."""

# Height and width in pixels: one number for a square.
Size = int | tuple[int, int]


def height_and_width(size: Size) -> tuple[int, int]:
    """Returns a size as height and width in pixels."""
    return (size, size) if isinstance(size, int) else size
