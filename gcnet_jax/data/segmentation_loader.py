"""Batches of images with label maps; `batches` says how they are ordered and made ahead."""

import dataclasses

import numpy as np

from gcnet_jax.data.batches import Batches, Example, batches_of_all, endless_batches
from gcnet_jax.data.label_maps import IGNORED
from gcnet_jax.data.preprocessing import KeepRatio
from gcnet_jax.data.segmentation_augment import SegmentationOptions, augment_pair, fit_pair
from gcnet_jax.data.segmentation_ranges import CATEGORY_MAX_RATIO, SCALE_RANGE
from gcnet_jax.data.segmentation_sources import SegmentationSource
from gcnet_jax.data.sizes import Size, height_and_width


def train_batches(
    source: SegmentationSource,
    *,
    global_batch_size: int,
    image_size: Size,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    preprocessing: KeepRatio,
    scale_range: tuple[float, float] = SCALE_RANGE,
    category_max_ratio: float = CATEGORY_MAX_RATIO,
    flip: bool = True,
    photometric: bool = True,
    num_threads: int | None = None,
    num_workers: int = 0,
    skip_damaged: bool = False,
) -> Batches:
    """Returns this process's part of every training batch from `start_step` on, without end.

    Args:
      source: The images and label maps.
      global_batch_size: Images per step over all processes.
      image_size: Size of the crops, in pixels.
      seed, start_step, process_index, process_count: See `batches.endless_batches`.
      preprocessing: Of the network: its limits of the sides at a scale of 1, and its mean.
      scale_range, category_max_ratio, flip, photometric: See
        `segmentation_augment.SegmentationOptions`.
      num_threads, num_workers, skip_damaged: See `batches.endless_batches`.

    Returns:
      Iterator of {'image': uint8 [local_batch, height, width, 3], 'label': uint8 [local_batch,
      height, width]}. Where an image is smaller than the crop, the image is the mean colour and the
      label 255; see `segmentation_augment.augment_pair`.

    Raises:
      ConfigError: If an argument cannot work.
      DataError: While iterating, if an image or a label map is damaged and not skipped.
    """
    options = SegmentationOptions(
        image_size, preprocessing, tuple(scale_range), category_max_ratio, flip, photometric
    )
    return endless_batches(
        source,
        _TrainExample(source, options),
        global_batch_size=global_batch_size,
        image_size=image_size,
        seed=seed,
        start_step=start_step,
        process_index=process_index,
        process_count=process_count,
        num_threads=num_threads,
        num_workers=num_workers,
        skip_damaged=skip_damaged,
    )


def evaluation_batches(
    source: SegmentationSource,
    *,
    global_batch_size: int,
    image_size: Size,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int | None = None,
    num_workers: int = 0,
    skip_damaged: bool = False,
) -> Batches:
    """Returns every example once over all processes, in order; all get the same number of batches.

    Images keep their ratio: they are resized until one side is that of `image_size`, and padded on
    the right and at the bottom. The last batch is filled up with examples whose mask is False.

    Args:
      source: The images and label maps.
      global_batch_size: Images per step over all processes; may be more than there are examples.
      image_size: Height and width of the images handed out, in pixels; one number for a square.
      process_index, process_count, num_threads, num_workers, skip_damaged: See
        `batches.batches_of_all`.

    Returns:
      Iterator of {'image': uint8 [local_batch, height, width, 3], padded with 0, 'label': uint8
      [local_batch, height, width], padded with 255, 'mask': bool [local_batch], 'size': int32
      [local_batch, 2], height and width without the padding}.

    Raises:
      ConfigError: If an argument cannot work.
      DataError: While iterating, if an image or a label map is damaged and not skipped.
    """
    example = _EvaluationExample(source, image_size)
    return batches_of_all(
        source,
        example,
        example.filling,
        global_batch_size=global_batch_size,
        image_size=image_size,
        process_index=process_index,
        process_count=process_count,
        num_threads=num_threads,
        num_workers=num_workers,
        skip_damaged=skip_damaged,
    )


@dataclasses.dataclass(frozen=True)
class _TrainExample:
    """Makes the training example of a record; picklable, for worker processes."""

    source: SegmentationSource
    options: SegmentationOptions

    def __call__(self, record: dict[str, bytes], rng: np.random.Generator) -> Example:
        labels = self.source.decode_label(record['label'])
        image, labels = augment_pair(record['image'], labels, rng, self.options)
        return {'image': image, 'label': labels}


@dataclasses.dataclass(frozen=True)
class _EvaluationExample:
    """Makes the evaluation example of a record."""

    source: SegmentationSource
    size: Size

    def __call__(self, record: dict[str, bytes]) -> Example:
        labels = self.source.decode_label(record['label'])
        image, labels, size = fit_pair(record['image'], labels, self.size)
        return {'image': image, 'label': labels, 'size': np.array(size, np.int32)}

    def filling(self) -> Example:
        shape = height_and_width(self.size)
        return {
            'image': np.zeros((*shape, 3), np.uint8),
            'label': np.full(shape, IGNORED, np.uint8),
            # Not 0: an image without a pixel would have no mean.
            'size': np.array(shape, np.int32),
        }
