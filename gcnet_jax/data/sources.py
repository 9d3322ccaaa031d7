"""Image classification sets by their TFDS name, read from ArrayRecord files without TensorFlow."""

import os
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from gcnet_jax.data import digits
from gcnet_jax.data.builders import find_builder
from gcnet_jax.data.records import default_data_dir
from gcnet_jax.data.stored_split import StoredSplit, choose_split, open_split
from gcnet_jax.errors import DataError, UnlabelledError

# Images of a split with several labels each that are searched for a label.
LABELS_LOOKED_AT = 1000


class Source(StoredSplit):
    """The images of one split, in random access; it can be pickled and shared between threads.

    Args:
      is_multilabel: Whether an image has any number of labels. The others are `StoredSplit`'s.

    Attributes:
      name: Name of the data set.
      split: The split, such as `train[:90%]`.
      label_names: Name of each class, in the order of the labels.
      is_multilabel: As given.
    """

    def __init__(self, *args: Any, is_multilabel: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_multilabel = is_multilabel

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns `{'image': encoded bytes, 'label': int}`.

        With several labels per image, 'label' is an array that is 1 for each of them, else 0.

        Raises:
          DataError: If the record cannot be read or has no label.
        """
        features = self._read(index)
        labels = list(features[self._label_key].int64_list.value)
        for label in labels:
            if not 0 <= label < self.num_classes:
                raise UnlabelledError(
                    f'{self.describe(index)} has the label {label}, which stands for no label '
                    f'(labels are 0 to {self.num_classes - 1}); choose a labelled split'
                )
        label = labels[0] if not self.is_multilabel else self.no_label
        if self.is_multilabel:
            label[labels] = 1
        return {'image': features[self._image_key].bytes_list.value[0], 'label': label}

    @property
    def no_label(self) -> Any:
        """The label of an example that fills up a batch and does not count."""
        return np.zeros(self.num_classes, np.int32) if self.is_multilabel else 0


def load_source(
    name: str, split: str | None, data_dir: str | None = None, *, purpose: str = 'evaluation'
) -> Source:
    """Opens one split of a prepared image classification set.

    Args:
      name: A TFDS name such as `cifar10`, `imagenet_resized/32x32` or `cifar10:3.0.2`, the name of
        a prepared folder (`prepare_folder`), or `digits`, which is written on first use.
      split: A split or a part of it in TFDS's notation: `train`, `train[:90%]`, `train[100:200]`,
        `train+test`. None for the one that `default_split` chooses.
      data_dir: Directory of the prepared sets; TFDS's (`~/tensorflow_datasets`) if None.
      purpose: What a split that is not named is for: `selection` or `evaluation`.

    Raises:
      DataError: If there is no such set or split, if it is empty, not prepared, prepared in another
        file format, damaged, or no labelled image set.
    """
    if split is None:
        split = default_split(name, data_dir, purpose=purpose)
    info, opened = open_split(name, split, data_dir, _find_keys)
    label = info.features[opened['label_key']]
    source = Source(label_names=_names(label), is_multilabel=_is_sequence(label), **opened)
    source[0]  # An unlabelled split or an unreadable file shows here, before anything is built.
    if source.is_multilabel and not _has_labels(source):
        raise UnlabelledError(
            f'no image of data set {name!r} split {split!r} has a label; choose a labelled split'
        )
    return source


def read_label_names(name: str, data_dir: str | None = None) -> tuple[str, ...]:
    """Returns the names of a set's labels, of TFDS's own also where the set is not prepared.

    Args:
      name: As for `load_source`.
      data_dir: As for `load_source`.

    Raises:
      DataError: If there is no such set, or if it is no labelled image set.
    """
    if name == digits.NAME:
        return digits.LABEL_NAMES
    place = os.path.expanduser(data_dir or default_data_dir())
    try:
        info = find_builder(name, place, given=data_dir is not None).info
    except DataError:
        try:
            info = tfds.builder(name).info
        except Exception:  # TFDS raises many kinds; the first error says what to do.
            info = None
        if info is None:
            raise
    return _names(info.features[_find_keys(info, name)[1]])


def default_split(name: str, data_dir: str | None = None, *, purpose: str = 'evaluation') -> str:
    """Returns the split to measure a network on, where the user names none.

    Splits without labels, such as the `test` of `imagenet2012`, are passed over.

    Args:
      name: As for `load_source`.
      data_dir: As for `load_source`.
      purpose: `selection`, to choose among the checkpoints of a run (`validation` before `test`),
        or `evaluation`, for the figure that is reported (`test` before `validation`).

    Raises:
      ConfigError: If the purpose is neither.
      DataError: If the set cannot be opened, or has no such split.
    """
    return choose_split(name, data_dir, purpose, lambda split: load_source(name, split, data_dir))


def _find_keys(info: tfds.core.DatasetInfo, name: str) -> tuple[str, str]:
    """Returns the names of the image and the label feature."""
    features = info.features if isinstance(info.features, dict | tfds.features.FeaturesDict) else {}
    images = [key for key, value in features.items() if type(value) is tfds.features.Image]
    labels = [key for key, value in features.items() if type(value) is tfds.features.ClassLabel]
    # Several labels per image; of more than one such feature, as in `voc`, the one called so.
    several = [key for key, value in features.items() if _is_sequence(value)]
    labels = labels or ([key for key in several if key == 'labels'] or several)
    supervised = info.supervised_keys or ()
    if len(supervised) == 2 and supervised[0] in images and supervised[1] in labels:
        images, labels = supervised[:1], supervised[1:]
    # TFDS stores an image of floats as a PNG of their bytes, which is no picture.
    if len(images) != 1 or len(labels) != 1 or np.dtype(features[images[0]].np_dtype).kind != 'u':
        found = ', '.join(f'{key} ({type(value).__name__})' for key, value in features.items())
        raise DataError(
            f'data set {name!r} is no image classification set: it needs one Image of integers '
            'and one ClassLabel (or one Sequence of them), and has '
            f'{found or "no features"}'
        )
    return images[0], labels[0]


def _has_labels(source: Source) -> bool:
    """Whether any of the first images has a label; splits without annotations have none at all."""
    return any(source[index]['label'].any() for index in range(min(len(source), LABELS_LOOKED_AT)))


def _is_sequence(feature: Any) -> bool:
    """Whether a feature holds any number of labels per image."""
    is_sequence = isinstance(feature, tfds.features.Sequence)
    return is_sequence and type(feature.feature) is tfds.features.ClassLabel


def _names(feature: Any) -> tuple[str, ...]:
    return tuple((feature.feature if _is_sequence(feature) else feature).names)
