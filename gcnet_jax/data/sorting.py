"""TFDS's sorting of sets of more than a gigabyte, without TensorFlow.

TFDS sorts the records of a set by their keys. Beyond a gigabyte it puts them into a thousand files
first, which it writes through TensorFlow. Here they are ordinary files.
"""

import contextlib
import struct
from collections.abc import Iterator
from pathlib import Path

from tensorflow_datasets.core import shuffle

# A key's high and low 64 bits, and the length of its record.
HEADER = struct.Struct('<QQQ')
LOW_BITS = 2**64 - 1


class Bucket:
    """The records whose keys begin alike, in a file; takes the place of TFDS's `_Bucket`.

    The file is open only while it is written to: a thousand open files are more than most systems
    allow.
    """

    def __init__(self, path: object) -> None:
        self._path = Path(str(path))
        self._length = 0
        self.size = 0

    def __len__(self) -> int:
        return self._length

    def add(self, key: int, data: bytes) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, 'ab') as file:
            file.write(HEADER.pack(key >> 64, key & LOW_BITS, len(data)) + data)
        self._length += 1
        self.size += len(data)

    def read_values(self) -> Iterator[tuple[int, bytes]]:
        if not self._length:
            return
        with open(self._path, 'rb') as file:
            while header := file.read(HEADER.size):
                high, low, length = HEADER.unpack(header)
                yield high << 64 | low, file.read(length)

    def del_file(self) -> None:
        self._path.unlink(missing_ok=True)


@contextlib.contextmanager
def sorted_in_files() -> Iterator[None]:
    """Lets TFDS sort sets of any size without TensorFlow, until the block ends."""
    before = shuffle._Bucket
    shuffle._Bucket = Bucket
    try:
        yield
    finally:
        shuffle._Bucket = before
