"""What an image may cost: refused by the header, before anything is decoded."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from gcnet_jax.data import decode, image_limits, preprocess
from gcnet_jax.data.image_limits import count_scans, image_file, image_format
from gcnet_jax.data.memory_budget import MemoryBudget
from gcnet_jax.errors import DataError
from tests.data import crafted_images as crafted

READERS = (
    decode.decode,
    decode.verify,
    lambda data: preprocess.decode_and_crop(data, 32),
    lambda data: preprocess.augment(data, np.random.default_rng(0), size=32),
)


def small_jpeg(**options):
    return crafted.encode(Image.new('RGB', (64, 64), (9, 99, 199)), 'JPEG', **options)


REFUSED = {
    'a line': (crafted.png(1, 99_999_999), 'sides longer than 1,000,000'),
    'a PNG of a huge canvas': (crafted.png(100_000, 1_001), 'more than 100,000,000'),
    'a PNG of many bytes a pixel': (
        crafted.png(9_999, 9_999, colour=6),
        'about 1,599,680,.* bytes to decode; at most 800,000,000',
    ),
    'a WebP of a huge canvas': (crafted.webp(16_383, 16_383), 'more than 100,000,000'),
    'a WebP of much memory': (crafted.webp(9_000, 9_000), 'bytes to decode'),
    'a GIF of a huge canvas': (crafted.gif(65_535, 65_535), 'more than 100,000,000'),
    'a GIF of a huge frame': (crafted.gif(10, 10, frame=(65_535, 65_535)), 'more than 100,000,000'),
    'progressive scans': (
        crafted.repeat_last_scan(small_jpeg(progressive=True), 200),
        'more than 100 scans',
    ),
    'sequential scans': (crafted.sequential_scans(small_jpeg(), 200), 'more than 100 scans'),
    'segments': (b'\xff\xd8' * 50_001 + b'\xff\xd8\xff' * 50_001, 'more than 100,000 segments'),
    'chunks': (
        crafted.png(9, 9, more=crafted.png_chunk(b'teXt', b'') * 100_001),
        'more than 100,000 chunks',
    ),
    'two headers': (
        crafted.png(9, 9, more=crafted.png(90_000, 90_000)[8:33]),
        'only header',
    ),
    'text': (b'P3 2000 2000 255 ' + b'1 ' * 100, 'slow form .* save it as PNG'),
    'a TIFF of many strips': (
        crafted.tiff(crafted.tiff_tags(9, 9, offsets=(4, 200_000, 8)), bytes(64)),
        'more than 100,000 strips',
    ),
    'a TIFF of huge tiles': (
        crafted.tiff(
            crafted.tiff_tags(
                *(9, 9),
                **{'tile_width': (4, 1, 60_000), 'tile_height': (4, 1, 60_000)},
                **{'tile_offsets': (4, 1, 8), 'tile_counts': (4, 1, 9)},
            ),
            bytes(64),
        ),
        'more than 100,000,000',
    ),
    'a TIFF of overlapping strips': (
        crafted.tiff(
            crafted.tiff_tags(9, 9, counts=(4, 9, 8)), np.full(16, 100_000, '<u4').tobytes()
        ),
        'parts overlap',
    ),
    'a TIFF whose tags share their bytes': (
        crafted.tiff(dict.fromkeys(range(256, 1_256), (7, 200_000, 8)), bytes(200_000)),
        'its tags take',
    ),
}


@pytest.mark.parametrize(('data', 'message'), REFUSED.values(), ids=list(REFUSED))
def test_what_costs_too_much_is_refused_before_it_is_decoded(data, message, monkeypatch):
    def fail(*unused):
        raise AssertionError('decoded')

    monkeypatch.setattr(ImageFile.ImageFile, 'load', fail)
    monkeypatch.setattr('gcnet_jax.data.jpeg.decode_crop', fail)
    for read in READERS:
        with pytest.raises(DataError, match=message) as caught:
            read(data)
        assert '\n' not in str(caught.value)


def test_too_many_bytes_for_the_pixels_are_refused(monkeypatch):
    monkeypatch.setattr(image_limits, 'MAX_EXTRA_BYTES', 1_000)
    data = crafted.png(9, 9, pixels=bytes(9 * 28), more=crafted.png_chunk(b'prIv', bytes(5_000)))
    with pytest.raises(DataError, match=r'bytes are too many for an image of 9x9 pixels; at most'):
        decode.decode(data)


def test_pixels_times_scans_are_bounded(monkeypatch):
    data = small_jpeg(progressive=True)
    scans = count_scans(data, (64, 64))
    monkeypatch.setattr(image_limits, 'MAX_SCAN_PIXELS', 64 * 64 * scans)
    decode.decode(data)
    monkeypatch.setattr(image_limits, 'MAX_SCAN_PIXELS', 64 * 64 * scans - 1)
    with pytest.raises(DataError, match=rf'64x64 pixels in {scans} scans or more'):
        decode.decode(data)


def test_an_elongated_image_is_not_decoded_for_evaluation(monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, 'load', lambda image: 1 / 0)
    for width in (1, 90):
        with pytest.raises(DataError, match=f'{width}x1000000 pixels is too elongated'):
            preprocess.decode_and_crop(crafted.png(width, 1_000_000), 64)


def test_ordinary_images_of_every_form_are_read():
    for data in crafted.whole_images(np.random.default_rng(0)):
        assert image_format(data[:32]) in decode.FORMATS
        assert decode.decode(data).ndim == 3
        decode.verify(data)


def test_an_animation_of_many_frames_is_read(noise):
    frames = [Image.fromarray(np.roll(noise, shift)) for shift in range(40)]
    for kind in ('GIF', 'WEBP', 'PNG', 'TIFF'):
        data = crafted.encode(frames[0], kind, save_all=True, append_images=frames[1:])
        assert decode.decode(data).shape == noise.shape


def test_metadata_of_a_jpeg_does_not_reach_pillow_and_changes_no_pixel(scene):
    exif = Image.Exif()
    exif[0x010E] = 'a caption'
    options = {'quality': 90, 'comment': b'\xff\xda' * 9, 'icc_profile': b'\xff\xda' * 70_000}
    for mode in ('RGB', 'L', 'CMYK'):
        image = Image.fromarray(scene).convert(mode)
        plain = crafted.encode(image, 'JPEG', quality=90)
        full = crafted.encode(image, 'JPEG', exif=exif, **options)
        np.testing.assert_array_equal(decode.decode(full), decode.decode(plain))
        assert count_scans(full, image.size) == 1
        with decode.opened(full) as opened:
            assert not {'exif', 'icc_profile', 'comment'} & set(opened.info)


@pytest.mark.parametrize('highest', [1, 100, 255, 256, 1000, 4095, 65534, 65535])
@pytest.mark.parametrize(('kind', 'channels'), [('P5', 1), ('P6', 3)])
def test_ppm_of_any_depth_is_scaled_to_eight_bits(kind, channels, highest):
    values = np.random.default_rng(0).integers(0, highest + 1, (5, 7, channels))
    values[0, 0] = highest
    stored = values.astype('>u2' if highest > 255 else 'u1').tobytes()
    decoded = decode.decode(f'{kind}\n# depth\n7 5\n{highest}\n'.encode() + stored)
    expected = np.broadcast_to(values * 255 / highest, decoded.shape)
    assert np.abs(decoded - expected).max() <= 0.51
    assert (decoded[0, 0] == 255).all()


def test_formats_are_told_by_the_first_bytes():
    assert image_format(b'\0\0\0\x1cftypavif\0\0\0\0') == 'AVIF'
    assert image_format(b'\0\0\0\x24ftypheic\0\0\0\0') == 'HEIC'
    assert image_format(b'\xff\x0a\0\0') == 'JPEG XL'
    for text in (b'', b'BMW and others', b'P1ease read me', b'RIFF\0\0\0\0WAVE', b'<svg>', b'%PDF'):
        assert image_format(text) is None
    with pytest.raises(DataError, match='HEIC images are not read; convert it to JPEG or PNG'):
        decode.decode(b'\0\0\0\x24ftypheic\0\0\0\0')


def test_only_regular_files_of_a_sensible_size_are_read(tmp_path, monkeypatch):
    sparse = tmp_path / 'sparse.png'
    with sparse.open('wb') as file:
        file.truncate(3_000_000_000)
    with pytest.raises(DataError, match='3,000,000,000 bytes are more than'), image_file(sparse):
        pass
    monkeypatch.setattr(image_limits, 'LARGE_FILE_BYTES', 3)
    budget = MemoryBudget(100)
    monkeypatch.setattr(image_limits, 'DECODING_MEMORY', budget)
    (tmp_path / 'large').write_bytes(b'1234')
    with image_file(tmp_path / 'large') as data:
        assert (data, budget._used) == (b'1234', 100)
    assert budget._used == 0


def test_a_budget_bounds_what_threads_hold_together():
    budget, lock, held, most = MemoryBudget(100, small=5), threading.Lock(), [0], []

    def work(size):
        with budget.hold(size):
            with lock:
                held[0] += min(size, 100)
                most.append(held[0])
            with budget.hold(90):  # What a thread asks for on top does not block it.
                time.sleep(0.001)
            with lock:
                held[0] -= min(size, 100)

    sizes = np.random.default_rng(0).integers(6, 130, 60).tolist()
    threads = [threading.Thread(target=work, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert 50 < max(most) <= 100
    with budget.hold(100), budget.hold(3):
        pass
    assert budget._used == 0


def test_small_requests_and_errors_do_not_use_up_a_budget():
    budget = MemoryBudget(100, small=5)
    with budget.hold(5):
        assert budget._used == 0
    with pytest.raises(ZeroDivisionError), budget.hold(60):
        raise ZeroDivisionError
    assert budget._used == 0


def test_decoding_holds_its_memory(monkeypatch):
    budget, held = MemoryBudget(10**9), []
    to_rgb = decode.to_rgb
    for module in (decode, preprocess):
        monkeypatch.setattr(module, 'DECODING_MEMORY', budget)
        monkeypatch.setattr(
            module, 'to_rgb', lambda image: held.append(budget._used) or to_rgb(image)
        )
    data = small_jpeg(progressive=True)
    for read in READERS:
        read(data)
    decoding = 10 * 64 * 64 + 2 * len(data)
    resizing = 4 * 36 * (64 + 36)
    assert held == [decoding, decoding, decoding + resizing, decoding]
    assert budget._used == 0


FUZZ = """
import os, pathlib, re, resource, sys, time, warnings

warnings.simplefilter('ignore')
sys.path.insert(0, sys.argv[1])

import crafted_images as crafted
import numpy as np
from gcnet_jax.data import decode, preprocess
from gcnet_jax.errors import DataError

def memory(kind):
    status = pathlib.Path('/proc/self/status').read_text()
    return int(re.search(kind + r':\\s+(\\d+) kB', status).group(1)) / 1024

canary = []
sys.addaudithook(
    lambda event, _: canary.append(event)
    if event in ('os.system', 'subprocess.Popen', 'exec', 'os.exec', 'os.posix_spawn') else None
)
rng = np.random.default_rng(int(sys.argv[2]))
whole = crafted.whole_images(rng)
files = [crafted.damaged(whole[index % len(whole)], rng) for index in range(int(sys.argv[3]))]
files += crafted.bombs()
for data in whole:  # Imports what is imported when it is needed.
    preprocess.augment(data, rng, size=64)
canary.clear()
answers = errors = slowest = largest = 0
for data in files:
    pathlib.Path('/proc/self/clear_refs').write_text('5')  # Forgets the peak.
    before, started = memory('VmRSS'), time.monotonic()
    for read in (
        lambda: preprocess.decode_and_crop(data, 64),
        lambda: preprocess.augment(data, rng, size=64),
        lambda: decode.verify(data),
    ):
        try:
            read()
            answers += 1
        except DataError as error:
            assert '\\n' not in str(error) and str(error).isprintable(), str(error)
            errors += 1
    slowest = max(slowest, time.monotonic() - started)
    largest = max(largest, memory('VmHWM') - before)
assert not canary, canary
print(len(files), answers, errors, round(slowest, 1), round(largest))
"""


@pytest.mark.slow
def test_a_thousand_damaged_and_crafted_images_are_read_or_refused():
    result = subprocess.run(
        [sys.executable, '-c', FUZZ, str(Path(__file__).parent), '0', '1000'],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    count, answers, errors, slowest, largest = map(float, result.stdout.split())
    print(
        f'{count:.0f} images read in three ways: {answers:.0f} answers, {errors:.0f} errors; '
        f'slowest image {slowest} s, most memory {largest:.0f} MB'
    )
    assert count > 1000
    assert answers > 300
    assert errors > 300
    assert slowest < 30  # Three readings of less than 10 s.
    assert largest < 1000
