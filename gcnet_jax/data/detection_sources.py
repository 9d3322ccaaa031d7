"""Images with objects: prepared sets by their names, and TFDS's own, such as `coco/2017`."""

import concurrent.futures
import functools
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from gcnet_jax.data.builders import find_builder
from gcnet_jax.data.coco import CocoImage, CocoSet
from gcnet_jax.data.decode import opened, upright_size
from gcnet_jax.data.detection_set import (
    ANNOTATION,
    ANNOTATION_KEY,
    LABEL_KEY,
    OBJECTS,
    SplitIndex,
    decode_objects,
    is_target,
    read_index,
)
from gcnet_jax.data.records import default_data_dir
from gcnet_jax.data.stored_split import StoredSplit, choose_split, open_split
from gcnet_jax.errors import DataError, UnlabelledError

# Images of a set of TFDS's that are searched for an object.
IMAGES_LOOKED_AT = 1000
MAX_THREADS = 16


class DetectionSource:
    """The images of one split with their objects, in random access.

    It can be pickled and shared between threads. There are two: `StoredObjects` and `StoredBoxes`.

    Attributes:
      name: Name of the data set.
      split: The split, such as `train[:90%]`.
      label_names: Name of each class, in the order of the labels.
      index: Sizes of all images, and numbers of the objects to train on.
    """

    name: str
    split: str
    label_names: tuple[str, ...]
    index: SplitIndex

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.label_names)

    @property
    def has_masks(self) -> bool:
        """Whether every object to train on has a mask."""
        return self.index.has_masks

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns `{'image': encoded bytes, 'size': (height, width), 'objects': [...]}`.

        Objects are COCO's annotations: 'bbox' (left, top, width and height in pixels of the upright
        image), 'area', 'iscrowd', and where there are masks 'segmentation'; their class is 'label'.

        Raises:
          DataError: If the record cannot be read.
        """
        raise NotImplementedError

    def describe(self, index: int) -> str:
        """Returns the name of a record for messages, with its file name where that is known."""
        raise NotImplementedError


class StoredObjects(StoredSplit, DetectionSource):
    """The images of a prepared split, with boxes and masks."""

    def __init__(self, *args: Any, index: SplitIndex, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.index = index

    def __getitem__(self, index: int) -> dict[str, Any]:
        features = self._read(index)
        try:
            objects = decode_objects(
                features[LABEL_KEY].int64_list.value, features[ANNOTATION_KEY].bytes_list.value
            )
        except DataError as error:
            raise DataError(f'{self.describe(index)}: {error}') from error
        _check_labels(self, index, objects)
        height, width = self.index.sizes[index].tolist()
        image = features[self._image_key].bytes_list.value[0]
        return {'image': image, 'size': (height, width), 'objects': objects}


class BoxKeys(NamedTuple):
    """The names of the features that TFDS stores objects under.

    Attributes:
      box: Top, left, bottom and right as shares of the image's height and width.
      label: Class.
      crowd: Whether it is a crowd; None where the set does not say.
      area: In pixels; None where the set does not say.
    """

    box: str
    label: str
    crowd: str | None
    area: str | None


class StoredBoxes(StoredSplit, DetectionSource):
    """The images of a split that TFDS's own code has prepared, with boxes and no masks.

    TFDS stores boxes in float32 and relative to the image, and does not store the images' sizes.
    All records are read once, when `index` is needed first.
    """

    def __init__(self, *args: Any, keys: BoxKeys, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._keys = keys

    @functools.cached_property
    def index(self) -> SplitIndex:
        with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, MAX_THREADS)) as pool:
            rows = [*pool.map(self._size_and_count, range(len(self)))]
        sizes, counts = zip(*rows, strict=True)
        return SplitIndex(np.array(sizes, np.int32), np.array(counts, np.int32), False)

    @property
    def has_masks(self) -> bool:
        return False  # Known without the index.

    def __getitem__(self, index: int) -> dict[str, Any]:
        features = self._read(index)
        image = features[self._image_key].bytes_list.value[0]
        try:
            with opened(image) as picture:
                size = upright_size(picture, image)
        except DataError:
            # The loader says so when it decodes the image, or replaces it.
            return {'image': image, 'size': (1, 1), 'objects': []}
        objects = self._objects(features, size)
        _check_labels(self, index, objects)
        return {'image': image, 'size': size, 'objects': objects}

    def _objects(self, features: Any, size: tuple[int, int]) -> list[dict[str, Any]]:
        keys = self._keys
        labels = list(features[keys.label].int64_list.value)
        boxes = np.array(features[keys.box].float_list.value, np.float64).reshape(-1, 4)
        crowds = features[keys.crowd].int64_list.value if keys.crowd else [0] * len(labels)
        top, left, bottom, right = (boxes * np.tile(size, 2)).T
        corners = np.stack([left, top, right - left, bottom - top], axis=-1)
        areas = features[keys.area].int64_list.value if keys.area else (corners[:, 2:].prod(axis=1))
        return [
            {
                'label': int(label),
                'bbox': box,
                # TFDS stores whole pixels: less than one is an area, too.
                'area': max(float(area), 1.0) if keys.area else float(area),
                'iscrowd': int(crowd),
            }
            for label, box, crowd, area in zip(labels, corners.tolist(), crowds, areas, strict=True)
        ]

    def _size_and_count(self, index: int) -> tuple[tuple[int, int], int]:
        record = self[index]
        return record['size'], sum(is_target(item, record['size']) for item in record['objects'])


def load_detection(
    name: str, split: str | None, data_dir: str | None = None, *, purpose: str = 'evaluation'
) -> DetectionSource:
    """Opens one split of a prepared set of images with objects.

    Args:
      name: The name of a folder prepared by `prepare_detection`, or of a set of TFDS's with boxes,
        such as `coco/2017`.
      split: A split or a part of it, as in `sources.load_source`. None for the one to measure a
        network on.
      data_dir: Directory of the prepared sets; TFDS's (`~/tensorflow_datasets`) if None.
      purpose: What a split that is not named is for: `selection` or `evaluation`.

    Raises:
      ConfigError: If the purpose is neither.
      DataError: If there is no such set or split, if it is empty, damaged, of another kind, or
        without an object to train on.
    """
    if split is None:
        split = choose_split(
            name, data_dir, purpose, lambda tried: load_detection(name, tried, data_dir)
        )
    info, opened_split = open_split(name, split, data_dir, _image_and_label)
    names = tuple(_label_feature(info, opened_split['label_key']).names)
    if opened_split['label_key'] == LABEL_KEY and ANNOTATION in info.features[OBJECTS].feature:
        index = read_index(info, name, split)
        source = StoredObjects(label_names=names, index=index, **opened_split)
        has_objects = index.counts.any()
    else:
        source = StoredBoxes(label_names=names, keys=_box_keys(info, name), **opened_split)
        looked_at = range(min(len(source), IMAGES_LOOKED_AT))
        has_objects = any(source[place]['objects'] for place in looked_at)
    source[0]  # An unreadable file shows here, before anything is built.
    if not has_objects:
        raise UnlabelledError(
            f"no image of data set {name!r} split '{split}' has an object to train on; choose a "
            'split that has annotations'
        )
    return source


def read_detection_names(name: str, data_dir: str | None = None) -> tuple[str, ...]:
    """Returns the names of a set's classes, as `load_detection` finds them.

    Raises:
      DataError: As `load_detection`.
    """
    place = os.path.expanduser(data_dir or default_data_dir())
    info = find_builder(name, place, given=data_dir is not None).info
    return tuple(_label_feature(info, _image_and_label(info, name)[1]).names)


def count_beyond(source: DetectionSource, max_boxes: int) -> tuple[int, int]:
    """Returns how many objects are left out at `max_boxes` an image, and in how many images."""
    beyond = np.maximum(source.index.counts - max_boxes, 0)
    return int(beyond.sum()), int((beyond > 0).sum())


def as_coco(source: DetectionSource) -> CocoSet:
    """Returns the annotations of a source in the form that the evaluation of detectors takes.

    Images are numbered by their places in the source, which batches of evaluation call 'index', and
    categories by their labels. Every record is read once.

    Raises:
      DataError: A record is damaged.
    """
    images, objects = [], []
    for place in range(len(source)):
        record = source[place]
        images.append(CocoImage(place, Path(source.describe(place)), record['size']))
        for item in record['objects']:
            kept = {key: value for key, value in item.items() if key != 'label'}
            # pycocotools takes an annotation with the id 0 for none.
            numbers = {'id': len(objects) + 1, 'image_id': place, 'category_id': item['label']}
            objects.append(kept | numbers)
    return CocoSet(
        name=source.name,
        split=source.split,
        file=Path(source.name),
        images=tuple(images),
        missing=(),
        categories=dict(enumerate(source.label_names)),
        objects=objects,
        ids=tuple(item['id'] for item in objects),
        notes=(),
    )


def _check_labels(source: Any, index: int, objects: list[dict[str, Any]]) -> None:
    for item in objects:
        if not 0 <= item['label'] < source.num_classes:
            raise DataError(
                f'{source.describe(index)} has an object with the label {item["label"]}; labels '
                f'are 0 to {source.num_classes - 1}'
            )


def _image_and_label(info: tfds.core.DatasetInfo, name: str) -> tuple[str, str]:
    """Returns the names of the image feature and of that of the objects' labels."""
    features = info.features if isinstance(info.features, dict | tfds.features.FeaturesDict) else {}
    images = [key for key, value in features.items() if type(value) is tfds.features.Image]
    found = [
        f'{key}/{inner}'
        for key, value in features.items()
        if isinstance(value, tfds.features.Sequence)
        and isinstance(value.feature, tfds.features.FeaturesDict)
        and (ANNOTATION in value.feature or _inner_of(value, tfds.features.BBoxFeature))
        for inner in _inner_of(value, tfds.features.ClassLabel)
    ]
    # A set may also say of an object how it stands, as a class of its own.
    found = [key for key in found if key.endswith('/label')] or found
    if len(images) != 1 or len(found) != 1:
        listed = ', '.join(f'{key} ({type(value).__name__})' for key, value in features.items())
        raise DataError(
            f'data set {name!r} is no detection set: it needs one Image and a Sequence of objects '
            f'with a BBoxFeature and a ClassLabel, and has {listed or "no features"}; a folder in '
            "COCO's format becomes one by `python -m gcnet_jax prepare --task detection FOLDER "
            '--name NAME`'
        )
    return images[0], found[0]


def _label_feature(info: tfds.core.DatasetInfo, label_key: str) -> tfds.features.ClassLabel:
    objects, label = label_key.rsplit('/', 1)
    return info.features[objects].feature[label]


def _box_keys(info: tfds.core.DatasetInfo, name: str) -> BoxKeys:
    label_key = _image_and_label(info, name)[1]
    objects = label_key.rsplit('/', 1)[0]
    sequence = info.features[objects]
    (box, *_) = _inner_of(sequence, tfds.features.BBoxFeature)

    def key(inner: str) -> str | None:
        return f'{objects}/{inner}' if inner in sequence.feature else None

    return BoxKeys(f'{objects}/{box}', label_key, key('is_crowd'), key('area'))


def _inner_of(sequence: Any, kind: type) -> list[str]:
    return [key for key, value in sequence.feature.items() if type(value) is kind]
