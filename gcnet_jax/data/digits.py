"""Scikit-learn's handwritten digits as a TFDS data set: real images with nothing to download.

1,797 images of 8x8 pixels and 16 grey levels (a copy of the test set of UCI's "Optical Recognition
of Handwritten Digits", Alpaydin and Kaynak 1998), which come with scikit-learn.
"""

import functools
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from gcnet_jax.data.records import VERSION, Example, ImageSet, default_data_dir, write_image_set
from gcnet_jax.files import as_path

NAME = 'digits'
LABEL_NAMES = tuple('0123456789')
TEST_FRACTION = 0.2
SPLIT_SEED = 0


class Digits(ImageSet):
    """The builder: `train` and `test`, divided once and for all, every digit in proportion."""

    def __init__(self, data_dir: str) -> None:
        super().__init__(
            NAME,
            label_names=LABEL_NAMES,
            splits={
                'train': functools.partial(_examples, test=False),
                'test': functools.partial(_examples, test=True),
            },
            data_dir=data_dir,
            description="Handwritten digits, 8x8, from scikit-learn's load_digits.",
        )


def prepare_digits(data_dir: str | None = None) -> Path:
    """Writes the digits where they are absent, which takes under a second, and returns their place.

    Any number of processes may call this at once.

    Raises:
      DataError: If the directory cannot be written.
    """
    place = as_path(data_dir or default_data_dir(), 'data_dir') / NAME / VERSION
    if (place / 'features.json').exists():
        return place
    return write_image_set(Digits, data_dir)[0]


def _examples(test: bool) -> Iterator[Example]:
    from sklearn.datasets import load_digits  # Slow to import, and needed once.

    images, labels = load_digits(return_X_y=True)
    # 16 grey levels: 0 is the ground and 16 the fullest ink.
    pixels = np.round(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    for index in np.flatnonzero(_is_test(labels) == test):
        data = io.BytesIO()
        Image.fromarray(pixels[index]).save(data, 'PNG')
        example = {
            'image': data.getvalue(),
            'label': str(labels[index]),
            'file_name': f'digit {index}',
        }
        yield str(index), example


def _is_test(labels: np.ndarray) -> np.ndarray:
    """Returns which images are test images: of every class the same fraction, drawn at random."""
    random = np.random.RandomState(SPLIT_SEED)  # Frozen by numpy: the split stays what it is.
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        chosen[members[: round(len(members) * TEST_FRACTION)]] = True
    return chosen
