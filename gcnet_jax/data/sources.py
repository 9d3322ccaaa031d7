"""Image classification sets by their TFDS name, read from ArrayRecord files without TensorFlow."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from gcnet_jax.data import digits
from gcnet_jax.data.builders import check_format, find_builder, open_builder
from gcnet_jax.data.records import default_data_dir
from gcnet_jax.errors import ConfigError, DataError, one_line, unknown_name

# What data sets call the feature that tells where an image came from.
RECORD_NAMES = ('file_name', 'filename', 'image/filename', 'id', 'image_id')
# Splits by preference: `selection` chooses among the checkpoints of a run and must leave `test`
# untouched where there is another; `evaluation` gives the figure that is reported.
DEFAULT_SPLITS = {
    'selection': ('validation', 'val', 'valid', 'dev', 'test'),
    'evaluation': ('test', 'validation', 'val', 'valid', 'dev'),
}


# Images of a split with several labels each that are searched for a label.
LABELS_LOOKED_AT = 1000


class UnlabelledError(DataError):
    """A record whose label stands for no class, as in the test splits of competitions."""


class Source:
    """The images of one split, in random access; it can be pickled and shared between threads.

    Attributes:
      name: Name of the data set.
      split: The split, such as `train[:90%]`.
      label_names: Name of each class, in the order of the labels.
      is_multilabel: Whether an image has any number of labels.
    """

    def __init__(
        self,
        name: str,
        split: str,
        label_names: tuple[str, ...],
        records: Sequence[bytes],
        *,
        image_key: str = 'image',
        label_key: str = 'label',
        record_key: str | None = None,
        is_multilabel: bool = False,
    ) -> None:
        self.is_multilabel = is_multilabel
        self.name = name
        self.split = split
        self.label_names = label_names
        self._records = records
        self._image_key = image_key
        self._label_key = label_key
        self._record_key = record_key

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.label_names)

    def __len__(self) -> int:
        return len(self._records)

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

    def describe(self, index: int) -> str:
        """Returns the name of a record for messages, with its file name where that is stored."""
        where = f"record {index} of {self.name!r} split '{self.split}'"
        if self._record_key is None:
            return where
        values = self._read(index)[self._record_key].bytes_list.value
        if not values:
            return where
        return f'{where} ({one_line(values[0].decode(errors="backslashreplace"))})'

    def _read(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name!r} split '{self.split}' has no record {index}")
        try:
            # TFDS's own decoding gives the same values and takes six times as long.
            features = tf_example_pb2.Example.FromString(self._records[index]).features.feature
            # Reading a key that is absent from a protobuf map would create it.
            missing = {self._image_key, self._label_key} - set(features)
        except Exception as error:  # The reader raises whatever its C++ status becomes.
            missing, cause = {'readable data'}, error
        else:
            cause = None
        if missing:
            raise DataError(
                f"record {index} of {self.name!r} split '{self.split}' has no "
                f'{" and no ".join(sorted(missing))}: its files are damaged; '
                'delete them and prepare the data set again'
            ) from cause
        return features


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
    builder = open_builder(name, data_dir)
    check_format(builder, name)
    image_key, label_key = _find_keys(builder.info, name)
    label_names = _names(builder.info.features[label_key])
    length = _check_split(builder.info, name, split)
    _check_files(builder.info, name, split)
    try:
        records = builder.as_data_source(
            split,
            deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
            file_format='array_record',
        )
        complete = len(records) == length
    except Exception as error:  # A truncated file: whatever its C++ status becomes.
        raise _damaged(name, split, builder.data_dir) from error
    if not complete:
        raise _damaged(name, split, builder.data_dir)
    record_key = next((key for key in RECORD_NAMES if key in builder.info.features), None)
    source = Source(
        name,
        split,
        label_names,
        records,
        image_key=image_key,
        label_key=label_key,
        record_key=record_key,
        is_multilabel=_is_sequence(builder.info.features[label_key]),
    )
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
    if purpose not in DEFAULT_SPLITS:
        raise ConfigError(unknown_name('purpose of a split', purpose, DEFAULT_SPLITS))
    splits = open_builder(name, data_dir).info.splits
    for split in DEFAULT_SPLITS[purpose]:
        if split not in splits or not splits[split].num_examples:
            continue
        try:
            load_source(name, split, data_dir)
        except UnlabelledError:
            continue
        return split
    sizes = ', '.join(f'{key} ({value.num_examples:,})' for key, value in splits.items())
    raise DataError(
        f'data set {name!r} has no labelled split to evaluate on beside train; it has {sizes}: '
        "name a part of one, such as 'train[90%:]', and leave it out of training ('train[:90%]')"
    )


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


def _check_split(info: tfds.core.DatasetInfo, name: str, split: str) -> int:
    sizes = ', '.join(f'{key} ({value.num_examples:,})' for key, value in info.splits.items())
    try:
        length = info.splits[split].num_examples
    except Exception as error:  # TFDS raises several kinds; all mean that the text is wrong.
        raise DataError(
            f'data set {name!r} has no split {split!r}; it has {sizes}, and parts are written '
            "like 'train[:90%]', 'train[100:200]' and 'train+test'"
        ) from error
    if length <= 0:
        raise DataError(f'split {split!r} of data set {name!r} is empty; it has {sizes}')
    return length


def _check_files(info: tfds.core.DatasetInfo, name: str, split: str) -> None:
    info.set_file_format('array_record', override=True, override_if_initialized=True)
    for path in info.splits[split].filepaths:
        if not path.exists():
            raise DataError(
                f'data set {name!r} lacks the file {str(path)!r}; '
                'copy it there, or delete the data set and prepare it again'
            )


def _damaged(name: str, split: str, place: object) -> DataError:
    return DataError(
        f'the files of data set {name!r} split {split!r} in {str(place)!r} are damaged; '
        'delete them and prepare the data set again'
    )
