"""Label maps: stored values come out as they are, and everything else is refused in one line."""

import numpy as np
import pytest
from PIL import Image

from gcnet_jax.data.label_maps import decode_label_map
from gcnet_jax.errors import DataError
from tests.data import crafted_images as crafted

LABELS = np.random.default_rng(0).integers(0, 11, (7, 9), dtype=np.uint8)


def grey(labels=LABELS, **options):
    return crafted.encode(Image.fromarray(labels), 'PNG', **options)


def with_palette(labels=LABELS, **options):
    image = Image.frombytes('P', labels.shape[::-1], labels.tobytes())
    image.putpalette(np.random.default_rng(1).integers(0, 256, 768, dtype=np.uint8).tobytes())
    return crafted.encode(image, 'PNG', **options)


@pytest.mark.parametrize(
    'data',
    [
        grey(),
        grey(compress_level=0),
        with_palette(),
        with_palette(bits=4),
        with_palette(transparency=3),
        with_palette(transparency=bytes(range(0, 250, 25))),
    ],
)
def test_the_stored_values_are_the_labels(data):
    labels = decode_label_map(data, 'a.png')
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, LABELS)


def test_every_value_of_eight_bits_is_kept():
    every = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(decode_label_map(grey(every), 'a.png'), every)
    np.testing.assert_array_equal(decode_label_map(with_palette(every), 'a.png'), every)


COLOURS = Image.new('RGB', (4, 4))
ANIMATION = {'save_all': True, 'append_images': [Image.fromarray(LABELS + 1)]}
REFUSED = {
    'jpeg': (crafted.encode(COLOURS, 'JPEG'), 'is a JPEG image; a label map is a PNG'),
    'gif': (crafted.encode(Image.fromarray(LABELS), 'GIF'), 'is a GIF image'),
    'rgb': (crafted.encode(COLOURS, 'PNG'), 'is a PNG in RGB of 8 bits per value'),
    'rgba': (crafted.encode(COLOURS.convert('RGBA'), 'PNG'), 'in RGB with alpha of 8 bits'),
    'alpha': (crafted.encode(Image.new('LA', (4, 4)), 'PNG'), 'in grey with alpha of 8 bits'),
    'deep': (crafted.png(4, 4, depth=16, colour=0, pixels=bytes(36)), 'in grey of 16 bits'),
    'binary': (crafted.encode(Image.new('1', (4, 4)), 'PNG'), 'in grey of 1 bits'),
    'shallow': (crafted.png(4, 4, depth=4, colour=0, pixels=bytes(12)), 'in grey of 4 bits'),
    'unknown': (crafted.png(4, 4, colour=5, pixels=bytes(20)), 'in colour type 5'),
    'animated': (grey(**ANIMATION), 'is an animated PNG'),
    'empty': (b'', 'is no image'),
    'text': (b'0 1 2', 'is no image'),
    'header': (grey()[:20], 'damaged PNG image'),
    'cut': (grey(np.tile(LABELS, (20, 20)), compress_level=0)[:300], 'damaged PNG image'),
    'palette': (crafted.png(4, 4, depth=16, colour=3, pixels=bytes(36)), 'damaged PNG image'),
    'no_pixels': (crafted.png(0, 9, colour=0), 'damaged PNG image'),
    'bomb': (crafted.png(9_999, 9_999, colour=0), 'would take about .* bytes to decode'),
    'claim': (crafted.png(2**31 - 1, 2**31 - 1, colour=0), 'more than 100,000,000 are not read'),
    'line': (crafted.png(99_000_000, 1, colour=3), 'sides longer than 1,000,000 are not read'),
}


@pytest.mark.parametrize('kind', REFUSED)
def test_anything_else_is_refused_in_one_line_with_its_name(kind):
    data, message = REFUSED[kind]
    with pytest.raises(DataError, match=rf'^odd\\n\.png: .*{message}') as raised:
        decode_label_map(data, 'odd\n.png')
    assert '\n' not in str(raised.value)


def test_seeded_damage_raises_nothing_else():
    rng = np.random.default_rng(0)
    originals = [grey(), with_palette(), with_palette(bits=4), grey(**ANIMATION)]
    refused = 0
    for number in range(400):
        data = crafted.damaged(originals[number % len(originals)], rng)
        try:
            labels = decode_label_map(data, 'a.png')
        except DataError:
            refused += 1
        else:
            assert (labels.dtype, labels.ndim) == (np.uint8, 2)
    assert refused > 200
