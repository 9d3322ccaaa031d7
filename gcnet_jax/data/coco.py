"""A set of images with annotations in COCO's format: a folder with an `instances_*.json`.

Annotation files come from strangers. They are read as data, within limits of bytes and memory, and
everything that pycocotools trusts in them is checked first.
"""

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gcnet_jax.data.coco_annotations import ImageEntry, check_annotations
from gcnet_jax.errors import ConfigError, DataError, one_line, unknown_name
from gcnet_jax.files import as_path, parse_json, read_text

# COCO's own instances_train2017.json has 470 MB and takes some 3 GB when it is read.
MAX_ANNOTATION_BYTES = 500_000_000
MAX_PARSED_BYTES = 4_000_000_000
# What Python takes for one value of JSON, by the character that it cannot do without.
PARSED_BYTES = {'{': 240, '[': 100, ',': 32, '"': 30}
FILE_PATTERN = re.compile(r'instances_(.+)\.json')
PLAIN_FILE = 'instances.json'
FOLDERS = ('annotations', '')
MAX_LISTED = 5


@dataclasses.dataclass(frozen=True)
class CocoImage:
    """One image of a set.

    Attributes:
      id: Its number in the annotations.
      path: The file.
      size: Height and width in pixels, by the annotations.
    """

    id: int
    path: Path
    size: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class CocoSet:
    """Images and their annotations; see `load_coco`.

    Attributes:
      name: The folder, as the user wrote it.
      split: Such as 'val2017'; empty where the file is `instances.json`.
      file: The annotation file.
      images: Those whose file exists, in the order of the annotation file.
      missing: Files of images that do not exist.
      categories: Name of each category by its id. Ids may have gaps.
      objects: The annotations of all images, see `coco_annotations.Annotations`.
      ids: What the annotation file numbers them by.
      notes: What is unusual about the set, a line each; to be shown to the user.
    """

    name: str
    split: str
    file: Path
    images: tuple[CocoImage, ...]
    missing: tuple[Path, ...]
    categories: dict[int, str]
    objects: Sequence[dict[str, Any]]
    ids: tuple[int, ...]
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)


def load_coco(directory: str | os.PathLike, split: str | None = None) -> CocoSet:
    """Opens a folder of images with annotations in COCO's format.

    The annotations are `annotations/instances_SPLIT.json` or `instances_SPLIT.json`, or
    `instances.json` in either place. The images are in `SPLIT/`, `images/SPLIT/`, `images/` or the
    folder itself. No image is opened here.

    Args:
      directory: The folder.
      split: Such as 'val2017'; may be None where there is one annotation file.

    Raises:
      ConfigError: There are several annotation files and no split is given, or not of this split.
      DataError: There is no annotation file, it is damaged or too large, or there is none of its
        images; see also `coco_annotations.check_annotations`.
    """
    root = as_path(directory)
    split, file = _find_file(root, split)
    contents = _read_annotations(file)
    # The file's name is enough to tell what a note is about.
    annotations = check_annotations(contents, file.relative_to(root))
    folder = _find_folder(root, split, annotations.images, file)
    images, missing = [], []
    for entry in annotations.images:
        path = folder / entry.file_name
        if _is_file(path):
            images.append(CocoImage(entry.id, path, entry.size))
        else:
            missing.append(path)
    notes = annotations.notes
    if missing:
        count = f'{len(missing):,} of {len(annotations.images):,} images'
        notes = (f'{count} are missing and left out (first {one_line(missing[0])})', *notes)
    return CocoSet(
        name=os.fsdecode(directory),
        split=split,
        file=file,
        images=tuple(images),
        missing=tuple(missing),
        categories=annotations.categories,
        objects=annotations.objects,
        ids=annotations.ids,
        notes=notes,
    )


def annotation_files(root: Path) -> dict[str, Path]:
    """Returns the annotation file of each split; the split is empty for `instances.json`.

    Raises:
      DataError: The folder cannot be read.
    """
    if not root.is_dir():
        raise DataError(
            f'{one_line(root)} is not a directory; give the folder that holds annotations/'
        )
    files: dict[str, Path] = {}
    for folder in FOLDERS:
        try:
            names = sorted(os.listdir(root / folder)) if (root / folder).is_dir() else []
        except OSError as error:
            raise DataError(
                f'{one_line(root / folder)} cannot be read ({error.strerror})'
            ) from error
        for name in names:
            found = FILE_PATTERN.fullmatch(name)
            if found or name == PLAIN_FILE:
                files.setdefault(found[1] if found else '', root / folder / name)
    return files


def _find_file(root: Path, split: str | None) -> tuple[str, Path]:
    """Returns the split and its annotation file."""
    files = annotation_files(root)
    if split is not None:
        if split not in files or not split:
            raise _no_split(root, split, files)
        return split, files[split]
    if not files:
        raise DataError(
            f'no annotations in {one_line(root)}: looked for annotations/instances_*.json, '
            'instances_*.json, annotations/instances.json and instances.json'
        )
    if len(files) > 1:
        alone = '' if '' not in files else f'; {PLAIN_FILE} is read only where it is alone'
        raise ConfigError(
            f'{one_line(root)} has annotations of several splits, {_listed(files)}; choose one'
            f'{alone}'
        )
    return next(iter(files.items()))


def _no_split(root: Path, split: str, files: dict[str, Path]) -> ConfigError:
    named = sorted(name for name in files if name)
    if named:
        return ConfigError(f'{unknown_name(f"split of {one_line(root)}", split, named)}')
    return ConfigError(
        f'{one_line(root)} has no split {one_line(split)!r}: there is neither '
        f'annotations/instances_{one_line(split)}.json nor instances_{one_line(split)}.json'
    )


def _listed(files: dict[str, Path]) -> str:
    names = [one_line(name, 60) or PLAIN_FILE for name in sorted(files)]
    more = f' and {len(names) - MAX_LISTED} more' if len(names) > MAX_LISTED else ''
    return ', '.join(names[:MAX_LISTED]) + more


def _read_annotations(file: Path) -> Any:
    text = read_text(file, MAX_ANNOTATION_BYTES, DataError)
    size = sum(text.count(character) * size for character, size in PARSED_BYTES.items())
    if size > MAX_PARSED_BYTES:
        raise DataError(
            f'{one_line(file)} would take about {size / 1e9:.1f} GB of memory; at most '
            f'{MAX_PARSED_BYTES / 1e9:.1f} GB are used'
        )
    return parse_json(text, file, DataError)


def _find_folder(root: Path, split: str, images: Sequence[ImageEntry], file: Path) -> Path:
    """Returns the folder that the images' file names are relative to."""
    names = (split, f'images/{split}', 'images', '') if split else ('images', '')
    folders = [root / name for name in names if (root / name).is_dir()]
    for folder in folders:
        if any(_is_file(folder / image.file_name) for image in images):
            return folder
    looked = ', '.join(one_line(folder) for folder in folders)
    raise DataError(
        f'none of the {len(images):,} images of {one_line(file)} exists, such as '
        f'{one_line(images[0].file_name, 80)}; looked in {looked}'
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # A name that is too long, or no name at all.
        return False
