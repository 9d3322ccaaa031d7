"""Images with objects as a detector takes them: resized, mirrored, and laid on a canvas.

The steps are mmdetection's: `RandomChoiceResize` (one of several limits, ratio kept), `RandomFlip`
and `Pad`, with boxes in float32 and masks by the nearest neighbour.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32

from gcnet_jax.data import jpeg
from gcnet_jax.data.batches import Example
from gcnet_jax.data.decode import RGB, decode_upright
from gcnet_jax.data.detection_canvases import Canvases
from gcnet_jax.data.detection_masks import crop_mask, draw_mask, resized_grid
from gcnet_jax.data.detection_ranges import FLIP, MASK_SIZE, MAX_BOXES, MOST_BOXES, MOST_CELLS
from gcnet_jax.data.detection_set import is_target
from gcnet_jax.data.keep_ratio import pad, resize, shape_within
from gcnet_jax.errors import ConfigError, DataError

# The label of a place that holds no object.
NO_LABEL = -1


@dataclasses.dataclass(frozen=True)
class DetectionOptions:
    """How training examples are made.

    Attributes:
      canvases: Sizes of the images, see `detection_canvases.make_canvases`.
      flip: Probability that left and right are exchanged.
      max_boxes: Places for objects; where an image has more, those with the largest boxes are kept.
      mask_size: Height and width of the masks' crops; None for no masks.
    """

    canvases: Canvases
    flip: float = FLIP
    max_boxes: int = MAX_BOXES
    mask_size: int | None = MASK_SIZE

    def __post_init__(self) -> None:
        if not 0 <= self.flip <= 1:
            raise ConfigError(f'flip is {self.flip}; it is a probability, from 0 to 1')
        if not 1 <= self.max_boxes <= MOST_BOXES:
            raise ConfigError(f'max_boxes is {self.max_boxes}; it is 1 to {MOST_BOXES}')
        if self.mask_size is not None and not 1 <= self.mask_size <= MOST_CELLS:
            raise ConfigError(f'mask_size is {self.mask_size}; it is 1 to {MOST_CELLS}')


def training_example(
    record: Mapping[str, Any], rng: np.random.Generator, options: DetectionOptions
) -> Example:
    """Makes a training example.

    Crowds and degenerate boxes are left out, see `detection_set.is_target`.

    Args:
      record: Of a `detection_sources.DetectionSource`.
      rng: Source of randomness; the result is a function of its state.
      options: What to do.

    Returns:
      An example of the batches of `detection_loader.train_batches`.

    Raises:
      DataError: The image or a mask is damaged, or the image is of another size than is known.
    """
    image, size = _decode(record), record['size']
    canvases = options.canvases
    limits = canvases.scales[rng.integers(len(canvases.scales))]
    mirrored = rng.random() < options.flip
    canvas = canvases.sizes[canvases.choose(*size)]
    resized = shape_within(*size, *limits)
    image = resize(image, resized)
    if mirrored:
        image = jpeg.opencv().flip(image, 1)
    objects = [item for item in record['objects'] if is_target(item, size)]
    boxes = resized_boxes([item['bbox'] for item in objects], size, resized, mirrored)
    kept = _largest(boxes, options.max_boxes)
    places = len(kept)
    example = {
        'image': pad(image, canvas),
        'size': np.array(resized, np.int32),
        'boxes': np.zeros((options.max_boxes, 4), np.float32),
        'labels': np.full(options.max_boxes, NO_LABEL, np.int32),
    }
    example['boxes'][:places] = boxes[kept]
    example['labels'][:places] = [objects[index]['label'] for index in kept]
    if options.mask_size is not None:
        cells = options.mask_size
        example['masks'] = np.zeros((options.max_boxes, cells, cells), np.uint8)
        example['mask_boxes'] = np.zeros((options.max_boxes, 4), np.float32)
        grid = resized_grid(size, resized, mirrored)
        for place, index in enumerate(kept):
            mask = draw_mask(objects[index].get('segmentation'), size)
            crop, region = crop_mask(mask, boxes[index], grid, canvas, cells)
            example['masks'][place], example['mask_boxes'][place] = crop, region
    return example


def evaluation_example(
    record: Mapping[str, Any], limits: tuple[int, int], canvas: tuple[int, int]
) -> Example:
    """Makes an example to evaluate on.

    Args:
      record: Of a `detection_sources.DetectionSource`, with its place in the source as 'index'.
      limits: Of the short and the long side of the resized image, in pixels.
      canvas: Height and width of the padded image.

    Returns:
      An example of the batches of `detection_loader.evaluation_batches`, without 'mask'.

    Raises:
      DataError: The image is damaged, or of another size than is known.
    """
    image, size = _decode(record), record['size']
    resized = shape_within(*size, *limits)
    return {
        'image': pad(resize(image, resized), canvas),
        'size': np.array(resized, np.int32),
        'original_size': np.array(size, np.int32),
        'index': np.array(record['index'], np.int32),
    }


def evaluation_filling(canvas: tuple[int, int]) -> Example:
    """Returns an example like those of `evaluation_example` that stands for no image."""
    return {
        'image': np.zeros((*canvas, 3), np.uint8),
        # Not 0: an image without a pixel would have no boxes inside it.
        'size': np.array(canvas, np.int32),
        'original_size': np.array(canvas, np.int32),
        'index': np.array(-1, np.int32),
    }


def resized_boxes(
    boxes: Sequence[Sequence[float]],
    size: tuple[int, int],
    resized: tuple[int, int],
    mirrored: bool,
) -> Float32[np.ndarray, 'boxes 4']:
    """Returns boxes in pixels of the resized image, clipped to it, as mmdetection computes them.

    Args:
      boxes: Left, top, width and height of each in pixels of the original image.
      size: Height and width of the original image.
      resized: Those of the resized one.
      mirrored: Whether left and right are exchanged.

    Returns:
      Left, top, right and bottom of each.
    """
    given = np.array(boxes, np.float64).reshape(-1, 4)
    given[:, 2:] += given[:, :2]
    scale = np.array([resized[1] / size[1], resized[0] / size[0]] * 2, np.float32)
    limits = np.array([resized[1], resized[0]] * 2, np.float32)
    found = np.clip(given.astype(np.float32) * scale, 0, limits)
    if mirrored:
        found[:, [0, 2]] = limits[0] - found[:, [2, 0]]
    return found


def _decode(record: Mapping[str, Any]) -> RGB:
    image = decode_upright(record['image'])
    if image.shape[:2] != tuple(record['size']):
        height, width = record['size']
        raise DataError(
            f'the image has {image.shape[1]} x {image.shape[0]} pixels, and the data set says '
            f'{width} x {height}; prepare the data set again'
        )
    return image


def _largest(boxes: Float32[np.ndarray, 'boxes 4'], count: int) -> list[int]:
    """Returns which boxes are kept where there are more than `count`, in their own order."""
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return sorted(np.argsort(-areas, kind='stable')[:count].tolist())
