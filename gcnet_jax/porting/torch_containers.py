"""The two forms of a PyTorch file: a zip archive, and the plain pickles of torch before 1.6.

Both give the contents of the pickle and the place of every storage. The archive's checksums are
compared when it is opened; the older form has none.
"""

import dataclasses
import os
import struct
import zipfile
import zlib
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from gcnet_jax.errors import CheckpointError, one_line
from gcnet_jax.porting.pickled_values import DamagedPickle, TooLarge
from gcnet_jax.porting.pickles import MAX_PICKLE_BYTES, Contents, read_pickle

# Limits of what is read.
MAX_DIRECTORY_BYTES = 16 * 2**20
MAX_RECORDS = 100_000

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LOCAL_HEADER = struct.Struct('<4s5H3L2H')


@dataclasses.dataclass(frozen=True)
class Container:
    """What a PyTorch file holds.

    Attributes:
      contents: Of its pickle.
      places: Where in the file the values of each storage begin, in bytes.
    """

    contents: Contents
    places: dict[str, int]


def read_container(path: Path) -> Container:
    """Reads the pickle of a PyTorch file, checks its checksums and finds its storages.

    Raises:
      CheckpointError: Not a file of torch.save, or one that is larger than what is read.
      DamagedPickle: It is damaged; says where.
    """
    with path.open('rb') as file:
        size = os.fstat(file.fileno()).st_size
        if file.read(4) == b'PK\x03\x04':
            return _read_archive(path, file, size)
        return _read_legacy(path, file, size)


# Zip archives -------------------------------------------------------------------------------------


class _Directory:
    """A file that refuses to read a directory of archive members larger than the limit."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.seekable, self.seek, self.tell = file.seekable, file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        more = MAX_DIRECTORY_BYTES + 1
        data = self._file.read(more if size < 0 else min(size, more))
        if len(data) == more:
            raise TooLarge(f"at most {MAX_DIRECTORY_BYTES:,} bytes of a zip's directory are read")
        return data


def _read_archive(path: Path, file: BinaryIO, size: int) -> Container:
    try:
        with zipfile.ZipFile(_Directory(file)) as archive:
            return _read_members(path, file, archive, size)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise DamagedPickle(f'its zip: {error}') from None
    except (ValueError, struct.error, EOFError, OverflowError, KeyError, OSError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise DamagedPickle(f'its zip: {error or type(error).__name__}') from None


def _read_members(path: Path, file: BinaryIO, archive: zipfile.ZipFile, size: int) -> Container:
    members = sorted(archive.infolist(), key=lambda member: member.header_offset)
    if len(members) > MAX_RECORDS:
        raise TooLarge(f'its zip has {len(members):,} records; at most {MAX_RECORDS:,} are read')
    names = {member.filename for member in members}
    if len(names) < len(members):
        raise DamagedPickle('its zip has one record twice')
    roots = [name.removesuffix('data.pkl') for name in names if name.endswith('/data.pkl')]
    if len(roots) != 1:
        raise CheckpointError(
            f'{one_line(path)} is a zip archive, but not one that torch.save wrote; save '
            'model.state_dict() with it'
        )
    root = roots[0]
    if f'{root}constants.pkl' in names or any(name.startswith(f'{root}code/') for name in names):
        raise CheckpointError(
            f'{one_line(path)} is a TorchScript program, not a state dict; '
            'save model.state_dict() instead'
        )
    ends = [member.header_offset for member in members[1:]] + [size]
    starts = {
        member.filename: _start_of(file, member, end)
        for member, end in zip(members, ends, strict=True)
    }
    for member in members:
        _check_sum(archive, member)
    if f'{root}byteorder' in names and _read(archive, f'{root}byteorder', 16) != b'little':
        raise DamagedPickle('its numbers are big-endian, which are not read')
    contents = read_pickle(BytesIO(_read(archive, f'{root}data.pkl', MAX_PICKLE_BYTES)))
    places = {}
    for key, storage in contents.storages.items():
        record = f'{root}data/{key}'
        if record not in names:
            raise DamagedPickle(f'the record data/{key} is missing')
        if archive.getinfo(record).file_size != storage.bytes:
            raise DamagedPickle(
                f'the record data/{key} has {archive.getinfo(record).file_size:,} bytes, and its '
                f'tensors have {storage.bytes:,}'
            )
        places[key] = starts[record]
    return Container(contents, places)


def _start_of(file: BinaryIO, member: zipfile.ZipInfo, end: int) -> int:
    """Where a record's bytes begin, once its two headers are seen to agree."""
    name = one_line(member.filename, 60)
    if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
        raise DamagedPickle(f'the record {name} is compressed, which torch.save does not do')
    file.seek(member.header_offset)
    fields = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    signature, _, flags, method, _, _, checksum, stored, full, name_size, extra_size = fields
    start = file.tell() + name_size + extra_size
    if signature != b'PK\x03\x04' or flags & 1 or method != zipfile.ZIP_STORED:
        raise DamagedPickle(f'the record {name} has another header than the directory')
    if start + member.file_size > end:
        raise DamagedPickle(f'the record {name} reaches into the next or beyond the end')
    file.seek(name_size, os.SEEK_CUR)
    sizes = {stored, full}
    if 0xFFFFFFFF in sizes:
        sizes = _long_sizes(file.read(extra_size)) or sizes
    # Bit 3: they stand behind the record instead.
    is_known = not flags & 8
    if is_known and (sizes != {member.file_size} or checksum != member.CRC):
        raise DamagedPickle(f'the record {name} has another size or checksum than the directory')
    return start


def _long_sizes(extra: bytes) -> set[int]:
    """The sizes in a zip64 field."""
    while len(extra) >= 4:
        kind, size = struct.unpack('<HH', extra[:4])
        if kind == 1 and size >= 16:
            return set(struct.unpack('<QQ', extra[4:20]))
        extra = extra[4 + size :]
    return set()


def _check_sum(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    with archive.open(member) as record:
        try:
            while record.read(2**20):
                pass
        except zipfile.BadZipFile:
            raise DamagedPickle(
                f'the checksum of the record {one_line(member.filename, 60)} is wrong'
            ) from None


def _read(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    if archive.getinfo(name).file_size > limit:
        raise TooLarge(
            f'{one_line(name, 60)} in it has {archive.getinfo(name).file_size:,} bytes; '
            f'at most {limit:,} are read'
        )
    with archive.open(name) as record:
        return b''.join(iter(lambda: record.read(2**20), b''))


# The older form -----------------------------------------------------------------------------------


def _read_legacy(path: Path, file: BinaryIO, size: int) -> Container:
    file.seek(0)
    data = BytesIO(file.read(MAX_PICKLE_BYTES))
    if read_pickle(data).value != _LEGACY_MAGIC:
        raise CheckpointError(
            f'{one_line(path)} is a pickle that torch.save did not write; save '
            'model.state_dict() with it (pip install torch, where that is missing)'
        )
    version, system, contents, keys = (read_pickle(data) for _ in range(4))
    if version.value != 1001 or not isinstance(system.value, dict):
        raise DamagedPickle('its first pickles are of no known version')
    if system.value.get('little_endian') is not True:
        raise DamagedPickle('its numbers are big-endian, which are not read')
    if not isinstance(keys.value, list) or len(keys.value) > MAX_RECORDS:
        raise DamagedPickle('it has no list of storages')
    places, place = {}, keys.end
    for key in keys.value:
        storage = contents.storages.get(key) if isinstance(key, str) else None
        if storage is None or key in places:
            raise DamagedPickle('its list of storages is not that of its tensors')
        file.seek(place)
        (count,) = struct.unpack('<q', file.read(8).ljust(8, b'\0'))
        if count != storage.size or place + 8 + storage.bytes > size:
            raise DamagedPickle(f'the storage {one_line(key, 60)} has another size, or is cut off')
        places[key] = place + 8
        place += 8 + storage.bytes
    if contents.storages.keys() != places.keys():
        raise DamagedPickle('storages are missing')
    return Container(contents, places)
