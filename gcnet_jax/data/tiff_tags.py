"""The tags of a TIFF, read without Pillow, which would load all of their values."""

import struct

import numpy as np

from gcnet_jax.errors import DataError

# Bytes per value and numpy's integer type, by the number of the TIFF type.
SIZES = {
    **{1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4},
    **{16: 8, 17: 8, 18: 8},
}
INTEGERS = {1: 'u1', 3: 'u2', 4: 'u4', 16: 'u8'}


class TiffTags:
    """The tags of the first image of a TIFF, whose values are read when they are asked for.

    Args:
      data: The file.
      max_tags: More are refused.
      max_bytes: Limit on all values together; more are refused.

    Attributes:
      fields: The type of each tag, the number of its values, and their offset in the data.

    Raises:
      DataError: If there are too many, one is there twice, or their values are too large.
      struct.error: If the file ends before they do.
    """

    def __init__(self, data: bytes, max_tags: int, max_bytes: int) -> None:
        self.data = data
        self.fields: dict[int, tuple[int, int, int]] = {}
        self.order = '<' if data.startswith(b'II') else '>'
        big = struct.unpack_from(f'{self.order}H', data, 2)[0] == 43
        (place,) = struct.unpack_from(f'{self.order}{"Q" if big else "I"}', data, 8 if big else 4)
        (count,) = struct.unpack_from(f'{self.order}{"Q" if big else "H"}', data, place)
        if count > max_tags:
            raise DataError(f'damaged TIFF image: it has {count:,} tags')
        place, entry, room = place + (8 if big else 2), 20 if big else 12, 8 if big else 4
        total = 0
        for start in range(place, min(place + entry * count, len(data) - entry + 1), entry):
            tag, kind = struct.unpack_from(f'{self.order}HH', data, start)
            word = 'Q' if big else 'I'
            number, value = struct.unpack_from(f'{self.order}{word}{word}', data, start + 4)
            size = number * SIZES.get(kind, 0)
            total += size if size > room else 0
            if tag in self.fields:
                raise DataError(f'damaged TIFF image: it has the tag {tag} twice')
            self.fields[tag] = kind, number, value if size > room else start + entry - room
        # Pillow keeps the bytes of every tag, so tags that share them would multiply them.
        if total > max_bytes:
            raise DataError(f'damaged TIFF image: its tags take {total:,} bytes of {len(data):,}')

    def integers(self, tag: int) -> list[int]:
        """Returns the values of a tag of whole numbers; none if it is absent or of another type."""
        kind, number, place = self.fields.get(tag, (0, 0, 0))
        if kind not in INTEGERS:
            return []
        dtype = np.dtype(INTEGERS[kind]).newbyteorder(self.order)
        number = max(min(number, (len(self.data) - place) // dtype.itemsize), 0)
        return np.frombuffer(self.data, dtype, number, min(place, len(self.data))).tolist()

    def first(self, tag: int, default: int) -> int:
        """Returns the first value of a tag."""
        return next(iter(self.integers(tag)), default)
