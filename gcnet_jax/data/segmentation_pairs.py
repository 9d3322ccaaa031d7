"""An encoded image and its label map: decoded together, and checked against each other."""

import numpy as np

from gcnet_jax.data.decode import RGB, opened, to_array, to_rgb, upright, upright_size
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
        first = int(reduce_zero_label)
        count = '1 pixel has' if beyond.size == 1 else f'{beyond.size:,} pixels have'
        largest = f'{"" if beyond.size == 1 else "up to "}{int(beyond.max()) + first}'
        raise DataError(
            f'{name}: {count} a label that is no class, {largest}; labels are {first} to '
            f'{num_classes - 1 + first}, and {"0 and " if first else ""}{IGNORED} for pixels that '
            'do not count'
        )
    return labels


def reduce_labels(labels: LabelMap) -> LabelMap:
    """Makes 0 the label that does not count, and every other one smaller by one (as in ADE20K)."""
    return np.where((labels == 0) | (labels == IGNORED), IGNORED, labels - np.uint8(1))


def decode_picture(
    data: bytes, shape: tuple[int, int], wanted: tuple[int, int] | None = None
) -> RGB:
    """Decodes the image of a label map, turned as its EXIF orientation says.

    Args:
      data: An image of any format that is read.
      shape: Height and width of the label map, which must be those of the image.
      wanted: Height and width that the image will be resized to; a JPEG is decoded at the least
        share of its resolution that is not below them. None for all of it.

    Raises:
      DataError: The image is damaged or of another size.
    """
    with opened(data) as image:
        height, width = upright_size(image, data)
        if (height, width) != shape:
            raise DataError(
                f'the image has {width} x {height} pixels and its label map '
                f'{shape[1]} x {shape[0]}; they must have the same size'
            )
        if wanted:
            swapped = orientation(image, data) in SWAPPED
            image.draft('RGB', wanted if swapped else wanted[::-1])
        return to_array(upright(to_rgb(image), image, data))
