"""Images that are small as files and large as work, and seeded damage to ordinary ones."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def encode(image, image_format, **options):
    """Encodes a Pillow image as the bytes of a file."""
    data = io.BytesIO()
    image.save(data, image_format, **options)
    return data.getvalue()


def png_chunk(kind, data):
    """Returns a chunk of a PNG with its checksum."""
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def png(width, height, *, depth=8, colour=2, pixels=b'', more=b''):
    """A PNG that claims a size, with any bytes as its pixels and any chunks in front of them."""
    header = struct.pack('>IIBBBBB', width, height, depth, colour, 0, 0, 0)
    chunks = png_chunk(b'IHDR', header) + more + png_chunk(b'IDAT', zlib.compress(pixels, 9))
    return b'\x89PNG\r\n\x1a\n' + chunks + png_chunk(b'IEND', b'')


def repeat_last_scan(data, count):
    """Returns a JPEG with its last scan there so many times more."""
    scan = data[data.rindex(b'\xff\xda') : -2]
    return data[:-2] + scan * count + b'\xff\xd9'


def sequential_scans(data, count):
    """Returns a baseline JPEG of three colours whose first component is stored over and over."""
    place = data.rindex(b'\xff\xda')
    scan = b'\xff\xda' + struct.pack('>HBBBBBB', 8, 1, 1, 0, 0, 63, 0) + bytes(20)
    return data[:place] + scan * count + b'\xff\xd9'


def with_exif(data, tags, size):
    """Returns a JPEG whose EXIF data has so many tags, all of the same `size` bytes."""
    entries = b''.join(struct.pack('<HHII', index, 7, size, 8) for index in range(1, tags + 1))
    body = b'II*\0\x08\0\0\0' + struct.pack('<H', tags) + entries
    segments = [b'Exif\0\0' + body[at : at + 65_000] for at in range(0, len(body), 65_000)]
    marked = [b'\xff\xe1' + struct.pack('>H', len(part) + 2) + part for part in segments]
    return data[:2] + b''.join(marked) + data[2:]


def tiff(tags, data=b'', order='<'):
    """A TIFF of one directory: `{tag: (type, count, value)}`, and bytes that stand at 8."""
    head = (b'II*\0' if order == '<' else b'MM\0*') + struct.pack(f'{order}I', 8 + len(data))
    entries = b''.join(
        struct.pack(f'{order}HHII', tag, *fields) for tag, fields in sorted(tags.items())
    )
    return head + data + struct.pack(f'{order}H', len(tags)) + entries + bytes(4)


def tiff_tags(width, height, **changes):
    """The tags of a grey TIFF in one strip of deflated bytes."""
    named = {
        **{'width': 256, 'height': 257, 'bits': 258, 'compression': 259, 'photometric': 262},
        **{'offsets': 273, 'samples': 277, 'rows': 278, 'counts': 279},
        **{'tile_width': 322, 'tile_height': 323, 'tile_offsets': 324, 'tile_counts': 325},
    }
    tags = {
        **{'width': (4, 1, width), 'height': (4, 1, height), 'bits': (3, 1, 8)},
        **{'compression': (3, 1, 8), 'photometric': (3, 1, 1), 'offsets': (4, 1, 8)},
        **{'samples': (3, 1, 1), 'rows': (4, 1, height), 'counts': (4, 1, 20)},
    } | changes
    return {named[name]: fields for name, fields in tags.items() if fields}


def gif(width, height, frame=None):
    """A GIF that claims a size, and one for its first frame."""
    data = bytearray(encode(Image.new('P', (10, 10)), 'GIF'))
    data[6:10] = struct.pack('<HH', width, height)
    if frame:
        place = data.index(b'\x2c', 13 + (3 << ((data[10] & 7) + 1)))
        data[place + 5 : place + 9] = struct.pack('<HH', *frame)
    return bytes(data)


def webp(width, height):
    """A WebP whose canvas claims a size."""
    size = (width - 1).to_bytes(3, 'little') + (height - 1).to_bytes(3, 'little')
    body = b'VP8X' + struct.pack('<II', 10, 0) + size
    return b'RIFF' + struct.pack('<I', len(body) + 4) + b'WEBP' + body


def whole_images(rng):
    """Ordinary images of every format that is read, in several forms each."""
    pixels = rng.integers(0, 256, (37, 53, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    grey, palette = image.convert('L'), image.quantize(16)
    frames = {'save_all': True, 'append_images': [image.rotate(90, expand=False)]}
    values = b' '.join(b'%d' % value for value in pixels[:9, :9].ravel())
    return [
        *(encode(image, 'JPEG'), encode(image, 'JPEG', progressive=True), encode(grey, 'JPEG')),
        *(encode(image.convert('CMYK'), 'JPEG'), encode(image, 'JPEG', restart_marker_blocks=2)),
        *(encode(image, 'PNG'), encode(palette, 'PNG'), encode(grey.convert('1'), 'PNG')),
        *(encode(image.convert('RGBA'), 'PNG'), encode(image, 'PNG', **frames)),
        encode(Image.fromarray(pixels[..., 0].astype(np.uint16) * 200), 'PNG'),
        *(encode(palette, 'GIF'), encode(palette, 'GIF', **frames)),
        *(encode(image, 'BMP'), encode(palette, 'BMP'), encode(grey.convert('1'), 'BMP')),
        *(encode(image, 'WEBP'), encode(image.convert('RGBA'), 'WEBP', lossless=True)),
        encode(image, 'WEBP', **frames),
        *(
            encode(image, 'TIFF', compression=compression)
            for compression in (None, 'tiff_lzw', 'tiff_adobe_deflate', 'packbits', 'jpeg')
        ),
        encode(grey.convert('1'), 'TIFF', compression='group4'),
        *(encode(image, 'PPM'), encode(grey, 'PPM'), encode(grey.convert('1'), 'PPM')),
        b'P3 9 9 255\n' + values,
        b'P2\n# a comment\n9 9\n255\n' + values,
        b'P5 9 9 1000\n' + bytes(162),
    ]


def damaged(data, rng):
    """Returns a file with some of its bytes changed, cut, repeated or overwritten by numbers."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        place = int(rng.integers(0, len(changed) if rng.random() < 0.5 else min(60, len(changed))))
        kind = rng.integers(0, 6)
        if kind == 0:
            changed[place] = rng.integers(0, 256)
        elif kind == 1:
            changed[place : place + 4] = struct.pack('>I', int(rng.integers(0, 2**32)))
        elif kind == 2:
            changed[place : place + 2] = (b'\xff\xff', b'\0\0', b'\xff\xdc')[rng.integers(0, 3)]
        elif kind == 3:
            changed = changed[: max(place, 4)]
        elif kind == 4:
            changed[place:place] = changed[place : place + int(rng.integers(1, 200))] * 20
        else:
            changed[place] ^= 1 << int(rng.integers(0, 8))
    return bytes(changed)


def bombs():
    """Files that ask for more than any image may cost, or come close to it."""
    small = encode(Image.new('RGB', (64, 64)), 'JPEG', progressive=True)
    large = encode(Image.new('RGB', (3000, 3000)), 'JPEG', progressive=True, quality=5)
    blown = zlib.compress(bytes(50_000_000), 9)
    return [
        png(1, 100_000_000),
        png(9_999, 9_999, pixels=bytes(9_999 * 29_998)),
        png(7_000, 7_000, depth=16, colour=6, pixels=bytes(7_000 * 56_001)),
        png(1_000_000, 1, pixels=bytes(3_000_001)),
        png(1, 1_000_000, pixels=bytes(4_000_000)),
        png(90, 1_000_000, pixels=bytes(271_000_000)),
        png(9, 9, pixels=bytes(9 * 28), more=png_chunk(b'zTXt', b'a\0\0' + blown) * 50),
        png(9, 9, pixels=bytes(9 * 28), more=png_chunk(b'iCCP', b'a\0\0' + blown)),
        repeat_last_scan(small, 5_000),
        repeat_last_scan(small, 80),
        repeat_last_scan(large, 80),
        sequential_scans(encode(Image.new('RGB', (64, 64)), 'JPEG'), 5_000),
        encode(Image.new('RGB', (9_990, 9_990)), 'JPEG', quality=5),
        encode(Image.new('RGB', (8_800, 8_800)), 'JPEG', quality=5, progressive=True),
        with_exif(encode(Image.new('RGB', (9, 9)), 'JPEG'), 60_000, 500_000),
        b'\xff\xd8\xff\xd8' * 1_000_000,
        webp(16_383, 16_383),
        encode(Image.new('RGBA', (5_700, 5_700), (1, 2, 3, 4)), 'WEBP', lossless=True, method=0),
        gif(65_535, 65_535),
        gif(10, 10, frame=(65_535, 65_535)),
        encode(Image.new('P', (7_000, 7_000)), 'GIF'),
        b'P3\n4000 4000\n255\n' + b'1 ' * 40_000_000,
        b'P3\n10 10\n255\n' + b'#\n' * 2_000_000 + b'1 ' * 300,
        b'P1\n2800 2800\n' + b'1' * 2800 * 2800,
        b'P5\n9000 9000\n1000\n' + bytes(2 * 9000 * 9000),
        encode(Image.new('L', (6_900, 6_900)), 'TIFF', compression='tiff_adobe_deflate'),
        tiff(tiff_tags(9, 9, tile_width=(4, 1, 60_000), tile_height=(4, 1, 60_000),
                       tile_offsets=(4, 1, 8), tile_counts=(4, 1, 20)), bytes(64)),
        tiff(dict.fromkeys(range(256, 60000), (7, 500000, 8)), bytes(500_000)),
    ]  # fmt: skip
