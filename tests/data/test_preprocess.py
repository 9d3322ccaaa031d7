"""Decoding of every kind of image, and the crops against torchvision's and timm's definitions."""

import math
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from gcnet_jax.data import decode, image_limits, preprocess
from gcnet_jax.errors import ConfigError, DataError


@pytest.mark.parametrize('image_format', ['PNG', 'BMP', 'TIFF', 'PPM'])
def test_lossless_formats_are_read_bit_for_bit(make, noise, image_format):
    decoded = decode.decode(make.encode(noise, image_format))
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, noise)


def test_jpeg_and_webp_are_read_closely(make, scene):
    for image_format in ('JPEG', 'WEBP'):
        decoded = decode.decode(make.encode(scene, image_format, quality=95))
        assert np.abs(decoded.astype(int) - scene).mean() < 2


@pytest.mark.parametrize(('rows', 'bands'), [(0.5, 40), (1, 40), (7, 6), (39, 2), (40, 0)])
def test_a_large_image_is_copied_in_bands(make, noise, monkeypatch, rows, bands):
    boxes, crop = [], Image.Image.crop
    monkeypatch.setattr(
        Image.Image, 'crop', lambda image, box: boxes.append(box) or crop(image, box)
    )
    monkeypatch.setattr(decode, 'BAND_PIXELS', int(rows * 60))
    np.testing.assert_array_equal(decode.decode(make.encode(noise)), noise)
    assert len(boxes) == bands


def test_greyscale_becomes_three_equal_channels(make, noise):
    grey = noise[..., 0]
    for pixels in (grey, Image.fromarray(grey).convert('LA')):
        np.testing.assert_array_equal(
            decode.decode(make.encode(pixels)), np.repeat(grey[..., None], 3, axis=-1)
        )


def test_black_and_white_spans_the_range(make):
    pixels = np.array([[True, False], [False, True]])
    decoded = decode.decode(make.encode(Image.fromarray(pixels)))
    np.testing.assert_array_equal(decoded[..., 1], [[255, 0], [0, 255]])


@pytest.mark.parametrize('image_format', ['PNG', 'TIFF'])
def test_sixteen_bits_are_scaled_and_not_cut_off(make, image_format):
    values = np.array([[0, 128, 129, 256], [1000, 32768, 65534, 65535]], np.uint16)
    expected = np.round(values.astype(float) / 65535 * 255)
    decoded = decode.decode(make.encode(values, image_format))
    np.testing.assert_array_equal(decoded[..., 2], expected)


@pytest.mark.parametrize('transparency', [None, 3, bytes([0, 128, 7] + [255] * 13)])
def test_palette_gives_its_colours_whatever_is_transparent(make, noise, transparency):
    image = Image.fromarray(noise).quantize(16)
    palette = np.array(image.getpalette()).reshape(-1, 3)
    expected = palette[np.asarray(image)]
    options = {} if transparency is None else {'transparency': transparency}
    np.testing.assert_array_equal(decode.decode(make.encode(image, **options)), expected)


def test_alpha_is_dropped_and_not_blended(make, noise):
    alpha = np.linspace(0, 255, noise[..., 0].size).reshape(noise.shape[:2]).astype(np.uint8)
    pixels = np.concatenate([noise, alpha[..., None]], axis=-1)
    np.testing.assert_array_equal(decode.decode(make.encode(pixels)), noise)


def test_cmyk_is_not_inverted(make):
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[..., 0] = 255  # Pure cyan: no red at all, green and blue full.
    image = Image.merge('CMYK', [Image.fromarray(pixels[..., channel]) for channel in range(4)])
    decoded = decode.decode(make.encode(image, 'JPEG', quality=100))
    np.testing.assert_allclose(decoded, np.broadcast_to([0, 255, 255], decoded.shape), atol=3)


def test_only_the_first_frame_of_an_animation_is_read(make, noise):
    frames = [Image.fromarray(noise).quantize(8), Image.fromarray(255 - noise).quantize(8)]
    data = make.encode(frames[0], 'GIF', save_all=True, append_images=frames[1:])
    expected = np.array(frames[0].getpalette()).reshape(-1, 3)[np.asarray(frames[0])]
    np.testing.assert_array_equal(decode.decode(data), expected)


def test_orientation_is_left_alone(make, scene):
    turned = Image.Exif()
    turned[0x0112] = 6
    plain = make.encode(scene, 'JPEG')
    marked = make.encode(scene, 'JPEG', exif=turned)
    np.testing.assert_array_equal(decode.decode(marked), decode.decode(plain))


def test_damaged_data_is_one_clear_error(make, noise):
    png, jpeg = make.encode(noise), make.encode(noise, 'JPEG')
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 255
    damaged = [
        b'', b'no image', png[:60], png[:-200], bytes(flipped), jpeg[:200], jpeg[: len(jpeg) // 2],
        b'\x89PNG\r\n\x1a\n' + bytes(40), b'GIF89a', b'RIFF\0\0\0\0WEBPVP8 ', b'BM', b'P6',
        b'II*\0',
        make.encode(np.ones((4, 4), np.float32), 'TIFF'),
    ]  # fmt: skip
    for data in damaged:
        with pytest.raises(DataError) as caught:
            decode.decode(data)
        assert '\n' not in str(caught.value)
        assert 'image' in str(caught.value) or 'pixels' in str(caught.value)
        with pytest.raises(DataError):
            decode.verify(data)


@pytest.mark.parametrize(
    ('error', 'message'),
    [
        (OSError('broken data stream\nat byte 7'), 'damaged PNG image: broken data stream'),
        (IndexError(), 'damaged PNG image: IndexError'),
    ],
)
def test_damage_is_described_in_pillows_words(make, noise, monkeypatch, error, message):
    def load(image):
        raise error

    monkeypatch.setattr(Image.OPEN['PNG'][0], 'load', load)
    with pytest.raises(DataError) as caught:
        decode.decode(make.encode(noise))
    assert str(caught.value) == message


def test_formats_that_start_programs_are_not_opened():
    with pytest.raises(DataError, match='known format'):
        decode.decode(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n')


def test_huge_images_are_refused_before_they_take_memory(make):
    data = make.encode(Image.new('1', (30_000, 10_000)))
    tracemalloc.start()
    for read in (decode.decode, decode.verify):
        with pytest.raises(DataError, match=r'30000x10000.*100,000,000'):
            read(data)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
    with pytest.raises(DataError, match='more than 99'):
        decode.decode(make.encode(np.zeros((10, 10), np.uint8)), max_pixels=99)


def test_images_above_pillows_own_limit_do_not_warn(make, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    assert decode.decode(make.encode(np.zeros((12, 12), np.uint8))).shape == (12, 12, 3)


def test_verify_accepts_what_decode_reads(make, scene):
    for image_format in ('JPEG', 'PNG'):
        decode.verify(make.encode(scene, image_format))


def reference_crop(height, width, rng, scale, ratio):
    """torchvision.transforms.RandomResizedCrop.get_params, on numpy's generator."""
    for _ in range(10):
        target_area = height * width * rng.uniform(scale[0], scale[1])
        log_ratio = np.log(ratio)
        aspect_ratio = np.exp(rng.uniform(log_ratio[0], log_ratio[1]))
        w = int(np.round(np.sqrt(target_area * aspect_ratio)))
        h = int(np.round(np.sqrt(target_area / aspect_ratio)))
        if 0 < w <= width and 0 < h <= height:
            i = rng.integers(0, height - h + 1)
            j = rng.integers(0, width - w + 1)
            return i, j, h, w
    in_ratio = width / height
    if in_ratio < min(ratio):
        w, h = width, round(width / min(ratio))
    elif in_ratio > max(ratio):
        h, w = height, round(height * max(ratio))
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize(
    ('height', 'width', 'scale'),
    [
        (375, 500, (0.08, 1)),
        (500, 333, (0.08, 1)),
        (32, 32, (0.08, 1)),
        (1, 1, (0.08, 1)),
        (9, 9, (0.01, 0.04)),  # Crops of one pixel's width or height.
        (7, 900, (0.08, 1)),  # No room for any crop; likewise in the next three.
        (900, 7, (0.08, 1)),
        (40, 50, (2, 2)),
        (50, 41, (2, 2)),
    ],
)
def test_crops_are_torchvisions(height, width, scale):
    for seed in range(40):
        left, top, right, bottom = preprocess.sample_crop(
            height, width, np.random.default_rng(seed), scale
        )
        expected = reference_crop(height, width, np.random.default_rng(seed), scale, (3 / 4, 4 / 3))
        assert (top, left, bottom - top, right - left) == expected
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height


def test_crops_have_the_areas_and_shapes_asked_for():
    rng = np.random.default_rng(0)
    boxes = np.array(
        [preprocess.sample_crop(1000, 1000, rng, (0.25, 0.5), (0.5, 2)) for _ in range(2000)]
    )
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area = width * height / 1e6
    assert 0.249 < area.min() < 0.26
    assert 0.48 < area.max() < 0.501
    assert abs(area.mean() - 0.375) < 0.01
    assert abs(np.log(width / height).mean()) < 0.03  # Wide and tall are equally likely.


def test_resized_crop_is_the_crop_resized_by_pillow(noise):
    result = preprocess.random_resized_crop(
        noise, 24, np.random.default_rng(3), interpolation='bicubic'
    )
    i, j, h, w = reference_crop(40, 60, np.random.default_rng(3), (0.08, 1), (3 / 4, 4 / 3))
    cropped = Image.fromarray(noise[i : i + h, j : j + w])
    np.testing.assert_array_equal(result, cropped.resize((24, 24), Image.Resampling.BICUBIC))


def test_decoding_and_cropping_in_one_equals_doing_both(make, scene, noise):
    for data in (make.encode(scene, 'JPEG'), make.encode(noise)):
        for seed in range(5):
            fused = preprocess.decode_resized_crop(
                data, 32, np.random.default_rng(seed), fast=False
            )
            plain = preprocess.random_resized_crop(
                decode.decode(data), 32, np.random.default_rng(seed)
            )
            np.testing.assert_array_equal(fused, plain)


def progressive(make, scene):
    """A JPEG that takes Pillow's way, whose draft is tested here; test_jpeg.py has the others."""
    return make.encode(scene, 'JPEG', quality=95, progressive=True)


def test_draft_shows_the_same_part_and_decodes_less(make, scene, monkeypatch):
    data = progressive(make, scene)
    sizes = []
    to_rgb = decode.to_rgb
    monkeypatch.setattr(
        preprocess, 'to_rgb', lambda image: sizes.append(image.size) or to_rgb(image)
    )
    for seed in range(20):
        options = {'scale': (0.3, 1.0), 'interpolation': 'bilinear'}
        draft = preprocess.decode_resized_crop(
            data, 32, np.random.default_rng(seed), **options, fast=True
        )
        exact = preprocess.decode_resized_crop(
            data, 32, np.random.default_rng(seed), **options, fast=False
        )
        assert draft.shape == (32, 32, 3)
        # Another part, or one mirrored, would differ by about 60.
        assert np.abs(draft.astype(int) - exact).mean() < 5
    assert min(sizes) == (50, 38)  # An eighth at best.
    assert max(sizes) == (400, 300)


def test_another_filter_than_bilinear_is_pillows_on_a_full_image(make, scene):
    """OpenCV's fast way resizes by bilinear interpolation only."""
    data = make.encode(scene, 'JPEG', quality=95)
    for seed in range(5):
        options = {'scale': (0.1, 0.2), 'interpolation': 'bicubic'}
        fast, exact = (
            preprocess.decode_resized_crop(
                data, 192, np.random.default_rng(seed), **options, fast=is_fast
            )
            for is_fast in (True, False)
        )
        np.testing.assert_array_equal(fast, exact)


def test_draft_never_decodes_below_the_size_wanted(make, scene, monkeypatch):
    sizes = []
    to_rgb = decode.to_rgb
    monkeypatch.setattr(
        preprocess, 'to_rgb', lambda image: sizes.append(image.size) or to_rgb(image)
    )
    data = progressive(make, scene)
    for seed in range(30):
        preprocess.decode_resized_crop(data, 64, np.random.default_rng(seed), scale=(0.5, 1.0))
        left, top, right, bottom = preprocess.sample_crop(
            300, 400, np.random.default_rng(seed), (0.5, 1.0)
        )
        shrunk = sizes[-1][0] / 400
        assert min(right - left, bottom - top) * shrunk >= 64
    assert min(sizes) == (100, 75)


@pytest.mark.parametrize(
    ('height', 'width', 'size', 'fraction', 'resized', 'left', 'top'),
    [
        (375, 500, 224, 0.875, (341, 256), 58, 16),  # 341.33 down; a margin of 58.5 to even.
        (500, 375, 224, 0.875, (256, 341), 16, 58),
        (300, 300, 224, 0.95, (235, 235), 6, 6),  # 235.8 down; a margin of 5.5 to even.
        (40, 60, 32, 1.0, (48, 32), 8, 0),
        (7, 9, 32, 1.0, (41, 32), 4, 0),  # Enlarged; 41.1 down, 4.5 to even.
    ],
)
def test_evaluation_follows_timm(height, width, size, fraction, resized, left, top):
    image = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    for name, resampling in (
        ('bicubic', Image.Resampling.BICUBIC),
        ('bilinear', Image.Resampling.BILINEAR),
    ):
        expected = np.asarray(Image.fromarray(image).resize(resized, resampling))
        expected = expected[top : top + size, left : left + size]
        result = preprocess.resize_and_crop(image, size, fraction, name)
        assert result.shape == (size, size, 3)
        np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize('shape', [(1, 65_535, 3), (65_535, 1, 3)])
def test_a_line_is_refused_before_it_takes_gigabytes(shape):
    size = f'{shape[1]}x{shape[0]}'
    with pytest.raises(DataError, match=f'image of {size} pixels is too elongated'):
        preprocess.resize_and_crop(np.zeros(shape, np.uint8), 224)
    panorama = preprocess.resize_and_crop(np.zeros((20, 9000, 3), np.uint8), 32)
    assert panorama.shape == (32, 32, 3)


def test_resizing_is_antialiased():
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, ::2] = 255  # Stripes of one pixel: their mean, not every fourth of them.
    result = preprocess.resize_and_crop(image, 16, 1.0, 'bilinear')
    assert np.abs(result[2:-2, 2:-2].astype(int) - 127).max() <= 1


def test_memory_for_both_passes_of_resizing_is_held(make, noise, monkeypatch):
    held = []
    hold = decode.DECODING_MEMORY.hold
    monkeypatch.setattr(
        decode.DECODING_MEMORY, 'hold', lambda size: held.append(size) or hold(size)
    )
    decode.decode(make.encode(noise))
    preprocess.decode_and_crop(make.encode(noise), 20, 1.0)
    # 40 x 60 becomes 40 x 30, then 20 x 30, at 4 bytes a pixel.
    assert held[1] - held[0] == 4 * 30 * (40 + 20)
    monkeypatch.setattr(image_limits, 'MAX_DECODING_BYTES', held[1])
    preprocess.decode_and_crop(make.encode(noise), 20, 1.0)
    monkeypatch.setattr(image_limits, 'MAX_DECODING_BYTES', held[1] - 1)
    with pytest.raises(DataError, match='60x40 pixels is too elongated'):
        preprocess.decode_and_crop(make.encode(noise), 20, 1.0)


def test_an_image_of_the_right_size_is_not_touched(noise):
    square = noise[:40, :40]
    np.testing.assert_array_equal(preprocess.resize_and_crop(square, 40, 1.0), square)


@pytest.mark.parametrize(('height', 'width'), [(1, 6), (6, 1), (4, 9)])
def test_pad_crop_keeps_any_shape(height, width):
    image = np.full((height, width, 3), 255, np.uint8)
    rng = np.random.default_rng(0)
    results = [preprocess.random_pad_crop(image, 1, rng) for _ in range(60)]
    assert {result.shape for result in results} == {image.shape}
    assert {int((result[..., 0] != 0).sum()) for result in results} == {
        rows * columns for rows in (height - 1, height) for columns in (width - 1, width)
    }


def test_pad_crop_shifts_evenly_and_fills_with_black():
    image = np.full((8, 8, 3), 255, np.uint8)
    image[0, 0] = 9
    rng, shifts = np.random.default_rng(0), []
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    windows = {padded[y : y + 8, x : x + 8].tobytes() for y in range(5) for x in range(5)}
    for _ in range(3000):
        result = preprocess.random_pad_crop(image, 2, rng)
        assert result.shape == image.shape
        rows, columns = (result[..., 0] != 0).any(axis=1), (result[..., 0] != 0).any(axis=0)
        assert result.tobytes() in windows
        shifts.append((rows.sum(), columns.sum()))
    rows, counts = np.unique(np.array(shifts)[:, 0], return_counts=True)
    assert rows.tolist() == [6, 7, 8]
    np.testing.assert_allclose(counts / 3000, [2 / 5, 2 / 5, 1 / 5], atol=0.03)


def test_flip_mirrors_half_of_the_time(noise):
    rng, flipped = np.random.default_rng(0), 0
    for _ in range(1000):
        result = preprocess.random_flip(noise, rng)
        is_flipped = (result == noise[:, ::-1]).all()
        assert is_flipped or (result == noise).all()
        flipped += is_flipped
    assert abs(flipped - 500) < 60


@pytest.mark.parametrize('augmentation', preprocess.AUGMENTATIONS)
def test_augment_gives_the_size_asked_for(make, noise, augmentation):
    results = [
        preprocess.augment(
            make.encode(noise), np.random.default_rng(seed), size=16, augmentation=augmentation
        )
        for seed in (1, 1, 2, 3)
    ]
    assert all(result.shape == (16, 16, 3) and result.dtype == np.uint8 for result in results)
    np.testing.assert_array_equal(results[0], results[1])
    assert any((results[0] != result).any() for result in results[2:])


def test_no_augmentation_is_the_middle_of_the_image(make, noise):
    results = [
        preprocess.augment(
            make.encode(noise),
            np.random.default_rng(seed),
            size=40,
            augmentation='none',
            flip=False,
        )
        for seed in range(3)
    ]
    for result in results:
        np.testing.assert_array_equal(result, noise[:, 10:50])


def test_unknown_interpolation_names_the_nearest():
    with pytest.raises(ConfigError, match=r"'bicubik'.*'bicubic'"):
        preprocess.interpolation_filter('bicubik')


@pytest.mark.torch
def test_evaluation_equals_timms_transform(scene):
    from timm.data import create_transform

    for size, fraction, name in [
        (224, 0.875, 'bicubic'),
        (96, 0.95, 'bilinear'),
        (64, 1.0, 'bicubic'),
        ((96, 160), 0.875, 'bicubic'),
        ((160, 96), 0.95, 'bilinear'),
        ((64, 80), 1.0, 'bicubic'),
    ]:
        transform = create_transform(
            size, interpolation=name, crop_pct=fraction, mean=(0, 0, 0), std=(1, 1, 1)
        )
        for image in (scene, np.swapaxes(scene, 0, 1).copy(), scene[:101, :99].copy()):
            expected = np.round(transform(Image.fromarray(image)).numpy() * 255)
            result = preprocess.resize_and_crop(image, size, fraction, name)
            np.testing.assert_array_equal(result, expected.transpose(1, 2, 0))


def test_reference_crop_itself_covers_the_fallback():
    """The strip of 7 x 900 leaves no room for any crop, so that case is really compared above."""
    assert reference_crop(7, 900, np.random.default_rng(0), (0.08, 1), (3 / 4, 4 / 3)) == (
        0,
        (900 - 9) // 2,
        7,
        math.floor(7 * 4 / 3 + 0.5),
    )
