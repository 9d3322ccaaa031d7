"""Pictures of many sizes, and the plain network that answers are compared with."""

import json

import jax
import numpy as np
import pytest

from gcnet_jax.data import preprocess
from gcnet_jax.stored.checksums import json_checksum


@pytest.fixture
def pictures(make):
    return [make.picture(seed, 16 + seed, 30 - seed) for seed in range(11)]


@pytest.fixture
def folder(make, pictures, tmp_path):
    for index, pixels in enumerate(pictures):
        (tmp_path / f'{index:02}.png').write_bytes(make.encode(pixels))
    return tmp_path


@pytest.fixture(scope='module')
def plain(stored):
    """The plain network on pictures of any size, one by one, written without the classifier."""
    settings = stored.description.preprocessing
    model = stored.description.build()
    apply = jax.jit(lambda images: model.apply(stored.variables, images, train=False))

    def logits(pictures):
        values = []
        for pixels in pictures:
            image = preprocess.resize_and_crop(
                pixels, settings.test_size, settings.crop_fraction, settings.interpolation
            )
            image = (image / 255 - np.array(settings.mean)) / np.array(settings.std)
            values.append(np.asarray(apply(image[None].astype(np.float32)))[0])
        return np.stack(values)

    return logits


@pytest.fixture
def change_description():
    """A function that changes fields of a stored description, as another program would write it."""

    def change(checkpoint, **changes):
        description, sums = (
            checkpoint / item / 'metadata' for item in ('description', 'checksums')
        )
        fields = json.loads(description.read_text()) | changes
        description.write_text(json.dumps(fields))
        sums.write_text(
            json.dumps(json.loads(sums.read_text()) | {'description': json_checksum(fields)})
        )

    return change
