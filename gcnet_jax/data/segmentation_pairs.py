"""An encoded image and its label map: decoded together, and checked against each other."""

import math
from collections.abc import Callable

import numpy as np

from gcnet_jax.data.decode import RGB, opened, to_array, to_rgb, upright
from gcnet_jax.data.label_maps import IGNORED, LabelMap, decode_label_map
from gcnet_jax.data.orientation import SWAPPED, orientation
from gcnet_jax.errors import DataError

LABEL_NAME = 'label map'


def decode_labels(
    data: bytes, num_classes: int, *, reduce_zero_label: bool = False, name: object = LABEL_NAME
) -> LabelMap:
    """Decodes a label map whose labels are classes or 255.

    Args:
      data: A PNG; see `label_maps`.
      num_classes: Labels are below it, or 255.
      reduce_zero_label: See `reduce_labels`.
      name: File or record, for errors.

    Raises:
      DataError: It is no label map, or a label is no class.
    """
    labels = decode_label_map(data, name)
    if reduce_zero_label:
        labels = reduce_labels(labels)
    beyond = labels[(labels >= num_classes) & (labels != IGNORED)]
    if beyond.size:
        raise DataError(
            f'{name}: the label {beyond.max() + reduce_zero_label} of {beyond.size:,} pixels '
            f'stands for no class; labels are {int(reduce_zero_label)} to '
            f'{num_classes - 1 + reduce_zero_label}, and {IGNORED} for pixels that do not count'
        )
    return labels


def reduce_labels(labels: LabelMap) -> LabelMap:
    """Makes 0 the label that does not count, and every other one smaller by one (as in ADE20K)."""
    return np.where((labels == 0) | (labels == IGNORED), IGNORED, labels - np.uint8(1))


def decode_pair(
    image: bytes,
    label: bytes,
    num_classes: int,
    wanted: Callable[[int, int], tuple[int, int]] | None = None,
    *,
    reduce_zero_label: bool = False,
) -> tuple[RGB, LabelMap]:
    """Decodes an image, turned as its EXIF orientation says, and its label map.

    Args:
      image: An image of any format that is read.
      label: A PNG; see `label_maps`.
      num_classes: Labels are below it, or 255.
      wanted: Returns for height and width of the image those that it will be resized to; a JPEG is
        decoded at the least share of its resolution that is not below that. None for all of it.
      reduce_zero_label: See `reduce_labels`.

    Raises:
      DataError: One of the two is damaged, they differ in size, or a label is no class.
    """
    labels = decode_labels(label, num_classes, reduce_zero_label=reduce_zero_label)
    with opened(image) as picture:
        swapped = orientation(picture, image) in SWAPPED
        shape = picture.size if swapped else picture.size[::-1]
        if shape != labels.shape:
            raise DataError(
                f'the image has {shape[1]} x {shape[0]} pixels and its label map '
                f'{labels.shape[1]} x {labels.shape[0]}; they must have the same size'
            )
        if wanted:
            scale = wanted(*shape)[0] / shape[0]
            picture.draft('RGB', tuple(math.ceil(side * scale) for side in picture.size))
        return to_array(upright(to_rgb(picture), picture, image)), labels
