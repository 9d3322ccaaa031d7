"""Folders in COCO's format of small images for the tests."""

import json

import numpy as np
from PIL import Image

from tests.data import crafted_images as crafted

CATEGORIES = ((1, 'person'), (18, 'dog'), (90, 'toothbrush'))
# Of the images, by number: some are portraits.
SIZES = ((20, 30), (30, 20), (24, 24), (20, 32))


def size_of(number):
    """Height and width of an image."""
    return SIZES[number % len(SIZES)]


def picture(number):
    """An image whose corner tells its number."""
    pixels = np.random.default_rng(number).integers(0, 256, (*size_of(number), 3), dtype=np.uint8)
    pixels[0, 0] = number
    return crafted.encode(Image.fromarray(pixels), 'PNG')


def triangle(left, top, width, height):
    """A polygon within a box."""
    return [[left, top, left + width, top, left + width, top + height]]


def run_lengths(height, width):
    """A crowd's mask: the image without its first three columns."""
    return {'size': [height, width], 'counts': [3 * height, (width - 3) * height]}


def annotation(number, image, category=18, box=(2, 3, 10.53, 8.1), **changes):
    """One object; values that are None are left out."""
    item = {
        'id': number,
        'image_id': image,
        'category_id': category,
        'bbox': list(box),
        'area': box[2] * box[3] / 2,
        'iscrowd': 0,
        'segmentation': triangle(*box),
    } | changes
    return {key: value for key, value in item.items() if value is not None}


def contents(numbers):
    """Annotations of images: image n has n % 3 objects, those of number 2 a crowd besides."""
    items = []
    for image in numbers:
        for place in range(image % 3):
            box = (2.25 + place, 3, 10.53, 8.1)
            items.append(annotation(1000 + 10 * image + place, image, (18, 90)[place], box))
        if image == 2:
            mask = run_lengths(*size_of(image))
            items.append(annotation(1009, image, iscrowd=1, segmentation=mask))
    images = [
        {
            'id': number,
            'file_name': f'{number:04}.png',
            'height': size_of(number)[0],
            'width': size_of(number)[1],
        }
        for number in numbers
    ]
    categories = [{'id': number, 'name': name} for number, name in CATEGORIES]
    return {'images': images, 'annotations': items, 'categories': categories}


def write(root, split, annotations):
    """Writes the annotations of a split and its images; returns the annotation file."""
    file = root / 'annotations' / f'instances_{split}.json'
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(annotations))
    (root / split).mkdir(exist_ok=True)
    for image in annotations['images']:
        (root / split / image['file_name']).write_bytes(picture(image['id']))
    return file


def fill(root, splits):
    """Writes splits, `{'train2017': range(6)}`; returns their contents."""
    made = {split: contents(numbers) for split, numbers in splits.items()}
    for split, annotations in made.items():
        write(root, split, annotations)
    return made
