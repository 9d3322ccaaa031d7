"""Encoded images and sources in memory for the tests of the data."""

import io
import types

import numpy as np
import pytest
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from gcnet_jax.data.sources import Source


def encode(pixels, image_format='PNG', **options):
    """Encodes an array (or a Pillow image) as the bytes of a file."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    data = io.BytesIO()
    image.save(data, image_format, **options)
    return data.getvalue()


def serialize(image, label, file_name=None):
    """Returns the record that TFDS would store."""
    example = tf_example_pb2.Example()
    example.features.feature['image'].bytes_list.value.append(image)
    example.features.feature['label'].int64_list.value.append(label)
    if file_name is not None:
        example.features.feature['file_name'].bytes_list.value.append(file_name.encode())
    return example.SerializeToString()


def numbered_source(length, size=8, damaged=()):
    """A source whose image i is one colour, from which `number_of` reads i; label i % 3."""
    records = []
    for index in range(length):
        pixels = np.full((size, size, 3), (index // 256, index % 256, 77), np.uint8)
        data = b'no image' if index in damaged else encode(pixels)
        records.append(serialize(data, index % 3, f'file-{index}.png'))
    return Source('numbers', 'train', ('a', 'b', 'c'), records, record_key='file_name')


def number_of(images):
    """Returns the number of each image of a numbered source, from its middle pixel."""
    middle = images[:, images.shape[1] // 2, images.shape[2] // 2].astype(int)
    return (middle[:, 0] * 256 + middle[:, 1]).tolist()


@pytest.fixture
def make():
    """The helpers above, because test modules cannot import this file."""
    return types.SimpleNamespace(
        encode=encode, serialize=serialize, numbered_source=numbered_source, number_of=number_of
    )


@pytest.fixture
def noise():
    """An image without any regularity, `[40, 60, 3]`."""
    return np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


@pytest.fixture
def scene():
    """A smooth image of a known size that a JPEG keeps well, `[300, 400, 3]`."""
    rows, columns = np.mgrid[:300, :400]
    channels = [128 + 100 * np.sin(rows / 20 + phase) * np.cos(columns / 30) for phase in range(3)]
    return np.stack(channels, axis=-1).astype(np.uint8)
