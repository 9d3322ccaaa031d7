"""One split of a prepared data set, read from ArrayRecord files without TensorFlow."""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from gcnet_jax.data.builders import check_format, open_builder
from gcnet_jax.errors import ConfigError, DataError, UnlabelledError, one_line, unknown_name

# What data sets call the feature that tells where an image came from.
RECORD_NAMES = ('file_name', 'filename', 'image/filename', 'id', 'image_id')
# Splits by preference: `selection` chooses among the checkpoints of a run and must leave `test`
# untouched where there is another; `evaluation` gives the figure that is reported.
DEFAULT_SPLITS = {
    'selection': ('validation', 'val', 'valid', 'dev', 'test'),
    'evaluation': ('test', 'validation', 'val', 'valid', 'dev'),
}


class StoredSplit:
    """The records of one split, in random access; can be pickled and shared between threads.

    Args:
      name: Name of the data set.
      split: The split, such as `train[:90%]`.
      label_names: Name of each class, in the order of the labels.
      records: The serialised records.
      image_key, label_key: Names of the features of a record.
      record_key: That of the feature which tells where an image came from, if there is one.

    Attributes:
      name, split, label_names: As given.
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
    ) -> None:
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


def open_split(
    name: str,
    split: str,
    data_dir: str | None,
    find_keys: Callable[[tfds.core.DatasetInfo, str], tuple[str, str]],
) -> tuple[tfds.core.DatasetInfo, dict[str, Any]]:
    """Opens one split of a prepared set.

    Args:
      name, split, data_dir: See `sources.load_source`.
      find_keys: Returns the names of the image and the label feature, or raises DataError if the
        set is of another kind.

    Returns:
      What the set says of itself, and the arguments of `StoredSplit` except `label_names`.

    Raises:
      DataError: If there is no such set or split, if it is empty, not prepared, prepared in another
        file format, damaged, or of another kind.
    """
    builder = open_builder(name, data_dir)
    check_format(builder, name)
    image_key, label_key = find_keys(builder.info, name)
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
    keys = {'image_key': image_key, 'label_key': label_key, 'record_key': record_key}
    return builder.info, {'name': name, 'split': split, 'records': records} | keys


def choose_split(
    name: str, data_dir: str | None, purpose: str, load: Callable[[str], object]
) -> str:
    """Returns the first split by preference that has labels; see `sources.default_split`.

    Args:
      name, data_dir, purpose: See `sources.default_split`.
      load: Opens a split; raises UnlabelledError for one without labels.
    """
    check_purpose(purpose)
    splits = open_builder(name, data_dir).info.splits
    for split in DEFAULT_SPLITS[purpose]:
        if split not in splits or not splits[split].num_examples:
            continue
        try:
            load(split)
        except UnlabelledError:
            continue
        return split
    sizes = ', '.join(f'{key} ({value.num_examples:,})' for key, value in splits.items())
    raise DataError(
        f'data set {name!r} has no labelled split to evaluate on beside train; it has {sizes}: '
        "name a part of one, such as 'train[90%:]', and leave it out of training ('train[:90%]')"
    )


def check_purpose(purpose: str) -> None:
    """Raises ConfigError for what is no purpose of a split."""
    if purpose not in DEFAULT_SPLITS:
        raise ConfigError(unknown_name('purpose of a split', purpose, DEFAULT_SPLITS))


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
