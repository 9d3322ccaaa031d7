"""A folder of images, one folder a class, prepared once into a set that is loaded by its name."""

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gcnet_jax.data.decode import verify
from gcnet_jax.data.folder_entries import (
    MAX_LISTED,
    SPLIT_FOLDERS,
    damaged_files,
    entries,
    shown,
    subfolders,
)
from gcnet_jax.data.image_limits import image_file
from gcnet_jax.data.prepared import PreparedSet, check_label_names, check_set_name, write_prepared
from gcnet_jax.data.records import Example, ImageSet
from gcnet_jax.errors import ConfigError, DataError, one_line
from gcnet_jax.files import as_path

MAX_DEPTH = 10  # Of folders that hold nothing but another folder.

Item = tuple[Path, str]  # A file and its class.


@dataclasses.dataclass(frozen=True)
class PreparedFolder(PreparedSet):
    """What `prepare_folder` made.

    Attributes:
      empty: Folders of classes that hold no files and so make no class.
    """

    empty: tuple[str, ...] = ()


def prepare_folder(
    directory: str | os.PathLike,
    name: str,
    data_dir: str | None = None,
    *,
    test_fraction: float = 0.1,
    seed: int = 0,
    skip_damaged: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> PreparedFolder:
    """Writes a folder of images as a TFDS data set; the folder is not changed.

    The folder holds either `train/<class>/<image>` with any of `val` (or `valid`, `validation`,
    `dev`: becomes the split `validation`) and `test` beside it, in any case, or `<class>/<image>`,
    of which a part of every class is drawn for the split `test`. A folder that holds nothing but
    another folder stands for that one. Classes are numbered in the order of their names. Hidden
    files and those of operating systems are ignored, links are followed. Every image is decoded
    once to make sure that it can be.

    Args:
      directory: The folder.
      name: Name of the new data set: lower case letters, digits and underscores.
      data_dir: Where data sets live; TFDS's directory if None.
      test_fraction: Share of every class that goes to `test` where the folder has no splits; 0 for
        none.
      seed: Of that draw.
      skip_damaged: Leave out what cannot be decoded, and name it in the result, instead of
        refusing.
      overwrite: Replace a prepared folder of that name.
      progress: Show TFDS's progress bars on stderr.

    Raises:
      ConfigError: If the name or the fraction cannot be used, or the name is taken.
      DataError: If the folder has no such form, a class has a name that label files cannot keep, an
        image is damaged, or data_dir cannot be written.
    """
    root = as_path(directory)
    check_set_name(name, data_dir, overwrite)
    if not 0 <= test_fraction < 1:
        raise ConfigError(f'test_fraction is {test_fraction}; it is at least 0 and less than 1')
    splits, empty = _find_splits(root)
    names = {label for items in splits.values() for _, label in items}
    check_label_names(names, 'class folder', 'rename the folder')
    label_names = tuple(sorted({label for _, label in splits['train']}))
    damaged = _find_damaged(root, [item for items in splits.values() for item in items])
    if damaged and not skip_damaged:
        raise damaged_files(root, damaged.values(), 'are no readable images')
    splits = {
        split: [item for item in items if item[0] not in damaged] for split, items in splits.items()
    }
    if len(splits) == 1:
        splits = _draw_test_split(splits['train'], test_fraction, seed)
    _check_splits(root, splits, label_names)
    make_builder = functools.partial(_make_builder, name, root, label_names, splits)
    path = write_prepared(name, make_builder, data_dir, overwrite=overwrite, progress=progress)
    sizes = {split: len(items) for split, items in splits.items()}
    return PreparedFolder(name, path, label_names, sizes, tuple(damaged.values()), empty)


def _find_splits(root: Path) -> tuple[dict[str, list[Item]], tuple[str, ...]]:
    """Returns the files of each split with their classes, and the folders of empty classes."""
    if not root.is_dir():
        raise DataError(f'{shown(root)} is not a directory; give a folder of images')
    place = _unwrap(root)
    folders = subfolders(place)
    split_folders = [folder for folder in folders if _split_of(folder)]
    if not split_folders:
        items, empty = _find_items(place)
        return {'train': items}, _relative(empty, root)
    splits, all_empty = {}, []
    # `train` first: errors about the other splits refer to it.
    for folder in sorted(folders, key=lambda folder: _split_of(folder) != 'train'):
        split = _split_of(folder)
        if not splits and split != 'train':
            raise DataError(
                f'{shown(place)} has {" and ".join(shown(folder.name) for folder in folders)} '
                'and no train; training needs a folder train'
            )
        if split is None or split in splits:
            raise DataError(
                f'{shown(folder)} does not fit beside train; a folder has train and any of val '
                'and test, or one folder a class: rename it if it is one of these, or prepare a '
                'folder of links to those that belong to the data set'
            )
        splits[split], empty = _find_items(_unwrap(folder, within='split'))
        all_empty += empty
    return splits, _relative(all_empty, root)


def _split_of(folder: Path) -> str | None:
    """Returns the split that a folder stands for; one without folders in it may be a class."""
    split = SPLIT_FOLDERS.get(folder.name.casefold())
    if split is None or subfolders(folder):
        return split
    siblings = [sibling for sibling in subfolders(folder.parent) if sibling != folder]
    return split if any(subfolders(sibling) for sibling in siblings) else None


def _unwrap(folder: Path, within: str | None = None) -> Path:
    """Goes down through folders that hold nothing but another folder, as archives make them."""
    for _ in range(MAX_DEPTH):
        inner = subfolders(folder)
        if len(inner) != 1:
            return folder
        if within == 'class':
            if len(entries(folder)) > 1:
                return folder
        elif not subfolders(inner[0]) or (
            within is None and inner[0].name.casefold() in SPLIT_FOLDERS
        ):
            return folder  # It holds a class, or a split.
        folder = inner[0]
    return folder


def _find_items(folder: Path) -> tuple[list[Item], list[Path]]:
    """Lists whatever lies in the class folders; what is no image comes out when it is checked."""
    items, empty = [], []
    class_folders = subfolders(folder)
    for class_folder in class_folders:
        found = entries(_unwrap(class_folder, within='class'))
        items += [(entry, class_folder.name) for entry in found]
        if not found:
            empty.append(class_folder)
    if not class_folders and entries(folder):
        raise DataError(
            f'{shown(folder)} has no folders for classes, so nothing says what is in its images; '
            'it has no images of a class: put them into one folder a class, or prepare a folder of '
            'links to the splits that have labels'
        )
    if not items:
        raise DataError(
            f'{shown(folder)} has no images; it needs one folder a class with images in it'
        )
    return items, empty


def _relative(folders: list[Path], root: Path) -> tuple[str, ...]:
    return tuple(one_line(folder.relative_to(root)) for folder in folders)


def _find_damaged(root: Path, items: list[Item]) -> dict[Path, str]:
    """Returns the files that cannot be decoded, with a description of each."""

    def check(item: Item) -> str | None:
        path = item[0]
        if path.is_dir():
            return 'a folder within a class'
        try:
            with image_file(path) as data:
                verify(data)
        except DataError as error:
            return one_line(error)
        except OSError as error:
            return error.strerror or str(error)
        return None

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        reasons = pool.map(check, items)
        return {
            path: f'{one_line(path.relative_to(root))} ({reason})'
            for (path, _), reason in zip(items, reasons, strict=True)
            if reason
        }


def _draw_test_split(items: list[Item], fraction: float, seed: int) -> dict[str, list[Item]]:
    """Divides the images at random, every class in proportion and at least one image each."""
    classes: dict[str, list[Item]] = {}
    for item in items:
        classes.setdefault(item[1], []).append(item)
    train, test = [], []
    for label in sorted(classes):
        members = classes[label]
        count = max(1, round(len(members) * fraction)) if fraction and len(members) > 1 else 0
        # The class's name in the seed: another class more or less changes nothing here.
        rng = np.random.default_rng([seed, *label.encode()])
        chosen = set(rng.permutation(len(members))[:count].tolist())
        train += [item for index, item in enumerate(members) if index not in chosen]
        test += [item for index, item in enumerate(members) if index in chosen]
    return {'train': train, 'test': test} if test else {'train': train}


def _check_splits(root: Path, splits: dict[str, list[Item]], label_names: tuple[str, ...]) -> None:
    if len(label_names) < 2:
        raise DataError(
            f'{shown(root)} has one class, {shown(label_names[0])}; two are needed, one folder each'
        )
    for split, items in splits.items():
        labels = {label for _, label in items}
        unknown = sorted(labels - set(label_names))
        if unknown:
            listed = ', '.join(map(one_line, unknown[:MAX_LISTED]))
            raise DataError(f'{split} of {shown(root)} has classes that train lacks: {listed}')
        if not items:
            raise DataError(f'{split} of {shown(root)} has no readable image')
    empty = sorted(set(label_names) - {label for _, label in splits['train']})
    if empty:
        raise DataError(
            f'train of {shown(root)} has no readable image of {", ".join(map(one_line, empty))}'
        )


def _make_builder(
    name: str,
    root: Path,
    label_names: tuple[str, ...],
    splits: dict[str, list[Item]],
    data_dir: str,
) -> ImageSet:
    return ImageSet(
        name,
        label_names=label_names,
        splits={
            split: functools.partial(_examples, root, items) for split, items in splits.items()
        },
        data_dir=data_dir,
        description='A folder of images, one folder a class.',
    )


def _examples(root: Path, items: list[Item]) -> Iterator[Example]:
    for path, label in items:
        # As bytes, because a name need not be UTF-8.
        file_name = os.fsencode(path.relative_to(root))
        with image_file(path) as data:
            yield file_name, {'image': data, 'label': label, 'file_name': file_name}
