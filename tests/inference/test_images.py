"""Images of every kind become what evaluation sees, or one clear line."""

import io
import os
import struct
import threading
import time
import tracemalloc
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from gcnet_jax.data import preprocess
from gcnet_jax.data.preprocessing import Preprocessing
from gcnet_jax.errors import ConfigError, DataError
from gcnet_jax.inference.images import LeftOut, find_images, list_images, load_ahead, load_image

PREPROCESSING = Preprocessing(interpolation='bicubic', crop_fraction=0.75, test_size=12)


def expected(pixels):
    return preprocess.resize_and_crop(pixels, 12, 0.75, 'bicubic')


def png_header(width, height):
    """A PNG that claims a size, with no pixels at all."""
    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    chunks = [(b'IHDR', header), (b'IDAT', b''), (b'IEND', b'')]
    return b'\x89PNG\r\n\x1a\n' + b''.join(
        struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
        for kind, data in chunks
    )


def test_every_form_of_an_image_is_the_same(make, tmp_path):
    pixels = make.picture(0)
    data = make.encode(pixels)
    path = tmp_path / 'a picture.png'
    path.write_bytes(data)
    forms = [
        *(path, str(path), data, bytearray(data), memoryview(data)),
        *(Image.fromarray(pixels), Image.open(path), pixels, pixels[:, ::-1][:, ::-1]),
        *(pixels / 255, (pixels / 255).astype(np.float32), jnp.asarray(pixels)),
        np.concatenate([pixels, pixels[..., :1]], axis=-1),
    ]
    for form in forms:
        loaded = load_image(form, PREPROCESSING)
        assert (loaded.shape, loaded.dtype) == ((12, 12, 3), np.uint8)
        np.testing.assert_array_equal(loaded, expected(pixels))


def test_greyscale_of_every_form_is_three_equal_channels(make):
    grey = make.picture(0)[..., 0]
    pixels = np.repeat(grey[..., None], 3, axis=-1)
    for form in (grey, grey[..., None], grey / 255, Image.fromarray(grey), make.encode(grey)):
        np.testing.assert_array_equal(load_image(form, PREPROCESSING), expected(pixels))


def test_half_precision_is_read_as_closely_as_it_is(make):
    pixels = make.picture(0)
    for dtype in (jnp.float16, jnp.bfloat16):
        loaded = load_image(jnp.asarray(pixels / 255, dtype), PREPROCESSING)
        assert np.abs(loaded.astype(int) - expected(pixels)).max() <= 2


def test_the_callers_image_is_not_changed(make):
    image = Image.fromarray(make.picture(0)).quantize(16)
    image.info['transparency'] = 3
    load_image(image, PREPROCESSING)
    assert (image.mode, image.info['transparency']) == ('P', 3)


@pytest.mark.parametrize(
    ('image', 'message'),
    [
        (b'', 'not an image of a known format'),
        (b'some text', 'not an image of a known format'),
        (png_header(20_000, 10_000), r'20000x10000 pixels, more than 100,000,000 are not read'),
        (png_header(50, 60), 'damaged PNG image'),
        (np.zeros((3, 8, 8), np.uint8), r'shape \(3, 8, 8\); images are \[height, width\]'),
        (np.zeros((2, 8, 8, 3), np.uint8), r'shape \(2, 8, 8, 3\)'),
        (np.zeros((0, 8, 3), np.uint8), r'shape \(0, 8, 3\)'),
        (np.zeros((), np.uint8), r'shape \(\)'),
        (np.zeros((8, 8, 3), np.int32), 'array of int32; images are uint8'),
        (np.full((8, 8, 3), 255.0), r'from 255 to 255; it must be in 0\.\.1'),
        (np.full((8, 8, 3), -0.1), r'from -0.1 to -0.1'),
        (np.full((8, 8, 3), np.nan), 'from nan to nan'),
        (np.zeros((1, 500_000, 3), np.uint8), '500000x1 pixels is too elongated'),
        (7, 'not int'),
        ('nowhere.jpg', 'nowhere.jpg: no such file'),
        ('a\nb.jpg', r'a\\nb.jpg: no such file'),
    ],
)
def test_what_cannot_be_read_is_one_line(image, message):
    with pytest.raises(DataError, match=message) as caught:
        load_image(image, PREPROCESSING, name='image 4')
    assert '\n' not in str(caught.value)
    assert isinstance(image, str) or str(caught.value).startswith('image 4: ')


def test_a_huge_picture_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = tmp_path / 'huge.png'
    path.write_bytes(png_header(20_000, 10_000))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r'huge.png: image of 20000x10000 pixels'):
            load_image(path, PREPROCESSING)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', None)  # Pillow's own limit for Image.open.
    with Image.open(path) as image, pytest.raises(DataError, match='20000x10000'):
        load_image(image, PREPROCESSING)


def test_a_damaged_pillow_image_is_one_line(make, tmp_path):
    path = tmp_path / 'cut.jpg'
    path.write_bytes(make.encode(make.picture(0, 200, 300), 'JPEG')[:-1500])
    with Image.open(path) as image, pytest.raises(DataError, match='image 0: damaged image: '):
        load_image(image, PREPROCESSING, name='image 0')


def test_places_that_are_no_file_are_one_line(tmp_path):
    os.mkfifo(tmp_path / 'pipe.png')
    with pytest.raises(DataError, match=r'pipe.png: not a file'):
        load_image(tmp_path / 'pipe.png', PREPROCESSING)
    with pytest.raises(DataError, match='a folder that holds no image'):
        load_image(tmp_path, PREPROCESSING)
    with (tmp_path / 'vast.tiff').open('wb') as file:
        file.truncate(900_000_000)  # Takes no space.
    with pytest.raises(DataError, match='900,000,000 bytes are more than any image'):
        load_image(tmp_path / 'vast.tiff', PREPROCESSING)


def test_too_little_memory_is_one_line(make, monkeypatch):
    def fail(image):
        raise MemoryError

    monkeypatch.setattr(preprocess, 'to_rgb', fail)
    with pytest.raises(DataError, match='image 0: there is not enough memory'):
        load_image(make.encode(make.picture(0)), PREPROCESSING, 'image 0')


def test_folders_are_searched_in_order_by_ending_and_content(make, tmp_path):
    image = make.encode(make.picture(0))
    contents = {
        **{'b.JPEG': b'', 'a/2.png': b'', 'a/1.webp': b'', '.hidden.png': b'', 'd/.x/3.png': b''},
        **{'e.tif': b'', 'photo': image, 'f.jfif': image, 'g.dat': image, 'h.avif': b'', 'i': b''},
        **{'c.txt': b'some text', 'k.heic': b'\0\0\0\x18ftypheic', 'l.mp4': b'\0\0\0\x18ftypisom'},
    }
    for name, data in contents.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (tmp_path / 'loop').symlink_to(tmp_path)
    (tmp_path / 'link.png').symlink_to(tmp_path / 'b.JPEG')
    os.mkfifo(tmp_path / 'pipe')
    left_out = LeftOut()
    found = [str(path.relative_to(tmp_path)) for path in find_images(tmp_path, left_out)]
    assert found == [
        *('a/1.webp', 'a/2.png', 'b.JPEG', 'e.tif', 'f.jfif', 'g.dat', 'h.avif', 'k.heic'),
        *('link.png', 'photo'),
    ]
    assert (left_out.count, left_out.first) == (4, tmp_path / 'c.txt')  # And i, l.mp4 and the pipe.
    assert str(left_out) == f'left out 4 files that are no image (first: {tmp_path}/c.txt)'
    several = [tmp_path / 'c.txt', str(tmp_path / 'a'), tmp_path / 'd', tmp_path / 'none']
    names = [str(path.relative_to(tmp_path)) for path in find_images(several)]
    assert names == ['c.txt', 'a/1.webp', 'a/2.png', 'd', 'none']  # 'd' is empty.


def test_linked_folders_are_searched_once(make, tmp_path):
    root, elsewhere = tmp_path / 'root', tmp_path / 'elsewhere'
    for path in (root / 'a' / '1.png', elsewhere / '2.png', elsewhere / 'deep' / '3.png'):
        path.parent.mkdir(parents=True)
        path.write_bytes(make.encode(make.picture(0)))
    (root / 'b').symlink_to(elsewhere)
    (root / 'c').symlink_to(elsewhere / 'deep')
    (elsewhere / 'deep' / 'up').symlink_to(root)
    found = [str(path.relative_to(root)) for path in find_images(root)]
    assert found == ['a/1.png', 'b/2.png', 'b/deep/3.png']


def test_folders_nested_deeper_than_pythons_stack(tmp_path):
    deepest = tmp_path
    for _ in range(1500):
        deepest /= 'd'
        deepest.mkdir()
    (deepest / '1.png').write_bytes(b'')
    assert list(find_images(tmp_path)) == [deepest / '1.png']
    (deepest / '1.png').unlink()
    os.removedirs(deepest)  # pytest could not.


def test_formats_that_are_not_read_are_named(tmp_path):
    path = tmp_path / 'photo.heic'
    path.write_bytes(b'\0\0\0\x18ftypheic' + bytes(99))
    with pytest.raises(
        DataError, match=r'photo.heic: HEIC images are not read; convert it to JPEG'
    ):
        load_image(path, PREPROCESSING)


def test_files_that_are_open_are_read(make, tmp_path):
    data = make.encode(make.picture(0))
    (tmp_path / 'a.png').write_bytes(data)
    expected_pixels = expected(make.picture(0))
    with (tmp_path / 'a.png').open('rb') as file:
        assert list_images(file) == ([file], True)
        np.testing.assert_array_equal(load_image(file, PREPROCESSING), expected_pixels)
    stream = io.BytesIO(b'before' + data)
    stream.seek(6)
    np.testing.assert_array_equal(load_image(stream, PREPROCESSING), expected_pixels)
    with pytest.raises(DataError, match=r'image 0: cannot be read \(.*closed file'):
        load_image(file, PREPROCESSING, 'image 0')
    with pytest.raises(DataError, match=r"image 0: a file of text; open it with mode 'rb'"):
        load_image(io.StringIO('text'), PREPROCESSING, 'image 0')
    with pytest.raises(DataError, match='not an image'):
        load_image(stream, PREPROCESSING, 'image 0')  # Read to its end.


def test_sixteen_bits_are_scaled(make):
    values = np.linspace(0, 65535, 48, dtype=np.uint16).reshape(6, 8)
    eight = np.repeat(((values.astype(int) + 128) // 257).astype(np.uint8)[..., None], 3, axis=-1)
    for data in (b'P5 8 6 65535 ' + values.astype('>u2').tobytes(), make.encode(values)):
        np.testing.assert_array_equal(load_image(data, PREPROCESSING), expected(eight))


def test_a_folder_in_the_place_of_an_image_is_explained(make, tmp_path):
    (tmp_path / 'a.png').write_bytes(make.encode(make.picture(0)))
    with pytest.raises(DataError, match=r'a folder, not an image; stream\(\) goes through'):
        load_image(tmp_path, PREPROCESSING)


def test_names_with_anything_in_them_are_one_line(make, tmp_path):
    for name in (os.fsdecode(b'caf\xe9.png'), 'a\nb.png', '\x1b[31m.png', 'a\0b.png'):
        with pytest.raises(DataError) as caught:
            load_image(tmp_path / name, PREPROCESSING)
        assert str(caught.value).isprintable()


def test_one_image_and_several_are_told_apart(make):
    pixels, data = make.picture(0), make.encode(make.picture(0))
    for one in ('x.png', data, Image.fromarray(pixels), pixels, pixels[..., 0], jnp.zeros((8, 8))):
        assert list_images(one)[1]
    for several in (['x.png'], [data], (pixels, pixels[..., 0]), np.stack([pixels] * 2), []):
        listed, single = list_images(several)
        assert (len(listed), single) == (len(several), False)
    assert len(list_images(iter([data, data]))[0]) == 2
    for wrong in (7, None, {'image': data}):
        with pytest.raises(ConfigError, match='images must be paths, bytes'):
            list_images(wrong)


def test_loading_ahead_keeps_the_order_and_its_bounds():
    taken, running, most = [], threading.Semaphore(3), []

    def items():
        for index in range(60):
            taken.append(index)
            yield index

    def load(index):
        assert running.acquire(blocking=False)  # More than three at once would fail.
        time.sleep(0.002 * (index % 3))
        running.release()
        return index * index

    results = load_ahead(load, items(), num_threads=3, ahead=7)
    for count, (item, result) in enumerate(results, start=1):
        assert (item, result) == (count - 1, (count - 1) ** 2)
        most.append(len(taken) - count)
    assert count == 60
    assert max(most) <= 7


def test_closing_ends_the_threads_and_errors_come_through():
    before = threading.active_count()
    results = load_ahead(lambda item: item, iter(range(10**9)), num_threads=4, ahead=8)
    assert next(results) == (0, 0)
    results.close()
    assert threading.active_count() == before
    for problem in (KeyboardInterrupt, GeneratorExit):  # While it waits, or its caller does.
        results = load_ahead(lambda item: item, iter(range(10**9)), num_threads=4, ahead=8)
        next(results)
        with pytest.raises(problem):
            results.throw(problem)
        assert threading.active_count() == before
    with pytest.raises(ZeroDivisionError):
        list(load_ahead(lambda item: 1 // item, [1, 0], num_threads=1, ahead=1))
    assert threading.active_count() == before
