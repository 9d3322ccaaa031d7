"""Folders of small images and label maps for the tests."""

import numpy as np
from PIL import Image

from tests.data import crafted_images as crafted


def labels_of(number, height=6, width=8, classes=3):
    """A label map that is another one for each number, with all classes and 255."""
    labels = np.random.default_rng(number).integers(0, classes, (height, width), dtype=np.uint8)
    labels[0, : classes + 1] = [*range(classes), 255]
    return labels


def image_of(number, height=6, width=8):
    """An image of one colour, which tells its number."""
    return np.full((height, width, 3), (number, 77, 99), np.uint8)


def png(pixels):
    """An image or a label map as the bytes of a PNG."""
    return crafted.encode(Image.fromarray(pixels), 'PNG')


def palette_png(labels):
    """A label map as the bytes of a PNG with a palette."""
    image = Image.frombytes('P', labels.shape[::-1], labels.tobytes())
    image.putpalette(bytes(range(256)) * 3)
    return crafted.encode(image, 'PNG')


def fill(root, counts, first=0):
    """Writes images and label maps, `{'train': 3}`; returns `{split: [numbers]}`."""
    numbers, number = {}, first
    for split, count in counts.items():
        for kind in ('images', 'labels'):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        numbers[split] = list(range(number, number + count))
        for number in numbers[split]:
            (root / 'images' / split / f'{number:03}.png').write_bytes(png(image_of(number)))
            encode = palette_png if number % 2 else png
            labels = encode(labels_of(number))
            (root / 'labels' / split / f'{number:03}.png').write_bytes(labels)
        number += 1
    return numbers
