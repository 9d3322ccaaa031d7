"""A folder of images, one folder a class, prepared once into a set that is loaded by its name."""

import concurrent.futures
import dataclasses
import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from gcnet_jax.data import digits
from gcnet_jax.data.preprocess import verify
from gcnet_jax.data.records import VERSION, Example, ImageSet, default_data_dir, write_image_set
from gcnet_jax.errors import ConfigError, DataError
from gcnet_jax.files import as_path

# Folder beside `train` -> split, by TFDS's usual names.
EVALUATION_FOLDERS = {'val': 'validation', 'valid': 'validation', 'validation': 'validation'} | {
    'test': 'test'
}
MAX_LISTED = 5

Item = tuple[Path, str]  # A file and its class.


@dataclasses.dataclass(frozen=True)
class PreparedFolder:
    """What `prepare_folder` made.

    Attributes:
      name: What `load_source` takes.
      path: Directory of the ArrayRecord files.
      label_names: The classes, in the order of the labels.
      split_sizes: Number of images of each split.
      damaged: Files that were left out, each with the reason.
    """

    name: str
    path: Path
    label_names: tuple[str, ...]
    split_sizes: dict[str, int]
    damaged: tuple[str, ...]


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
    """Writes a folder of images as a TFDS data set, and leaves the folder as it is.

    The folder holds either `train/<class>/<image>` with any of `val` (or `valid`, `validation`:
    becomes the split `validation`) and `test` beside it, or `<class>/<image>`, of which a part of
    every class is drawn for the split `test`. Classes are numbered in the order of their names.
    Hidden files are ignored, links are followed. Every image is decoded once to make sure that it
    can be.

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
      DataError: If the folder has no such form, an image is damaged, or data_dir cannot be written.
    """
    root = as_path(directory)
    _check_name(name, data_dir, overwrite)
    if not 0 <= test_fraction < 1:
        raise ConfigError(f'test_fraction is {test_fraction}; it is at least 0 and less than 1')
    splits = _find_splits(root)
    label_names = tuple(sorted({label for _, label in splits['train']}))
    damaged = _find_damaged(root, [item for items in splits.values() for item in items])
    if damaged and not skip_damaged:
        listed = '; '.join(list(damaged.values())[:MAX_LISTED])
        more = f' and {len(damaged) - MAX_LISTED} more' if len(damaged) > MAX_LISTED else ''
        raise DataError(
            f'{len(damaged)} files in {str(root)!r} are no readable images: {listed}{more}; '
            'remove them, or leave them out with skip_damaged'
        )
    splits = {
        split: [item for item in items if item[0] not in damaged] for split, items in splits.items()
    }
    if len(splits) == 1:
        splits = _draw_test_split(splits['train'], test_fraction, seed)
    _check_splits(root, splits, label_names)
    make_builder = functools.partial(_make_builder, name, root, label_names, splits)
    path, written = write_image_set(make_builder, data_dir, overwrite=overwrite, progress=progress)
    if not written:
        raise ConfigError(f'data set {name!r} was prepared in {str(path)!r} in the meantime')
    sizes = {split: len(items) for split, items in splits.items()}
    return PreparedFolder(name, path, label_names, sizes, tuple(damaged.values()))


def _check_name(name: str, data_dir: str | None, overwrite: bool) -> None:
    if not re.fullmatch(r'[a-z][a-z0-9_]*', name):
        raise ConfigError(
            f'{name!r} cannot name a data set; use lower case letters, digits and underscores, '
            'beginning with a letter'
        )
    taken = name == digits.NAME or name in tfds.list_builders(with_community_datasets=False)
    if taken:
        raise ConfigError(f'{name!r} is the name of another data set; choose a name of your own')
    place = as_path(data_dir or default_data_dir(), 'data_dir') / name
    if place.exists() and not overwrite:
        raise ConfigError(
            f'data set {name!r} is already in {str(place)!r}; choose another name or overwrite it'
        )
    if place.exists() and not (place / VERSION / 'features.json').exists() and any(place.iterdir()):
        raise ConfigError(f'{str(place)!r} holds no prepared folder; it is not overwritten')


def _find_splits(root: Path) -> dict[str, list[Item]]:
    if not root.is_dir():
        raise DataError(f'{str(root)!r} is not a directory; give a folder of images')
    folders = {folder.name: folder for folder in _subfolders(root)}
    if 'train' not in folders:
        if set(folders) & set(EVALUATION_FOLDERS):
            raise DataError(
                f'{str(root)!r} has {" and ".join(sorted(folders))} and no train; '
                'training needs a folder train'
            )
        return {'train': _find_items(root)}
    splits = {'train': _find_items(folders.pop('train'))}
    for folder_name, folder in folders.items():
        split = EVALUATION_FOLDERS.get(folder_name)
        if split is None or split in splits:
            raise DataError(
                f'{str(folder)!r} does not fit beside train; '
                'a folder has train and any of val and test, or one folder a class'
            )
        splits[split] = _find_items(folder)
    return splits


def _subfolders(folder: Path) -> list[Path]:
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f'{str(folder)!r} cannot be read ({error.strerror})') from error
    return [entry for entry in entries if entry.is_dir() and not entry.name.startswith('.')]


def _find_items(folder: Path) -> list[Item]:
    """Lists whatever lies in the class folders; what is no image comes out when it is checked."""
    items = []
    for class_folder in _subfolders(folder):
        try:
            entries = sorted(class_folder.iterdir())
        except OSError as error:
            raise DataError(f'{str(class_folder)!r} cannot be read ({error.strerror})') from error
        items += [(entry, class_folder.name) for entry in entries if entry.name[0] != '.']
    if not items:
        raise DataError(
            f'{str(folder)!r} has no images; it needs one folder a class with images in it'
        )
    return items


def _find_damaged(root: Path, items: list[Item]) -> dict[Path, str]:
    """Returns the files that cannot be decoded, with a description of each."""

    def check(item: Item) -> str | None:
        path = item[0]
        if path.is_dir():
            return 'a folder within a class'
        if not path.is_file():  # A broken link, or a pipe, which would never end.
            return 'not a file'
        try:
            verify(path.read_bytes())
        except DataError as error:
            return str(error)
        except OSError as error:
            return error.strerror or str(error)
        return None

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        reasons = pool.map(check, items)
        return {
            path: f'{path.relative_to(root)} ({reason})'
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
            f'{str(root)!r} has one class, {label_names[0]!r}; two are needed, one folder each'
        )
    for split, items in splits.items():
        labels = {label for _, label in items}
        unknown = sorted(labels - set(label_names))
        if unknown:
            raise DataError(
                f'{split} of {str(root)!r} has classes that train lacks: {", ".join(unknown)}'
            )
        if not items:
            raise DataError(f'{split} of {str(root)!r} has no readable image')
    empty = sorted(set(label_names) - {label for _, label in splits['train']})
    if empty:
        raise DataError(f'train of {str(root)!r} has no readable image of {", ".join(empty)}')


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
        file_name = str(path.relative_to(root))
        yield file_name, {'image': path.read_bytes(), 'label': label, 'file_name': file_name}
