"""A small stored network, pictures in every form, and encoders for them."""

import errno
import io
import os
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from gcnet_jax.models.registry import Preprocessing
from gcnet_jax.stored_model import ModelDescription, write_ported

LABELS = ('ant', 'bee', 'cat', 'dog', 'elk', 'fox')
PREPROCESSING = Preprocessing(
    mean=(0.4, 0.5, 0.6),
    std=(0.2, 0.3, 0.25),
    interpolation='bicubic',
    crop_fraction=0.8,
    test_size=12,
)
PLACE = {'stages': (1,), 'position': 'after_conv2', 'ratio': 1 / 2}
OPTIONS = {
    'num_classes': len(LABELS),
    'widths': [8],
    'stage_sizes': [1],
    'context': [{'block': 'global_context', **PLACE}, {'block': 'squeeze_excite', **PLACE}],
}
DESCRIPTION = ModelDescription('gccnn', OPTIONS, LABELS, PREPROCESSING, 'a test')


def encode(image, image_format='PNG', **options):
    """Encodes an array or a Pillow image as the bytes of a file."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    data = io.BytesIO()
    image.save(data, image_format, **options)
    return data.getvalue()


def picture(seed, height=20, width=30):
    """A smooth picture that differs much from that of another seed, `[height, width, 3]`."""
    small = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height)))


@pytest.fixture(scope='session')
def stored(tmp_path_factory, random_variables):
    """A checkpoint of a small network with context blocks."""
    directory = tmp_path_factory.mktemp('stored') / 'network'
    variables = random_variables(
        DESCRIPTION.build(), np.zeros((1, 12, 12, 3), np.float32), train=False
    )
    write_ported(directory, DESCRIPTION, variables)
    return types.SimpleNamespace(
        directory=directory,
        description=DESCRIPTION,
        variables=variables,
        one_device=jax.devices()[:1],
    )


@pytest.fixture
def make():
    """The helpers above, because test modules cannot import this file."""
    return types.SimpleNamespace(encode=encode, picture=picture)


@pytest.fixture
def read_only(monkeypatch):
    """A file system that lets nothing be put in place, and nothing be removed either."""

    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, 'Read-only file system')

    monkeypatch.setattr(os, 'replace', refuse)
    monkeypatch.setattr(Path, 'unlink', refuse)
    return 'cannot write .*: Read-only file system$'
