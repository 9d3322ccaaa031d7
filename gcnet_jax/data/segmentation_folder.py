"""A folder of images and label maps, prepared once into a set that is loaded by its name."""

import concurrent.futures
import dataclasses
import functools
import io
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int
from PIL import Image

from gcnet_jax.data.folder_entries import damaged_files, shown
from gcnet_jax.data.image_limits import image_file
from gcnet_jax.data.label_maps import IGNORED, MAX_CLASSES
from gcnet_jax.data.prepared import PreparedSet, check_set_name, write_prepared
from gcnet_jax.data.records import Example, ImageSet
from gcnet_jax.data.segmentation_files import (
    Pair,
    SegmentationFolder,
    check_classes,
    find_pairs,
    list_files,
    open_folder,
    read_classes,
    relative,
)
from gcnet_jax.data.segmentation_pairs import decode_labels, decode_picture
from gcnet_jax.errors import DataError, one_line
from gcnet_jax.files import as_path

VALUES = 256


@dataclasses.dataclass(frozen=True)
class PreparedSegmentation(PreparedSet):
    """What `prepare_segmentation` made.

    Attributes:
      pixels: Number of pixels of each value, 0 to 255, in the training label maps as stored.
      are_named: Whether the names of the classes were given, and not made up of their numbers.
      unlabelled: Images of the split `test` that have no label maps and are left out.
    """

    pixels: tuple[int, ...] = ()
    are_named: bool = True
    unlabelled: int = 0

    def shares(self) -> tuple[tuple[float, ...], float]:
        """Returns the share of each class in the pixels of the training images, and that of 255."""
        total = max(sum(self.pixels), 1)
        shares = tuple(count / total for count in self.pixels[: len(self.label_names)])
        return shares, self.pixels[IGNORED] / total


def prepare_segmentation(
    directory: str | os.PathLike,
    name: str,
    data_dir: str | None = None,
    *,
    label_names: Sequence[str] | None = None,
    reduce_zero_label: bool = False,
    skip_damaged: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> PreparedSegmentation:
    """Writes a folder of images and label maps as a TFDS data set; the folder is not changed.

    The folder holds `images/train` and `labels/train`, and any of `val` and `test`; see
    `segmentation_files`. Every file is decoded once to make sure that it can be, and stored as it
    is; label maps are encoded anew only where `reduce_zero_label` changes them.

    Args:
      directory: The folder.
      name: Name of the new data set: lower case letters, digits and underscores.
      data_dir: Where data sets live; TFDS's directory if None.
      label_names: Names of the classes in the order of their labels. If None, those in the folder's
        `classes.txt`; without it, 'class 0' to the largest label.
      reduce_zero_label: Make 0 the label that does not count (255) and every other one smaller by
        one, as is usual for ADE20K. Names are those of the labels after it.
      skip_damaged: Leave out what cannot be used, and name it in the result, instead of refusing:
        damaged files, labels that are no class, sizes that differ, files without a partner.
      overwrite: Replace a prepared folder of that name.
      progress: Show TFDS's progress bars on stderr.

    Raises:
      ConfigError: If the name cannot be used, or is taken.
      DataError: If the folder has no such form, a file cannot be used, a split is empty, or
        data_dir cannot be written.
    """
    check_set_name(name, data_dir, overwrite)
    folder = open_folder(as_path(directory))
    names = class_names(folder, label_names)
    splits, problems, counts = _usable(folder, names, reduce_zero_label, skip_damaged)
    are_named, names = names is not None, names or numbered_names(sum(counts.values()))
    if not counts['train'][:IGNORED].any():
        raise DataError(
            f'all pixels of the training label maps in {shown(folder.root)} are {IGNORED}'
        )
    make_builder = functools.partial(
        _make_builder, name, folder.root, names, splits, reduce_zero_label
    )
    path = write_prepared(name, make_builder, data_dir, overwrite=overwrite, progress=progress)
    return PreparedSegmentation(
        name,
        path,
        names,
        {split: len(pairs) for split, pairs in splits.items()},
        tuple(problems),
        pixels=tuple(counts['train'].tolist()),
        are_named=are_named,
        unlabelled=_count_unlabelled(folder),
    )


def _usable(
    folder: SegmentationFolder,
    label_names: tuple[str, ...] | None,
    reduce_zero_label: bool,
    skip_damaged: bool,
) -> tuple[dict[str, list[Pair]], list[str], dict[str, Int[np.ndarray, ' 256']]]:
    """Returns the intact pairs of each split, what is wrong with others, and the pixels' counts."""
    splits, problems, counts = {}, [], {}
    for split in folder.splits:
        found = find_pairs(folder, split)
        checked = check_pairs(folder.root, found.pairs, label_names, reduce_zero_label)
        splits[split] = [pair for pair in found.pairs if pair not in checked.problems]
        counts[split] = checked.counts
        problems += [*found.problems, *checked.problems.values()]
    if problems and not skip_damaged:
        raise damaged_files(folder.root, problems, 'cannot be used')
    for split, pairs in splits.items():
        if not pairs:
            raise DataError(f'{split} of {shown(folder.root)} has no image with a label map')
    return splits, problems, counts


def class_names(
    folder: SegmentationFolder, label_names: Sequence[str] | None
) -> tuple[str, ...] | None:
    """Returns the names that are given, else those in `classes.txt`; None where there are none.

    Raises:
      DataError: If one of them cannot be stored, or `classes.txt` cannot be read.
    """
    if label_names is not None:
        return check_classes(label_names, 'the list of classes')
    return read_classes(folder.root)


def numbered_names(counts: Int[np.ndarray, ' 256']) -> tuple[str, ...]:
    """Returns 'class 0' to the largest label.

    Args:
      counts: Number of pixels of each value in all label maps.

    Raises:
      DataError: If there are not two classes.
    """
    labels = np.flatnonzero(counts[:IGNORED])
    count = int(labels[-1]) + 1 if labels.size else 0
    if count < 2:
        raise DataError(
            f'the label maps hold no label but {"0" if count else ""}'
            f'{" and " if count and counts[IGNORED] else ""}{IGNORED if counts[IGNORED] else ""}, '
            f'and two classes are needed ({IGNORED} stands for pixels that do not count; where '
            'it is meant to be a class, write that as 1)'
        )
    return tuple(f'class {number}' for number in range(count))


@dataclasses.dataclass
class CheckedPairs:
    """What `check_pairs` found.

    Attributes:
      counts: Number of pixels of each value, 0 to 255, in the intact label maps.
      problems: Pairs that cannot be used, with the reason in one line.
    """

    counts: Int[np.ndarray, ' 256']
    problems: dict[Pair, str]


def check_pairs(
    root: Path,
    pairs: Sequence[Pair],
    label_names: tuple[str, ...] | None,
    reduce_zero_label: bool = False,
    labels_only: bool = False,
) -> CheckedPairs:
    """Decodes images and label maps, to find those that cannot be used, and counts labels.

    Args:
      root: The folder that they are in.
      pairs: The files.
      label_names: Names of the classes; None if any label is one.
      reduce_zero_label: See `prepare_segmentation`; counts are of the labels after it.
      labels_only: Leave the images alone.
    """
    counts, lock = np.zeros(VALUES, np.int64), threading.Lock()
    num_classes = len(label_names) if label_names else MAX_CLASSES

    def check(pair: Pair) -> str | None:
        current = pair.label
        try:
            with image_file(current) as data:
                labels = decode_labels(data, num_classes, reduce_zero_label=reduce_zero_label)
            if not labels_only:
                current = pair.image
                with image_file(current) as data:
                    decode_picture(data, labels.shape, (1, 1))
        except (DataError, OSError) as error:
            reason = getattr(error, 'strerror', None) or error
            return f'{relative(root, current)} ({one_line(reason)})'
        with lock:
            counts[:] += np.bincount(labels.ravel(), minlength=VALUES)
        return None

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        reasons = pool.map(check, pairs)
        problems = {
            pair: reason for pair, reason in zip(pairs, reasons, strict=True) if reason is not None
        }
    return CheckedPairs(counts, problems)


def _count_unlabelled(folder: SegmentationFolder) -> int:
    left_out = [place for split, place in folder.images.items() if split not in folder.labels]
    return sum(len(list_files(place)) for place in left_out)


def _make_builder(
    name: str,
    root: Path,
    label_names: tuple[str, ...],
    splits: dict[str, list[Pair]],
    reduce_zero_label: bool,
    data_dir: str,
) -> ImageSet:
    return ImageSet(
        name,
        label_names=label_names,
        splits={
            split: functools.partial(_examples, root, pairs, len(label_names), reduce_zero_label)
            for split, pairs in splits.items()
        },
        data_dir=data_dir,
        description='A folder of images and label maps.',
        label_maps=True,
    )


def _examples(
    root: Path, pairs: list[Pair], num_classes: int, reduce_zero_label: bool
) -> Iterator[Example]:
    for pair in pairs:
        # As bytes, because a name need not be UTF-8.
        file_name = os.fsencode(pair.image.relative_to(root))
        with image_file(pair.label) as label:
            if reduce_zero_label:
                label = _encode(decode_labels(label, num_classes, reduce_zero_label=True))
        with image_file(pair.image) as image:
            yield file_name, {'image': image, 'label': label, 'file_name': file_name}


def _encode(labels: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(labels).save(data, 'PNG')
    return data.getvalue()
