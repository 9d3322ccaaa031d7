"""A folder in COCO's format, prepared once into a set that is loaded by its name."""

import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gcnet_jax.data.coco import CocoImage, CocoSet, annotation_files, load_coco
from gcnet_jax.data.decode import verify
from gcnet_jax.data.detection_set import (
    ObjectSet,
    SplitIndex,
    encode_object,
    is_degenerate,
    is_target,
    record_key,
)
from gcnet_jax.data.folder_entries import SPLIT_FOLDERS, damaged_files, shown
from gcnet_jax.data.image_limits import image_file
from gcnet_jax.data.prepared import PreparedSet, check_label_names, check_set_name, write_prepared
from gcnet_jax.data.records import Example
from gcnet_jax.errors import DataError, one_line
from gcnet_jax.files import as_path, reason

# 'train2017' is the split 'train'.
YEAR = re.compile(r'[-_]?\d*')
MAX_LISTED = 5


class SplitObjects(NamedTuple):
    """The objects of a prepared split.

    Attributes:
      targets: Objects to train on, without crowds and degenerate boxes.
      crowds: Crowds, which are left out of training.
      degenerate: Objects that are left out of training because their box within the image is less
        than a pixel wide or high, or their area 0.
      backgrounds: Images without an object to train on.
      most: The largest number of objects to train on in one image.
      has_masks: Whether each of the objects to train on has a mask.
    """

    targets: int
    crowds: int
    degenerate: int
    backgrounds: int
    most: int
    has_masks: bool


@dataclasses.dataclass(frozen=True)
class PreparedDetection(PreparedSet):
    """What `prepare_detection` made.

    Attributes:
      objects: By split.
      label_counts: Number of objects of each label to train on in the split `train`.
      notes: What is unusual about the annotations, a line each.
    """

    objects: dict[str, SplitObjects] = dataclasses.field(default_factory=dict)
    label_counts: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


class _Image(NamedTuple):
    """An image with its annotations, and the label of each."""

    image: CocoImage
    objects: list[dict[str, Any]]
    labels: list[int]


def prepare_detection(
    directory: str | os.PathLike,
    name: str,
    data_dir: str | None = None,
    *,
    skip_damaged: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> PreparedDetection:
    """Writes a folder in COCO's format as a TFDS data set; the folder is not changed.

    The folder holds `annotations/instances_train2017.json`, `annotations/instances_val2017.json`
    and their images; see `coco.load_coco`. Splits are `train`, `val` and `test`, with or without a
    year; a single `instances.json` is the split `train`. Every image is decoded once to make sure
    that it can be, and stored as it is. Boxes, polygons and run lengths are stored exactly.

    Labels are the categories in the order of their ids in the split `train`; the categories of
    other splits are matched by their names. Images without annotations are stored too, and train a
    detector as background. Crowds, boxes of which less than a pixel is inside the image and objects
    without area are stored for evaluation, and left out of training.

    Args:
      directory: The folder.
      name: Name of the new data set: lower case letters, digits and underscores.
      data_dir: Where data sets live; TFDS's directory if None.
      skip_damaged: Leave out images that are missing, damaged or not of the size that the
        annotations say, and name them in the result, instead of refusing.
      overwrite: Replace a prepared folder of that name.
      progress: Show TFDS's progress bars on stderr.

    Raises:
      ConfigError: If the name cannot be used, or is taken.
      DataError: If there are no annotations, one is wrong (the error names file and annotation),
        the splits have different categories, an image cannot be used, a split has no object to
        train on, or data_dir cannot be written.
    """
    check_set_name(name, data_dir, overwrite)
    root = as_path(directory)
    splits = _load_splits(root)
    label_names = _label_names(splits)
    problems = {path: why for data in splits.values() for path, why in _problems(root, data)}
    if problems and not skip_damaged:
        raise damaged_files(root, problems.values(), 'cannot be used')
    images = {split: _images(data, label_names, problems) for split, data in splits.items()}
    indices = {split: _index(splits[split], members) for split, members in images.items()}
    make_builder = functools.partial(_make_builder, name, root, label_names, images, indices)
    path = write_prepared(name, make_builder, data_dir, overwrite=overwrite, progress=progress)
    return PreparedDetection(
        name,
        path,
        label_names,
        {split: len(members) for split, members in images.items()},
        tuple(problems.values()),
        objects={split: _count(images[split], indices[split]) for split in images},
        label_counts=_label_counts(images['train'], len(label_names)),
        notes=(*_notes(splits, problems), *_shared_files(splits)),
    )


def _load_splits(root: Path) -> dict[str, CocoSet]:
    """Opens the splits of a folder, `train` first."""
    files = annotation_files(root)
    if not files.keys() - {''}:
        return {'train': load_coco(root)}
    names: dict[str, str] = {}
    for name in sorted(filter(None, files)):
        split = next((SPLIT_FOLDERS[k] for k in SPLIT_FOLDERS if _is_split(name, k)), None)
        if split is None or split in names:
            taken = f', and {shown(files[names[split]].name)} is that of {split}' if split else ''
            raise DataError(
                f'{shown(files[name])} does not fit into {shown(root)}{taken}; annotations are '
                'instances_train.json and any of instances_val.json and instances_test.json, with '
                'or without a year: rename the file if it is one of these, or move it away'
            )
        names[split] = name
    if 'train' not in names:
        raise DataError(
            f'{shown(root)} has no annotations/instances_train.json (or instances_train2017.json, '
            'say); training needs one'
        )
    order = [split for split in ('train', 'validation', 'test') if split in names]
    return {split: load_coco(root, names[split]) for split in order}


def _is_split(name: str, known: str) -> bool:
    """Returns whether a name is a known one, with or without a number behind."""
    name = name.casefold()
    return name.startswith(known) and YEAR.fullmatch(name, len(known)) is not None


def _label_names(splits: dict[str, CocoSet]) -> tuple[str, ...]:
    """Returns the categories by their ids, and refuses those that the training split lacks."""
    train = splits['train']
    names = tuple(train.categories[number] for number in sorted(train.categories))
    check_label_names(names, 'category name', f'correct it in {one_line(train.file)}')
    for data in splits.values():
        unknown = [name for name in data.categories.values() if name not in names]
        if unknown:
            listed = ', '.join(one_line(name, 60) for name in unknown[:MAX_LISTED])
            more = f' and {len(unknown) - MAX_LISTED} more' if len(unknown) > MAX_LISTED else ''
            raise DataError(
                f'{one_line(data.file)} has categories that {one_line(train.file.name)} lacks: '
                f'{listed}{more}; all splits need the same categories, with the same names'
            )
    return names


def _problems(root: Path, data: CocoSet) -> Iterator[tuple[Path, str]]:
    """Yields the images that cannot be used, each with the reason in one line."""

    def check(image: CocoImage) -> str | None:
        try:
            with image_file(image.path) as contents:
                height, width = verify(contents)
        except (DataError, OSError) as error:
            return reason(error)
        if (height, width) == image.size:
            return None
        return (
            f'it has {width} x {height} pixels once its EXIF orientation is applied, and '
            f'{image.size[1]} x {image.size[0]} by {one_line(data.file.name)}'
        )

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        reasons = [*pool.map(check, data.images)]
    found = [(image.path, why) for image, why in zip(data.images, reasons, strict=True) if why]
    for path, why in (*found, *((path, 'no such file') for path in data.missing)):
        yield path, f'{one_line(path.relative_to(root))} ({why})'


def _images(data: CocoSet, label_names: Sequence[str], left_out: Collection[Path]) -> list[_Image]:
    """Returns the images of a split with their annotations, in the order they are stored in."""
    labels = {number: label_names.index(name) for number, name in data.categories.items()}
    objects: dict[int, list[dict[str, Any]]] = {image.id: [] for image in data.images}
    for item, number in zip(data.objects, data.ids, strict=True):
        if item['image_id'] in objects:  # Not that of an image that is missing.
            objects[item['image_id']].append(item | {'id': number})
    found = [
        _Image(image, objects[image.id], [labels[o['category_id']] for o in objects[image.id]])
        for image in data.images
        if image.path not in left_out
    ]
    # Annotation files may be sorted by what is in the images, and users take a part of a split.
    return sorted(found, key=_draw)


def _draw(member: _Image) -> bytes:
    """Returns where an image stands in a random order, which depends on nothing else."""
    name = f'{member.image.id} '.encode() + os.fsencode(member.image.path.name)
    return hashlib.sha256(name).digest()


def _index(data: CocoSet, images: Sequence[_Image]) -> SplitIndex:
    """Returns what is known of a split's images, and refuses a split that trains nothing."""
    if not images:
        raise DataError(f'{one_line(data.file)} has no image that can be used')
    targets = [[o for o in image.objects if is_target(o, image.image.size)] for image in images]
    if not any(targets):
        raise DataError(
            f'{one_line(data.file)} has no object to train on in its {len(images):,} images; '
            'crowds, boxes thinner than a pixel and objects without area do not count'
        )
    return SplitIndex(
        sizes=np.array([image.image.size for image in images], np.int32).reshape(-1, 2),
        counts=np.array([len(objects) for objects in targets], np.int32),
        has_masks=all('segmentation' in item for objects in targets for item in objects),
    )


def _count(images: Sequence[_Image], index: SplitIndex) -> SplitObjects:
    objects = [(item, image.image.size) for image in images for item in image.objects]
    crowds = sum(item['iscrowd'] for item, _ in objects)
    targets = int(index.counts.sum())
    return SplitObjects(
        targets=targets,
        crowds=crowds,
        degenerate=len(objects) - crowds - targets,
        backgrounds=int((index.counts == 0).sum()),
        most=int(index.counts.max()),
        has_masks=index.has_masks,
    )


def _label_counts(images: Sequence[_Image], num_classes: int) -> tuple[int, ...]:
    counts = np.zeros(num_classes, np.int64)
    for image in images:
        for item, label in zip(image.objects, image.labels, strict=True):
            counts[label] += is_target(item, image.image.size)
    return tuple(counts.tolist())


def _notes(splits: dict[str, CocoSet], left_out: Collection[Path]) -> tuple[str, ...]:
    """Returns what is unusual about the annotations, and which of them are not trained on."""
    notes = []
    for data in splits.values():
        notes += data.notes
        sizes = {image.id: image.size for image in data.images if image.path not in left_out}
        thin = [
            number
            for item, number in zip(data.objects, data.ids, strict=True)
            if item['image_id'] in sizes
            and not item['iscrowd']
            and is_degenerate(item, sizes[item['image_id']])
        ]
        if thin:
            notes.append(
                f'{one_line(data.file.name)}: objects that are not trained on, because less than '
                'a pixel of their width or height is inside the image or their area is 0: '
                f'{len(thin):,} (first annotation {thin[0]})'
            )
    return tuple(notes)


def _shared_files(splits: dict[str, CocoSet]) -> Iterator[str]:
    """Yields a note on each two splits that have files in common."""
    files = {split: {image.path for image in data.images} for split, data in splits.items()}
    for one, other in itertools.combinations(splits, 2):
        shared = sorted(files[one] & files[other])
        if shared:
            yield (
                f'files that are in {one} and in {other}, so that an evaluation on one says '
                f'little after training on the other: {len(shared):,} (first {one_line(shared[0])})'
            )


def _make_builder(
    name: str,
    root: Path,
    label_names: tuple[str, ...],
    images: dict[str, list[_Image]],
    indices: dict[str, SplitIndex],
    data_dir: str,
) -> ObjectSet:
    return ObjectSet(
        name,
        label_names=label_names,
        splits={
            split: functools.partial(_examples, root, members) for split, members in images.items()
        },
        indices=indices,
        data_dir=data_dir,
        description="A folder in COCO's format.",
    )


def _examples(root: Path, images: Sequence[_Image]) -> Iterator[Example]:
    for position, member in enumerate(images):
        with image_file(member.image.path) as data:
            yield (
                record_key(position, len(images)),
                {
                    'image': data,
                    # As bytes, because a name need not be UTF-8.
                    'file_name': os.fsencode(member.image.path.relative_to(root)),
                    'image_id': member.image.id,
                    'objects': [
                        encode_object(item, label)
                        for item, label in zip(member.objects, member.labels, strict=True)
                    ],
                },
            )
