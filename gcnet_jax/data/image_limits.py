"""How much work and memory an encoded image may cost, found in its header before it is decoded.

A few kilobytes can ask for gigabytes of pixels or minutes of work: a PNG of one line, a JPEG that
repeats its scans, a TIFF whose tags all point at the same bytes. `inspect` reads what each format
says about itself, refuses what exceeds the limits below, and estimates the memory for the rest.
`DECODING_MEMORY` then bounds what all threads of a process decode at the same time.
"""

import contextlib
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gcnet_jax import files
from gcnet_jax.data.memory_budget import MemoryBudget
from gcnet_jax.data.tiff_tags import TiffTags
from gcnet_jax.errors import DataError

MAX_PIXELS = 100_000_000
# Height and width: Pillow takes memory and time for each row, however short.
MAX_SIDE = 1_000_000
# Memory that one image may take while it is decoded, its file included, and that all images being
# decoded in a process may take together.
MAX_DECODING_BYTES = 800_000_000
MAX_TOTAL_DECODING_BYTES = 1_000_000_000
# Images below this do not count towards the total: their number is that of the threads.
SMALL_DECODING_BYTES = 32_000_000
MAX_FILE_BYTES = 300_000_000
LARGE_FILE_BYTES = 32_000_000
# A file may have this many bytes whatever its size in pixels (metadata, previews, further frames),
# and so many more for each pixel.
MAX_EXTRA_BYTES = 64_000_000
MAX_BYTES_PER_PIXEL = 16
# Scans of a JPEG, and pixels times scans: a progressive one usually has about ten scans.
MAX_SCANS = 100
MAX_SCAN_PIXELS = 1_000_000_000
# Segments of a JPEG, chunks of a PNG, blocks of a GIF before its first frame, strips or tiles of a
# TIFF.
MAX_PARTS = 100_000
# Values of an image that Pillow decodes in Python: text PPM, PPM of unusual depth, run-length BMP.
MAX_SLOW_VALUES = 8_000_000
MAX_SLOW_BYTES = 32_000_000
SLOW_CODECS = ('ppm_plain', 'ppm', 'bmp_rle')

DECODING_MEMORY = MemoryBudget(MAX_TOTAL_DECODING_BYTES, SMALL_DECODING_BYTES)

# Formats that are recognised only so that errors can name them.
UNREAD_BRANDS = {
    b'avif': 'AVIF', b'avis': 'AVIF', b'heic': 'HEIC', b'heix': 'HEIC', b'hevc': 'HEIC',
    b'heim': 'HEIC', b'heis': 'HEIC', b'mif1': 'HEIC', b'msf1': 'HEIC',
}  # fmt: skip
UNREAD_MAGIC = {
    b'\x00\x00\x00\x0cJXL \r\n\x87\n': 'JPEG XL',
    b'\xff\x0a': 'JPEG XL',
    b'\x00\x00\x00\x0cjP  \r\n\x87\n': 'JPEG 2000',
    b'\xff\x4f\xff\x51': 'JPEG 2000',
}
# Bytes of a file that are enough for `image_format`.
PREFIX_BYTES = 32

# A marker other than a restart; in entropy-coded data a 0xFF is followed by 0.
JPEG_MARKER = re.compile(rb'\xff[^\x00\xd0-\xd7\xff]')
JPEG_SCAN, JPEG_END, JPEG_BARE = 0xDA, 0xD9, (0x01, 0xD8)
JPEG_START_OF_SCAN = b'\xff\xda'
JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
JPEG_SEQUENTIAL = (0xC0, 0xC1, 0xC9)
# Segments that do not change the pixels: EXIF, profiles, previews, comments. APP0 (JFIF) and APP14
# (Adobe) say how the colours are stored.
JPEG_METADATA = frozenset({*range(0xE1, 0xEE), 0xEF, 0xFE})
TIFF_JPEGS = (6, 7)
PPM_COMMENTS = rb'(?:#[^\r\n]*[\r\n]\s*)*'
PPM_HEADER = re.compile(
    rb'(P[56])\s+%b(\d{1,10})\s+%b(\d{1,10})\s+%b(\d{1,5})\s' % ((PPM_COMMENTS,) * 3)
)
# Bytes for each pixel while a depth that is not usual is changed to one that is.
PPM_SCALING_BYTES = 24
BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)


class Plan(NamedTuple):
    """What the header says about decoding an image.

    Attributes:
      data: The bytes to decode: those of the file, of a JPEG without its metadata.
      size: Width and height in pixels; None where Pillow reads it without taking any memory.
      bytes_per_pixel: Memory for each pixel; None where it depends on Pillow's mode.
      more_bytes: Memory besides.
    """

    data: bytes
    size: tuple[int, int] | None = None
    bytes_per_pixel: int | None = None
    more_bytes: int = 0


def image_format(prefix: bytes) -> str | None:
    """Returns the format of a file by its first `PREFIX_BYTES`, None for what is no image.

    The formats that are read have Pillow's names (`JPEG`, `PNG`, `GIF`, `BMP`, `WEBP`, `TIFF`,
    `PPM`); `AVIF`, `HEIC`, `JPEG XL` and `JPEG 2000` are not read.
    """
    if prefix.startswith(b'\xff\xd8\xff'):
        return 'JPEG'
    if prefix.startswith(b'\x89PNG\r\n\x1a\n'):
        return 'PNG'
    if prefix.startswith((b'GIF87a', b'GIF89a')):
        return 'GIF'
    if prefix.startswith(b'RIFF') and prefix[8:12] == b'WEBP':
        return 'WEBP'
    if prefix.startswith((b'II*\0', b'MM\0*', b'II+\0', b'MM\0+')):
        return 'TIFF'
    if prefix.startswith(b'BM') and int.from_bytes(prefix[14:18], 'little') in BMP_HEADERS:
        return 'BMP'
    if re.match(rb'P[1-6fF][\s#]', prefix):
        return 'PPM'
    if prefix[4:8] == b'ftyp' and prefix[8:12] in UNREAD_BRANDS:
        return UNREAD_BRANDS[prefix[8:12]]
    return next((name for magic, name in UNREAD_MAGIC.items() if prefix.startswith(magic)), None)


@contextlib.contextmanager
def image_file(path: Path) -> Iterator[bytes]:
    """Gives the bytes of a regular file; a large one is given while no other image is decoded.

    Raises:
      DataError: If it is no regular file, or larger than any image that is read.
      OSError: If the system does not let it be read.
    """
    if not path.exists():
        raise DataError('no such file')
    if not path.is_file():  # A pipe or a device, which may never end.
        raise DataError('not a file')
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise DataError(f'{size:,} bytes are more than any image of a size that is read')
    # Nothing is known of a large file before it is read, so it gets all of the memory.
    with DECODING_MEMORY.hold(DECODING_MEMORY.total if size > LARGE_FILE_BYTES else 0):
        yield files.read_bytes(path, size, DataError)


def check_size(width: int, height: int, max_pixels: int = MAX_PIXELS) -> None:
    """Raises DataError for an image of more than `max_pixels`, or of a side above `MAX_SIDE`."""
    if width * height > max_pixels:
        raise DataError(f'image of {width}x{height} pixels, more than {max_pixels:,} are not read')
    if max(width, height) > MAX_SIDE:
        raise DataError(
            f'image of {width}x{height} pixels, sides longer than {MAX_SIDE:,} are not read'
        )


def check_costs(plan: Plan, size: tuple[int, int], mode: str, codec: str) -> int:
    """Returns the estimated memory in bytes for decoding an image.

    Args:
      plan: What `inspect` found.
      size: Width and height in pixels.
      mode: Pillow's name for the kind of pixels.
      codec: Pillow's name for the decoder of the pixels.

    Raises:
      DataError: If the image takes more memory, or its file more bytes, than is allowed.
    """
    (width, height), length = size, len(plan.data)
    pixels = width * height
    if length > MAX_EXTRA_BYTES + MAX_BYTES_PER_PIXEL * pixels:
        raise DataError(
            f'{length:,} bytes are too many for an image of {width}x{height} pixels; at most '
            f'{MAX_EXTRA_BYTES:,} and {MAX_BYTES_PER_PIXEL} for each pixel are read'
        )
    values = pixels * (3 if mode == 'RGB' else 1)
    if codec in SLOW_CODECS and (values > MAX_SLOW_VALUES or length > MAX_SLOW_BYTES):
        raise DataError(
            f'image of {width}x{height} pixels in a slow form (text, run-length, or of unusual '
            f'depth), of which at most {MAX_SLOW_VALUES:,} values in {MAX_SLOW_BYTES:,} bytes are '
            'read; save it as PNG'
        )
    # The image in RGB (4 bytes), an array of it (3), and the pixels as stored if they are others.
    return _check_memory(plan, size, plan.bytes_per_pixel or (7 if mode == 'RGB' else 16))


def _check_memory(plan: Plan, size: tuple[int, int], bytes_per_pixel: int) -> int:
    width, height = size
    needed = 2 * len(plan.data) + bytes_per_pixel * width * height + plan.more_bytes
    if needed > MAX_DECODING_BYTES:
        raise DataError(
            f'image of {width}x{height} pixels would take about {needed:,} bytes to decode; at '
            f'most {MAX_DECODING_BYTES:,} are used: make it smaller'
        )
    return needed


def inspect(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> Plan:
    """Reads the header of an image of a known format as far as decoding it could cost too much.

    Args:
      data: The file.
      name: Its format, one that is read.
      max_pixels: More are refused.

    Raises:
      DataError: If a limit of this module is exceeded.
    """
    if len(data) > MAX_FILE_BYTES:
        raise DataError(f'{len(data):,} bytes are more than any image of a size that is read')
    try:
        plan = INSPECTORS.get(name, Plan)(data)
    except (IndexError, struct.error) as error:
        raise DataError(f'damaged {name} image: its header is cut off') from error
    if plan.size is not None:
        check_size(*plan.size, max_pixels)
        _check_memory(plan, plan.size, plan.bytes_per_pixel or 0)
    return plan


def _inspect_png(data: bytes) -> Plan:
    size = struct.unpack_from('>II', data, 16)
    place, chunks, headers = 8, 0, 0
    while place + 8 <= len(data):
        headers += data[place + 4 : place + 8] == b'IHDR'
        place += 12 + int.from_bytes(data[place : place + 4])
        chunks += 1
        _check_parts(chunks, 'chunks')
    if headers != 1 or data[12:16] != b'IHDR':
        raise DataError('damaged PNG image: it does not begin with its only header')
    # Opening an animation may already fill a frame with the background.
    return Plan(data, size, 20 if b'acTL' in data else None)


def _inspect_gif(data: bytes) -> Plan:
    width, height, flags = struct.unpack_from('<HHB', data, 6)
    place, blocks = 13 + _gif_palette(flags), 0
    while data[place] == 0x21:  # Extensions; Pillow goes through them one by one, too.
        place += 2
        while data[place]:
            place += 1 + data[place]
            blocks += 1
            _check_parts(blocks, 'blocks')
        place += 1
    if data[place] == 0x2C:
        left, top, frame_width, frame_height = struct.unpack_from('<4H', data, place + 1)
        # Pillow makes the image as large as its first frame.
        width, height = max(width, left + frame_width), max(height, top + frame_height)
    return Plan(data, (width, height), 16)


def _gif_palette(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _inspect_webp(data: bytes) -> Plan:
    kind = data[12:16]
    if kind == b'VP8X':
        width, height = (
            1 + int.from_bytes(data[place : place + 3], 'little') for place in (24, 27)
        )
    elif kind == b'VP8L':
        (bits,) = struct.unpack_from('<I', data, 21)
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    else:
        width, height = (side & 0x3FFF for side in struct.unpack_from('<HH', data, 26))
    # Two canvases, the decoder's own pixels, their bytes, and the image in RGBA and in RGB.
    return Plan(data, (width, height), 24)


def _inspect_jpeg(data: bytes) -> Plan:
    """Counts the scans and takes the metadata out, which Pillow would read and nobody needs."""
    kept, kept_from, scans = [], 0, 0
    size, components, sequential = None, 3, True
    for kind, start, place, end in jpeg_segments(data):
        if kind in JPEG_FRAMES:
            height, width, components = struct.unpack_from('>HHB', data, place + 3)
            size, sequential = (width, height), kind in JPEG_SEQUENTIAL
        elif kind == JPEG_SCAN:
            scans += 1
            _check_scans(scans, size or (0, 0))
        elif kind in JPEG_METADATA and not scans:
            kept.append(data[kept_from:start])
            kept_from = end
    if kept:
        data = b''.join((*kept, data[kept_from:]))
    each = 7 if components == 3 else 12
    if scans > 1 or not sequential:  # All coefficients are kept until the last scan.
        each = max(each, 4 + 2 * components)
    return Plan(data, size, each)


def count_scans(data: bytes, size: tuple[int, int]) -> int:
    """Returns the number of scans of a JPEG.

    Raises:
      DataError: If it has more than `MAX_SCANS`, or too many for its width and height in pixels.
    """
    scans = 0
    for kind, *_ in jpeg_segments(data):
        if kind == JPEG_SCAN:
            scans += 1
            _check_scans(scans, size)
    return scans


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Yields the kind of each segment, where its marker, its length and what follows it stand."""
    place, segments = 2, 0
    while found := JPEG_MARKER.search(data, place):
        kind, place = data[found.start() + 1], found.end()
        segments += 1
        _check_parts(segments, 'segments')
        if kind == JPEG_END:
            return
        if kind in JPEG_BARE:
            continue
        end = place + max(int.from_bytes(data[place : place + 2]), 2)
        yield kind, found.start(), place, end
        place = end


def _check_scans(scans: int, size: tuple[int, int]) -> None:
    width, height = size
    if scans > MAX_SCANS:
        raise DataError(f'JPEG image of more than {MAX_SCANS} scans; save it afresh')
    if scans * width * height > MAX_SCAN_PIXELS:
        raise DataError(
            f'JPEG image of {width}x{height} pixels in {scans} scans or more; pixels times scans '
            f'are at most {MAX_SCAN_PIXELS:,}: save it afresh, as a baseline JPEG'
        )


def _inspect_tiff(data: bytes) -> Plan:
    tags = TiffTags(data, MAX_PARTS, MAX_EXTRA_BYTES + len(data))
    width, height = tags.first(256, 0), tags.first(257, 0)
    check_size(width, height)
    tiled = 324 in tags.fields
    offsets, counts = (324, 325) if tiled else (273, 279)
    parts = tags.fields[offsets][1] if offsets in tags.fields else 0
    _check_parts(parts, 'tiles' if tiled else 'strips')
    if tiled:
        part_width, part_height = tags.first(322, 0), tags.first(323, 0)
    else:
        part_width, part_height = width, min(tags.first(278, height), height)
    check_size(part_width, part_height)
    if (stored := sum(tags.integers(counts))) > len(data) and tags.first(259, 1) != 1:
        raise DataError(f'TIFF image whose parts overlap: {stored:,} bytes of {len(data):,}')
    part_pixels = part_width * part_height
    if tags.first(259, 1) in TIFF_JPEGS:
        scans = data.count(JPEG_START_OF_SCAN)
        if scans > max(MAX_SCANS, 4 * parts) or scans * part_pixels > MAX_SCAN_PIXELS:
            raise DataError(f'TIFF image of JPEGs with {scans:,} scans; save it afresh')
    bits = max(tags.integers(258), default=1) * tags.first(277, 1)
    return Plan(data, (width, height), 16, part_pixels * bits // 4)


def _inspect_ppm(data: bytes) -> Plan:
    if data[:2] in (b'P1', b'P2', b'P3') and len(data) <= MAX_SLOW_BYTES:
        # Pillow copies everything that follows for each comment.
        data = re.sub(rb'#[^\r\n]*[\r\n]?', b'', data)
    elif header := PPM_HEADER.match(data):
        width, height, highest = map(int, header.group(2, 3, 4))
        check_size(width, height)
        needed = PPM_SCALING_BYTES * width * height
        # Pillow reads these depths at once, and others value by value in Python.
        usual = highest == 255 or (highest == 65_535 and data[1:2] == b'5')
        if not usual and 0 < highest < 65_536 and needed < MAX_DECODING_BYTES:
            with DECODING_MEMORY.hold(needed):
                data = _usual_depth(data, header)
            return Plan(data, (width, height), PPM_SCALING_BYTES)
    return Plan(data)


def _usual_depth(data: bytes, header: re.Match) -> bytes:
    """Scales a binary PPM or PGM to the full range of 8 or 16 bits, as Pillow would."""
    kind, width, height, highest = header.group(1, 2, 3, 4)
    count = int(width) * int(height) * (3 if kind == b'P6' else 1)
    stored = np.dtype('>u2' if int(highest) > 255 else 'u1')
    made = np.dtype('>u2' if kind == b'P5' and stored.itemsize == 2 else 'u1')
    count = min(count, (len(data) - header.end()) // stored.itemsize)
    top = np.iinfo(made).max
    table = np.rint(np.arange(np.iinfo(stored).max + 1) / int(highest) * top)
    values = np.minimum(table, top).astype(made)[np.frombuffer(data, stored, count, header.end())]
    return b'%s %s %s %d ' % (kind, width, height, top) + values.tobytes()


def _check_parts(count: int, kind: str) -> None:
    if count > MAX_PARTS:
        raise DataError(f'image of more than {MAX_PARTS:,} {kind}; save it afresh')


INSPECTORS = {
    'JPEG': _inspect_jpeg,
    'PNG': _inspect_png,
    'GIF': _inspect_gif,
    'WEBP': _inspect_webp,
    'TIFF': _inspect_tiff,
    'PPM': _inspect_ppm,
}
