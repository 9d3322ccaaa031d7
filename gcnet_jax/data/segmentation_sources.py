"""Images with label maps: prepared sets by their names, TFDS's own, and plain folders."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from gcnet_jax.data.builders import find_builder
from gcnet_jax.data.folder_entries import MAX_LISTED, SPLIT_FOLDERS, shown
from gcnet_jax.data.image_limits import image_file
from gcnet_jax.data.label_maps import IGNORED, LabelMap
from gcnet_jax.data.records import default_data_dir
from gcnet_jax.data.segmentation_files import (
    Pair,
    SegmentationFolder,
    check_classes,
    find_pairs,
    open_folder,
    relative,
)
from gcnet_jax.data.segmentation_folder import check_pairs, class_names, numbered_names
from gcnet_jax.data.segmentation_labels import LABEL_SETS
from gcnet_jax.data.segmentation_pairs import decode_labels
from gcnet_jax.data.stored_split import (
    DEFAULT_SPLITS,
    StoredSplit,
    check_purpose,
    choose_split,
    open_split,
)
from gcnet_jax.errors import DataError, UnlabelledError, one_line, unknown_name
from gcnet_jax.files import as_path

# What data sets call their label maps, by preference.
LABEL_KEYS = ('label', 'segmentation_label', 'segmentation_mask', 'annotation', 'semantic_map')


class KnownSet(NamedTuple):
    """What TFDS's own description of a set does not say.

    Attributes:
      label_names: Of the classes.
      reduce_zero_label: Whether the labels count from 1, and 0 is what does not count.
    """

    label_names: tuple[str, ...]
    reduce_zero_label: bool


KNOWN_SETS = {
    'scene_parse150': KnownSet(LABEL_SETS['ade20k'].names, True),
    'oxford_iiit_pet': KnownSet(('pet', 'background', 'border'), True),
}
RAW_SETS = ('cityscapes',)


class SegmentationSource:
    """The images and label maps of one split, in random access.

    It can be pickled and shared between threads. There are two: `StoredMaps` and `FolderMaps`.

    Attributes:
      name: Name of the data set, or the folder.
      split: The split, such as `train[:90%]`.
      label_names: Name of each class, in the order of the labels.
      reduce_zero_label: Whether 0 in the stored label maps does not count and others are one more
        than their class.
    """

    name: str
    split: str
    label_names: tuple[str, ...]
    reduce_zero_label: bool

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.label_names)

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict[str, bytes]:
        """Returns `{'image': encoded bytes, 'label': encoded bytes}`, as they are stored.

        Raises:
          DataError: If the record cannot be read.
        """
        raise NotImplementedError

    def describe(self, index: int) -> str:
        """Returns the name of a record for messages, with its file name where that is known."""
        raise NotImplementedError

    def decode_label(self, label: bytes) -> LabelMap:
        """Decodes a stored label map; labels are classes or 255.

        Raises:
          DataError: It is no label map, or a label is no class.
        """
        return decode_labels(label, self.num_classes, reduce_zero_label=self.reduce_zero_label)

    def label_map(self, index: int) -> LabelMap:
        """Returns the label map of a record, as `decode_label`; errors name the record."""
        try:
            return self.decode_label(self[index]['label'])
        except DataError as error:
            where = self.describe(index)
            if str(error).startswith(where):
                raise
            raise DataError(f'{where}: {error}') from error


class StoredMaps(StoredSplit, SegmentationSource):
    """The images and label maps of a prepared split."""

    def __init__(self, *args: Any, reduce_zero_label: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reduce_zero_label = reduce_zero_label

    def __getitem__(self, index: int) -> dict[str, bytes]:
        features = self._read(index)
        found = {
            'image': features[self._image_key].bytes_list.value,
            'label': features[self._label_key].bytes_list.value,
        }
        for key, values in found.items():
            if not values or not values[0]:
                raise UnlabelledError(
                    f'{self.describe(index)} has no {key}; choose a split that has label maps'
                )
        return {key: values[0] for key, values in found.items()}


class FolderMaps(SegmentationSource):
    """The images and label maps of a folder that is read as it is."""

    def __init__(
        self,
        name: str,
        split: str,
        label_names: tuple[str, ...],
        root: Path,
        pairs: Sequence[Pair],
        reduce_zero_label: bool,
    ) -> None:
        self.name = name
        self.split = split
        self.label_names = label_names
        self.reduce_zero_label = reduce_zero_label
        self._root = root
        self._pairs = pairs

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> dict[str, bytes]:
        return dict(zip(('image', 'label'), map(self._bytes, self._pair(index)), strict=True))

    def describe(self, index: int) -> str:
        return f'{relative(self._root, self._pair(index).image)} of {shown(self.name)}'

    def _pair(self, index: int) -> Pair:
        if not 0 <= index < len(self):
            raise IndexError(f'{self.name!r} split {self.split!r} has no record {index}')
        return self._pairs[index]

    def _bytes(self, path: Path) -> bytes:
        try:
            with image_file(path) as data:
                return data
        except (DataError, OSError) as error:
            reason = getattr(error, 'strerror', None) or error
            raise DataError(f'{one_line(path)} cannot be read ({one_line(reason)})') from error


def load_segmentation(
    name: str | os.PathLike,
    split: str | None = None,
    data_dir: str | None = None,
    *,
    purpose: str = 'evaluation',
    label_names: Sequence[str] | None = None,
    reduce_zero_label: bool | None = None,
) -> SegmentationSource:
    """Opens one split of a set of images with label maps.

    Args:
      name: The name of a prepared set (`prepare_segmentation`) or of one of TFDS's, or a folder as
        `prepare_segmentation` takes it, which is read as it is; see `is_folder`.
      split: A split; of a set also a part of it, as in `sources.load_source`. None for the one to
        measure a network on; of a folder that is `val`.
      data_dir: Directory of the prepared sets; TFDS's (`~/tensorflow_datasets`) if None.
      purpose: What a split that is not named is for: `selection` or `evaluation`.
      label_names: Names of the classes in the order of their labels, such as the network's. None
        for those that the set stores, or `classes.txt` in a folder; where there is neither, a
        folder's classes are found by decoding all of its label maps.
      reduce_zero_label: Make 0 the label that does not count (255) and every other one smaller by
        one. None for what is known of the set, else False; what `prepare_segmentation` wrote is
        reduced already.

    Raises:
      ConfigError: If the purpose is neither.
      DataError: If there is no such set, folder or split, if it is empty, damaged or of another
        kind, or the names of its classes are unknown.
    """
    check_purpose(purpose)
    if is_folder(name):
        return _load_folder(os.fsdecode(name), split, purpose, label_names, bool(reduce_zero_label))
    name = os.fsdecode(name)
    options = {'label_names': label_names, 'reduce_zero_label': reduce_zero_label}
    if split is None:
        split = choose_split(
            name, data_dir, purpose, lambda tried: _load_stored(name, tried, data_dir, **options)
        )
    return _load_stored(name, split, data_dir, **options)


def is_folder(name: str | os.PathLike) -> bool:
    """Returns whether `load_segmentation` takes a name to be a folder's.

    A path is one that begins with `.`, `/` or `~`, or that holds a slash and is a directory. A name
    of letters alone is a data set's, even if there is a folder of that name: `./voc` is the folder.
    """
    text = os.fsdecode(name)
    if isinstance(name, os.PathLike) or text.startswith(('.', '/', '~')) or os.path.isabs(text):
        return True
    return ('/' in text or os.sep in text) and as_path(text).is_dir()


def read_segmentation_names(
    name: str | os.PathLike, data_dir: str | None = None
) -> tuple[str, ...]:
    """Returns the names of a set's classes, as `load_segmentation` finds them.

    Raises:
      DataError: As `load_segmentation`.
    """
    if is_folder(name):
        folder = open_folder(as_path(name), training=False)
        return class_names(folder, None) or _numbered(folder, reduce_zero_label=False)
    place = os.path.expanduser(data_dir or default_data_dir())
    info = find_builder(name, place, given=data_dir is not None).info
    return _classes(info, name, _find_keys(info, name)[1], None)


def _load_stored(
    name: str,
    split: str,
    data_dir: str | None,
    label_names: Sequence[str] | None,
    reduce_zero_label: bool | None,
) -> StoredMaps:
    info, opened = open_split(name, split, data_dir, _find_keys)
    names = _classes(info, name, opened['label_key'], label_names)
    known = KNOWN_SETS.get(info.name)
    if reduce_zero_label is None:
        reduce_zero_label = known is not None and known.reduce_zero_label
    source = StoredMaps(label_names=names, reduce_zero_label=reduce_zero_label, **opened)
    source[0]  # An unlabelled split or an unreadable file shows here, before anything is built.
    return source


def _find_keys(info: tfds.core.DatasetInfo, name: str) -> tuple[str, str]:
    """Returns the names of the image and the label map feature."""
    features = info.features if isinstance(info.features, dict | tfds.features.FeaturesDict) else {}
    images = {
        key: value
        for key, value in features.items()
        if isinstance(value, tfds.features.Image) and np.dtype(value.np_dtype) == np.uint8
    }
    maps = [key for key, value in images.items() if isinstance(value, tfds.features.LabeledImage)]
    maps = maps or [key for key in LABEL_KEYS if key in images]
    pictures = [key for key in images if key not in maps and images[key].shape[-1] != 1]
    if 'image' in pictures:
        pictures = ['image']
    if not maps or len(pictures) != 1:
        found = ', '.join(f'{key} ({type(value).__name__})' for key, value in features.items())
        raise DataError(
            f'data set {name!r} is no segmentation set: it needs an Image and a label map (a '
            f'LabeledImage, or an Image called {", ".join(LABEL_KEYS[:-1])} or {LABEL_KEYS[-1]}), '
            f'and has {found or "no features"}'
        )
    if info.name in RAW_SETS:
        raise DataError(
            f"data set {name!r} stores Cityscapes' raw labels (33 of them, and 0 for unlabelled); "
            'make *_gtFine_labelTrainIds.png of the original files (pip install cityscapesscripts, '
            'csCreateTrainIdLabelImgs) and prepare their folder: python -m gcnet_jax prepare '
            '--task segmentation DIR --name my_cityscapes --labels cityscapes'
        )
    return pictures[0], maps[0]


def _classes(
    info: tfds.core.DatasetInfo, name: str, label_key: str, label_names: Sequence[str] | None
) -> tuple[str, ...]:
    if label_names is not None:
        return check_classes(label_names, 'the list of classes')
    feature = info.features[label_key]
    if isinstance(feature, tfds.features.LabeledImage) and feature.num_classes:
        return tuple(feature.names)
    if info.name in KNOWN_SETS:
        return KNOWN_SETS[info.name].label_names
    raise DataError(
        f'data set {name!r} does not say what its classes are called: give their names as '
        'label_names, in the order of the labels'
    )


def _load_folder(
    name: str,
    split: str | None,
    purpose: str,
    label_names: Sequence[str] | None,
    reduce_zero_label: bool,
) -> FolderMaps:
    folder = open_folder(as_path(name), training=False)
    split = _folder_split(folder, name, split, purpose)
    found = find_pairs(folder, split)
    if found.problems:
        count = len(found.problems)
        raise DataError(
            f'{count} file{"s" if count > 1 else ""} of {shown(name)} split {split!r} cannot be '
            f'used: {"; ".join(found.problems[:MAX_LISTED])}'
            f'{f" and {count - MAX_LISTED} more" if count > MAX_LISTED else ""}'
        )
    names = class_names(folder, label_names) or _numbered(folder, reduce_zero_label)
    return FolderMaps(name, split, names, folder.root, tuple(found.pairs), reduce_zero_label)


def _folder_split(folder: SegmentationFolder, name: str, split: str | None, purpose: str) -> str:
    """Returns a split of a folder by TFDS's usual name."""
    if split is None:
        # Not `test`, where there is another: most tests of segmentation have no labels.
        preferred = ('validation', *DEFAULT_SPLITS[purpose])
        found = next((split for split in preferred if split in folder.splits), None)
        if found is None:
            raise DataError(
                f'{shown(name)} has no split to evaluate on beside train; it needs images/val and '
                'labels/val'
            )
        return found
    found = SPLIT_FOLDERS.get(split.casefold())
    if found not in folder.splits:
        names = [folder.images[known].name for known in folder.splits]
        hint = '; parts of a split need a prepared set' if '[' in split else ''
        raise DataError(f'{unknown_name(f"split of {shown(name)}", split, names)}{hint}')
    return found


def _numbered(folder: SegmentationFolder, reduce_zero_label: bool) -> tuple[str, ...]:
    """Returns 'class 0' to the largest label of all splits."""
    counts = np.zeros(IGNORED + 1, np.int64)
    for split in folder.splits:
        pairs = find_pairs(folder, split).pairs
        checked = check_pairs(folder.root, pairs, None, reduce_zero_label, labels_only=True)
        counts += checked.counts
    return numbered_names(counts)
