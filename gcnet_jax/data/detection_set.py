"""How images with objects are stored, and what is known of them before a record is read.

Each object is stored as COCO's annotation of it, as JSON, which keeps boxes, polygons and run
lengths exactly. The sizes of the images and the numbers of their objects stand in the description
of the set, so that batches can be planned without reading images.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int

from gcnet_jax.data.records import ImageSet
from gcnet_jax.errors import DataError

OBJECTS, LABEL, ANNOTATION = 'objects', 'label', 'annotation'
LABEL_KEY, ANNOTATION_KEY = f'{OBJECTS}/{LABEL}', f'{OBJECTS}/{ANNOTATION}'
# What is stored of an annotation, where it has it.
STORED = ('id', 'bbox', 'area', 'iscrowd', 'segmentation')
# Parts of a set's description, each by split.
SIZES, COUNTS, MASKS = 'sizes', 'objects', 'masks'
# Least width and height of a box to train on, in pixels of the original image.
MIN_SIDE = 1.0
# TFDS sorts a large set in parts by the leading bits of keys of this length.
KEY_BITS = 128


@dataclasses.dataclass(frozen=True, eq=False)
class SplitIndex:
    """What is known of the images of a split without reading them.

    Attributes:
      sizes: Height and width of each in pixels, upright.
      counts: Number of its objects that are trained on, see `is_target`.
      has_masks: Whether each of these objects has a mask.
    """

    sizes: Int[np.ndarray, 'images 2']
    counts: Int[np.ndarray, ' images']
    has_masks: bool


class ObjectSet(ImageSet):
    """A TFDS builder for images with objects, stored in the order in which they are given.

    An example is `{'image': encoded bytes, 'file_name': str, 'image_id': int, 'objects': [{'label':
    int, 'annotation': JSON text}]}`, under a key of `record_key`.

    Args:
      indices: What is known of each split, in the order of its examples. The others are
        `ImageSet`'s.
    """

    def __init__(self, name: str, *, indices: Mapping[str, SplitIndex], **options: Any) -> None:
        self._indices = indices
        super().__init__(name, **options)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            'image_id': np.int64,
            OBJECTS: tfds.features.Sequence(
                {
                    LABEL: tfds.features.ClassLabel(names=self._label_names),
                    ANNOTATION: tfds.features.Text(),
                }
            ),
        }
        parts: dict[str, dict[str, Any]] = {SIZES: {}, COUNTS: {}, MASKS: {}}
        for split, index in self._indices.items():
            parts[SIZES][split] = index.sizes.tolist()
            parts[COUNTS][split] = index.counts.tolist()
            parts[MASKS][split] = index.has_masks
        metadata = tfds.core.MetadataDict(parts)
        return self._make_info(features, disable_shuffling=True, metadata=metadata)


def record_key(position: int, count: int) -> int:
    """Returns the key of the example at a position of `count`; keys are spread out evenly.

    TFDS sorts the examples by their keys, in parts that fit into memory where the keys differ in
    their leading bits.
    """
    return (position << KEY_BITS) // count


def encode_object(item: Mapping[str, Any], label: int) -> dict[str, Any]:
    """Returns an annotation as it is stored; numbers come back as they were, bit for bit."""
    kept = {key: item[key] for key in STORED if key in item}
    return {LABEL: label, ANNOTATION: json.dumps(kept, separators=(',', ':'))}


def decode_objects(labels: Sequence[int], annotations: Sequence[bytes]) -> list[dict[str, Any]]:
    """Returns the objects of a record as COCO has them, with 'label' in place of the category.

    Raises:
      DataError: They are damaged.
    """
    try:
        objects = [
            {'label': int(label), **json.loads(text)}
            for label, text in zip(labels, annotations, strict=True)
        ]
        for item in objects:
            item['bbox'] = [float(number) for number in item['bbox']]
            if len(item['bbox']) != 4 or not np.isfinite([*item['bbox'], item['area']]).all():
                raise ValueError
            item['iscrowd'] = int(item['iscrowd'])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise DataError('its objects are damaged; prepare the data set again') from error
    return objects


def is_target(item: Mapping[str, Any], size: tuple[int, int]) -> bool:
    """Returns whether a detector learns from an object: no crowd, and not degenerate.

    Args:
      item: With 'bbox' (left, top, width, height), 'area' and 'iscrowd', as in COCO.
      size: Height and width of its image.
    """
    return not item['iscrowd'] and not is_degenerate(item, size)


def is_degenerate(item: Mapping[str, Any], size: tuple[int, int]) -> bool:
    """Returns whether an object's box within its image is thinner than a pixel, or its area 0."""
    left, top, width, height = item['bbox']
    inside_width = min(left + width, size[1]) - max(left, 0)
    inside_height = min(top + height, size[0]) - max(top, 0)
    return min(inside_width, inside_height) < MIN_SIDE or item['area'] <= 0


def read_index(info: tfds.core.DatasetInfo, name: str, split: str) -> SplitIndex:
    """Returns what the description of a set says of a split or of a part of one.

    Args:
      info: Of a set that `ObjectSet` wrote.
      name: Of the set, for errors.
      split: In TFDS's notation, such as `train[:90%]`.

    Raises:
      DataError: It does not fit the files.
    """
    try:
        tables = {part: dict(info.metadata[part]) for part in (SIZES, COUNTS, MASKS)}
        starts, lengths = _shards(info), info.splits
        sizes, counts, has_masks = [], [], True
        for file in info.splits[split].file_instructions:
            whole, first = starts[Path(file.filename).name]
            part = slice(first + file.skip, first + file.skip + file.take)
            if not lengths[whole].num_examples == len(tables[SIZES][whole]):
                raise ValueError
            sizes += tables[SIZES][whole][part]
            counts += tables[COUNTS][whole][part]
            has_masks &= bool(tables[MASKS][whole])
        found = np.array(sizes, np.int32).reshape(-1, 2), np.array(counts, np.int32)
        if not len(found[0]) == len(found[1]) or found[0].min() < 1 or found[1].min() < 0:
            raise ValueError
    except Exception as error:  # Absent, damaged, or of other types: whatever JSON can hold.
        raise DataError(
            f"data set {name!r} lacks the sizes of the images of split '{split}': metadata.json in "
            f'{str(info.data_dir)!r} is damaged; delete the data set and prepare it again'
        ) from error
    return SplitIndex(*found, has_masks)


def _shards(info: tfds.core.DatasetInfo) -> dict[str, tuple[str, int]]:
    """Returns the split of each file, and the place of its first record in that split."""
    found = {}
    for split, details in info.splits.items():
        starts = np.cumsum([0, *details.shard_lengths]).tolist()
        for path, start in zip(details.filepaths, starts[:-1], strict=True):
            found[Path(path).name] = split, start
    return found
