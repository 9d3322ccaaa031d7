"""Folders of images and label maps: which label map belongs to which image."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from gcnet_jax.data.folder_entries import SPLIT_FOLDERS, entries, shown, subfolders
from gcnet_jax.data.label_maps import IGNORED, MAX_CLASSES
from gcnet_jax.data.prepared import check_label_names
from gcnet_jax.errors import DataError, one_line
from gcnet_jax.files import read_text

# Names of the two folders, in any case: the usual ones, ADE20K's and Cityscapes' own.
IMAGE_FOLDERS = ('images', 'leftimg8bit')
LABEL_FOLDERS = ('labels', 'annotations', 'gtfine')
CLASSES_FILE = 'classes.txt'
MAX_CLASSES_BYTES = 100_000
MAX_DEPTH = 10  # Of folders within each other.

# Ends of the stems that are left out before an image is compared with a label map.
IMAGE_SUFFIX, LABEL_SUFFIX = '_leftImg8bit', '_gtFine_labelTrainIds'
# Cityscapes keeps colours, instances and polygons of an image beside its labels.
BESIDE_LABELS = '_gtFine_'
RAW_LABELS = '_gtFine_labelIds'


class Pair(NamedTuple):
    """An image and its label map."""

    image: Path
    label: Path


class FoundPairs(NamedTuple):
    """What a folder holds for one split.

    Attributes:
      pairs: In the order of the images' names.
      problems: Files without a partner, each with the reason, in one line.
    """

    pairs: list[Pair]
    problems: list[str]


class SegmentationFolder(NamedTuple):
    """A folder of images and label maps; see `open_folder`.

    Attributes:
      root: The folder, without others around it that hold nothing else.
      images, labels: The folder of each split, `train`, `validation` or `test`. Labels may lack
        `test`.
    """

    root: Path
    images: dict[str, Path]
    labels: dict[str, Path]

    @property
    def splits(self) -> list[str]:
        """The splits that have label maps."""
        return [split for split in self.images if split in self.labels]


def open_folder(root: Path, *, training: bool = True) -> SegmentationFolder:
    """Finds the splits of a folder with `images/{train,val,test}` and `labels/{train,val,test}`.

    Splits are spelled as in `folder_entries.SPLIT_FOLDERS`. `annotations` stands for `labels`, as
    in ADE20K, `leftImg8bit` and `gtFine` for the two as in Cityscapes. A folder that holds nothing
    but another folder stands for that one.

    Args:
      root: The folder.
      training: Whether it must have the split `train`.

    Raises:
      DataError: If the folder has no such form.
    """
    if not root.is_dir():
        raise DataError(f'{shown(root)} is not a directory; give a folder with images and labels')
    for _ in range(MAX_DEPTH):
        inner = subfolders(root)
        if len(inner) != 1 or inner[0].name.casefold() in IMAGE_FOLDERS + LABEL_FOLDERS:
            break
        root = inner[0]
    images = _splits(_one_of(root, 'images', IMAGE_FOLDERS), training)
    labels = _splits(_one_of(root, 'labels', LABEL_FOLDERS), training)
    for split, folder in images.items():
        if split not in labels and split != 'test':
            raise DataError(
                f'{shown(folder)} has no label maps: there is no folder of that split in labels'
            )
    for split, folder in labels.items():
        if split not in images:
            raise DataError(
                f'{shown(folder)} has no images: there is no folder of that split in images'
            )
    return SegmentationFolder(root, images, labels)


def find_pairs(folder: SegmentationFolder, split: str) -> FoundPairs:
    """Pairs the images of a split with its label maps, one to one by their stems.

    Folders within the split's are searched too, and are part of the stem. Cityscapes'
    `_leftImg8bit` and `_gtFine_labelTrainIds` are left out of it.

    Raises:
      DataError: If there is no file at all, or Cityscapes' labels were not converted.
    """
    images, problems = _by_stem(folder, folder.images[split], IMAGE_SUFFIX)
    labels, others = _by_stem(folder, folder.labels[split], LABEL_SUFFIX)
    problems += others
    if not images and not problems:
        raise DataError(f'{shown(folder.images[split])} has no images')
    if not labels and not others:
        raise DataError(f'{shown(folder.labels[split])} has no label maps')
    for stem in sorted(images.keys() ^ labels.keys()):
        if stem in images:
            problems.append(f'{relative(folder.root, images[stem])} (an image without a label map)')
        else:
            problems.append(f'{relative(folder.root, labels[stem])} (a label map without an image)')
    pairs = [Pair(images[stem], labels[stem]) for stem in sorted(images.keys() & labels.keys())]
    return FoundPairs(pairs, problems)


def read_classes(root: Path) -> tuple[str, ...] | None:
    """Returns the names in `classes.txt`, one per line in the order of the labels; None without it.

    Raises:
      DataError: If the file cannot be read, or a name cannot be stored.
    """
    file = root / CLASSES_FILE
    if not file.exists():
        return None
    lines = read_text(file, MAX_CLASSES_BYTES, DataError).removeprefix('\ufeff').splitlines()
    while lines and not lines[-1].strip():
        lines.pop()
    return check_classes(lines, str(file))


def check_classes(names: Sequence[str], where: str) -> tuple[str, ...]:
    """Returns names of classes, without blanks around them.

    Args:
      names: In the order of the labels.
      where: Where they stand, for errors.

    Raises:
      DataError: If there are fewer than two or too many, two are equal, or one cannot be stored.
    """
    names = tuple(name.strip() for name in names)
    if not 2 <= len(names) <= MAX_CLASSES:
        raise DataError(
            f'{one_line(where)} has {len(names)} classes; 2 to {MAX_CLASSES} are needed, one for '
            f'each label ({IGNORED} stands for pixels that do not count)'
        )
    for number, name in enumerate(names):
        if not name:
            raise DataError(f'{one_line(where)} has no name for the label {number}: it is blank')
        if name in names[:number]:
            raise DataError(
                f'{one_line(where)} has the name {shown(name)} for the labels '
                f'{names.index(name)} and {number}; give each a name of its own'
            )
    check_label_names(names)
    return names


def relative(root: Path, path: Path) -> str:
    """Returns a file's name within a folder, for one line of output."""
    return one_line(path.relative_to(root))


def _one_of(root: Path, what: str, names: tuple[str, ...]) -> Path:
    found = [folder for folder in subfolders(root) if folder.name.casefold() in names]
    if not found:
        raise DataError(
            f'{shown(root)} has no folder {what}; it needs images/train and labels/train, and '
            'images/val and labels/val beside them'
        )
    if len(found) > 1:
        raise DataError(
            f'{shown(root)} has {" and ".join(shown(folder.name) for folder in found)}; rename '
            f'what does not hold the {what}'
        )
    return found[0]


def _splits(folder: Path, training: bool) -> dict[str, Path]:
    """Returns the folders of the splits, `train` first."""
    splits: dict[str, Path] = {}
    for inner in subfolders(folder):
        split = SPLIT_FOLDERS.get(inner.name.casefold())
        if split is None or split in splits:
            raise DataError(
                f'{shown(inner)} does not fit into {shown(folder)}, which holds train and any of '
                'val and test; rename it if it is one of these, or move it away'
            )
        splits[split] = inner
    if training and 'train' not in splits:
        raise DataError(f'{shown(folder)} has no folder train; training needs one')
    if not splits:
        raise DataError(f'{shown(folder)} has no folder of a split: train, val or test')
    return {split: splits[split] for split in ('train', 'validation', 'test') if split in splits}


def _by_stem(
    folder: SegmentationFolder, place: Path, suffix: str
) -> tuple[dict[str, Path], list[str]]:
    """Returns the files of a split by their stems, and what is wrong with the others."""
    files, problems = list_files(place), []
    if suffix == LABEL_SUFFIX:
        raw = next((file for file in files if file.stem.endswith(RAW_LABELS)), None)
        kept = [
            file
            for file in files
            if BESIDE_LABELS not in file.name or file.stem.endswith(LABEL_SUFFIX)
        ]
        if raw and not any(file.stem.endswith(LABEL_SUFFIX) for file in kept):
            raise DataError(
                f"{relative(folder.root, raw)} holds Cityscapes' raw labels; make the files "
                '*_gtFine_labelTrainIds.png of them once: pip install cityscapesscripts && '
                'CITYSCAPES_DATASET=DIR csCreateTrainIdLabelImgs'
            )
        files = kept
    found: dict[str, Path] = {}
    twice = set()
    for file in files:
        stem = os.fsdecode(file.relative_to(place).with_name(file.stem.removesuffix(suffix)))
        if stem in found:
            twice.add(stem)
            problems.append(
                f'{relative(folder.root, file)} (has the stem of {one_line(found[stem].name)})'
            )
        else:
            found[stem] = file
    for stem in sorted(twice):
        problems.append(f'{relative(folder.root, found[stem])} (its stem is there twice)')
    return {stem: file for stem, file in found.items() if stem not in twice}, problems


def list_files(place: Path, depth: int = 0) -> list[Path]:
    """Lists all files of a folder and of the folders in it, in the order of their names."""
    if depth > MAX_DEPTH:
        raise DataError(f'{shown(place)} lies more than {MAX_DEPTH} folders deep in its split')
    found = []
    for entry in entries(place):
        found += list_files(entry, depth + 1) if entry.is_dir() else [entry]
    return found
