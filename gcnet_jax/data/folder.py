"""A folder of images, one folder a class, prepared once into a set that is loaded by its name."""

import collections
import concurrent.futures
import dataclasses
import functools
import math
import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from gcnet_jax.data import digits
from gcnet_jax.data.decode import verify
from gcnet_jax.data.image_limits import image_file
from gcnet_jax.data.records import VERSION, Example, ImageSet, default_data_dir, write_image_set
from gcnet_jax.errors import ConfigError, DataError, one_line
from gcnet_jax.files import as_path

# Folder of a split, in any case -> split, by TFDS's usual names.
SPLIT_FOLDERS = {
    **{'train': 'train', 'training': 'train'},
    **{'val': 'validation', 'valid': 'validation', 'validation': 'validation', 'dev': 'validation'},
    **{'test': 'test', 'testing': 'test'},
}
# What systems and archives leave in folders, beside hidden files.
SYSTEM_ENTRIES = {
    *('thumbs.db', 'ehthumbs.db', 'desktop.ini', 'icon\r', '__macosx', '@eadir'),
    *('$recycle.bin', 'system volume information', 'lost+found'),
}
MAX_DEPTH = 10  # Of folders that hold nothing but another folder.
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
      empty: Folders of classes that hold no files and so make no class.
    """

    name: str
    path: Path
    label_names: tuple[str, ...]
    split_sizes: dict[str, int]
    damaged: tuple[str, ...]
    empty: tuple[str, ...] = ()

    def train_settings(self, batch_size: int | None = None) -> tuple[str, ...]:
        """Returns the settings of a config that train on this set, `data.name=...` and others.

        Args:
          batch_size: That of the config. Where there are fewer training images, a smaller one is
            among the settings: the largest power of two of which an epoch has at least four, but no
            fewer than two images.
        """
        settings, images = [f'data.name={self.name}'], self.split_sizes['train']
        if not {'validation', 'test'} & self.split_sizes.keys():
            settings += ['data.train_split=train[:90%]', 'data.evaluation_split=train[90%:]']
            images = round(0.9 * images)
        if batch_size is not None and images < batch_size:
            fitting = 2 ** max(1, int(math.log2(max(1, images // 4))))
            settings.append(f'training.batch_size={min(fitting, images)}')
        return tuple(settings)


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
    _check_name(name, data_dir, overwrite)
    if not 0 <= test_fraction < 1:
        raise ConfigError(f'test_fraction is {test_fraction}; it is at least 0 and less than 1')
    splits, empty = _find_splits(root)
    _check_class_names({label for items in splits.values() for _, label in items})
    label_names = tuple(sorted({label for _, label in splits['train']}))
    damaged = _find_damaged(root, [item for items in splits.values() for item in items])
    if damaged and not skip_damaged:
        raise _damaged_files(root, damaged)
    splits = {
        split: [item for item in items if item[0] not in damaged] for split, items in splits.items()
    }
    if len(splits) == 1:
        splits = _draw_test_split(splits['train'], test_fraction, seed)
    _check_splits(root, splits, label_names)
    make_builder = functools.partial(_make_builder, name, root, label_names, splits)
    path, written = write_image_set(make_builder, data_dir, overwrite=overwrite, progress=progress)
    if not written:
        raise ConfigError(f'data set {name!r} was prepared in {_shown(path)} in the meantime')
    sizes = {split: len(items) for split, items in splits.items()}
    return PreparedFolder(name, path, label_names, sizes, tuple(damaged.values()), empty)


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
            f'data set {name!r} is already in {_shown(place)}; choose another name or overwrite it'
        )
    if place.exists() and not (place / VERSION / 'features.json').exists() and any(place.iterdir()):
        raise ConfigError(f'{_shown(place)} holds no prepared folder; it is not overwritten')


def _find_splits(root: Path) -> tuple[dict[str, list[Item]], tuple[str, ...]]:
    """Returns the files of each split with their classes, and the folders of empty classes."""
    if not root.is_dir():
        raise DataError(f'{_shown(root)} is not a directory; give a folder of images')
    place = _unwrap(root)
    folders = _subfolders(place)
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
                f'{_shown(place)} has {" and ".join(_shown(folder.name) for folder in folders)} '
                'and no train; training needs a folder train'
            )
        if split is None or split in splits:
            raise DataError(
                f'{_shown(folder)} does not fit beside train; a folder has train and any of val '
                'and test, or one folder a class: rename it if it is one of these, or prepare a '
                'folder of links to those that belong to the data set'
            )
        splits[split], empty = _find_items(_unwrap(folder, within='split'))
        all_empty += empty
    return splits, _relative(all_empty, root)


def _split_of(folder: Path) -> str | None:
    """Returns the split that a folder stands for; one without folders in it may be a class."""
    split = SPLIT_FOLDERS.get(folder.name.casefold())
    if split is None or _subfolders(folder):
        return split
    siblings = [sibling for sibling in _subfolders(folder.parent) if sibling != folder]
    return split if any(_subfolders(sibling) for sibling in siblings) else None


def _unwrap(folder: Path, within: str | None = None) -> Path:
    """Goes down through folders that hold nothing but another folder, as archives make them."""
    for _ in range(MAX_DEPTH):
        inner = _subfolders(folder)
        if len(inner) != 1:
            return folder
        if within == 'class':
            if len(_entries(folder)) > 1:
                return folder
        elif not _subfolders(inner[0]) or (
            within is None and inner[0].name.casefold() in SPLIT_FOLDERS
        ):
            return folder  # It holds a class, or a split.
        folder = inner[0]
    return folder


def _entries(folder: Path) -> list[Path]:
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f'{_shown(folder)} cannot be read ({error.strerror})') from error
    return [
        entry
        for entry in entries
        if not entry.name.startswith('.') and entry.name.casefold() not in SYSTEM_ENTRIES
    ]


def _subfolders(folder: Path) -> list[Path]:
    return [entry for entry in _entries(folder) if entry.is_dir()]


def _find_items(folder: Path) -> tuple[list[Item], list[Path]]:
    """Lists whatever lies in the class folders; what is no image comes out when it is checked."""
    items, empty = [], []
    class_folders = _subfolders(folder)
    for class_folder in class_folders:
        entries = _entries(_unwrap(class_folder, within='class'))
        items += [(entry, class_folder.name) for entry in entries]
        if not entries:
            empty.append(class_folder)
    if not class_folders and _entries(folder):
        raise DataError(
            f'{_shown(folder)} has no folders for classes, so nothing says what is in its images; '
            'it has no images of a class: put them into one folder a class, or prepare a folder of '
            'links to the splits that have labels'
        )
    if not items:
        raise DataError(
            f'{_shown(folder)} has no images; it needs one folder a class with images in it'
        )
    return items, empty


def _relative(folders: list[Path], root: Path) -> tuple[str, ...]:
    return tuple(one_line(folder.relative_to(root)) for folder in folders)


def _check_class_names(names: set[str]) -> None:
    """Refuses names that would shift the labels: they are stored one a line, without margins."""
    alike = collections.defaultdict(list)
    for name in sorted(names):
        reason = None
        if any(unicodedata.category(letter) == 'Cs' for letter in name):
            reason = 'it is not UTF-8 text'
        elif any(unicodedata.category(letter) in ('Cc', 'Zl', 'Zp') for letter in name):
            reason = 'it contains a line break or another control character'
        elif not _visible(name):
            reason = 'it is blank'
        elif name != name.strip().strip('\ufeff'):
            reason = 'it begins or ends with a blank'
        if reason:
            raise DataError(
                f'the class folder {_shown(name)} cannot name a class: {reason}, and labels are '
                'stored one a line; rename the folder'
            )
        alike[_visible(name)].append(name)
    for same in alike.values():
        if len(same) > 1:
            raise DataError(
                f'the class folders {" and ".join(map(_shown, same))} differ only in blanks or in '
                'how their letters are encoded; rename or merge them'
            )


def _visible(name: str) -> str:
    """Returns a name without blanks and invisible characters, in one form of encoding."""
    return ''.join(
        letter
        for letter in unicodedata.normalize('NFC', name)
        if not letter.isspace() and unicodedata.category(letter) != 'Cf'
    )


def _shown(name: object) -> str:
    return f"'{one_line(name)}'"


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


def _damaged_files(root: Path, damaged: dict[Path, str]) -> DataError:
    listed = '; '.join(list(damaged.values())[:MAX_LISTED])
    more = f' and {len(damaged) - MAX_LISTED} more' if len(damaged) > MAX_LISTED else ''
    return DataError(
        f'{len(damaged)} files in {_shown(root)} are no readable images: {listed}{more}; '
        'they can stay where they are and be left out of the data set with skip_damaged '
        '(--skip-damaged)'
    )


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
            f'{_shown(root)} has one class, {_shown(label_names[0])}; two are needed, '
            'one folder each'
        )
    for split, items in splits.items():
        labels = {label for _, label in items}
        unknown = sorted(labels - set(label_names))
        if unknown:
            listed = ', '.join(map(one_line, unknown[:MAX_LISTED]))
            raise DataError(f'{split} of {_shown(root)} has classes that train lacks: {listed}')
        if not items:
            raise DataError(f'{split} of {_shown(root)} has no readable image')
    empty = sorted(set(label_names) - {label for _, label in splits['train']})
    if empty:
        raise DataError(
            f'train of {_shown(root)} has no readable image of {", ".join(map(one_line, empty))}'
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
