"""Augmentation of images with label maps: random scale, crop, mirroring and photometric distortion.

mmsegmentation's training pipeline (RandomResize, RandomCrop, RandomFlip, PhotoMetricDistortion), to
its bits for the same draws where an image is decoded at its full resolution. Images are resized
bilinearly, label maps by the nearest neighbour. Everything is a function of the generator that is
passed in.
"""

import dataclasses
import math

import numpy as np

from gcnet_jax.data import jpeg
from gcnet_jax.data.decode import RGB
from gcnet_jax.data.keep_ratio import pad, resize, resize_labels, shape_within
from gcnet_jax.data.label_maps import IGNORED, LabelMap
from gcnet_jax.data.preprocess import Box
from gcnet_jax.data.preprocessing import MAX_SIZE, KeepRatio
from gcnet_jax.data.segmentation_pairs import decode_picture
from gcnet_jax.data.segmentation_ranges import CATEGORY_MAX_RATIO, MAX_SCALE, SCALE_RANGE
from gcnet_jax.data.sizes import Size, height_and_width
from gcnet_jax.errors import ConfigError

CROP_ATTEMPTS = 10

# Photometric distortion, in 255ths, as factors, and in OpenCV's degrees of hue, which are two each.
BRIGHTNESS = 32
CONTRAST = SATURATION = (0.5, 1.5)
HUE, HUES = 18, 180


@dataclasses.dataclass(frozen=True)
class SegmentationOptions:
    """How training examples are made.

    Attributes:
      size: Height and width of the crop in pixels; one number for a square.
      preprocessing: Its limits of the sides are those at a scale of 1; its mean is the padding.
      scale_range: Range of the scale, which is uniform.
      category_max_ratio: Share of the crop's pixels that count, below which its most frequent class
        must stay; 1 for any crop.
      flip: Mirror left and right every other time.
      photometric: Distort brightness, contrast, saturation and hue at random.
    """

    size: Size
    preprocessing: KeepRatio
    scale_range: tuple[float, float] = SCALE_RANGE
    category_max_ratio: float = CATEGORY_MAX_RATIO
    flip: bool = True
    photometric: bool = True

    def __post_init__(self) -> None:
        low, high = self.scale_range
        if not 0 < low <= high <= MAX_SCALE:
            raise ConfigError(
                f'scale_range is {tuple(self.scale_range)}; it is 0 < smallest <= largest <= '
                f'{MAX_SCALE:g}'
            )
        if not 0 < self.category_max_ratio <= 1:
            raise ConfigError(
                f'category_max_ratio is {self.category_max_ratio}; it is more than 0 and at most 1'
            )
        if max(height_and_width(self.size)) > MAX_SIZE:
            raise ConfigError(f'image_size is {self.size}; sides are at most {MAX_SIZE} pixels')


def augment_pair(
    image: bytes,
    labels: LabelMap,
    rng: np.random.Generator,
    options: SegmentationOptions,
) -> tuple[RGB, LabelMap]:
    """Makes a training example of an encoded image and its decoded label map.

    An image that becomes smaller than the crop is padded on the right and at the bottom. Its labels
    there are 255, and its pixels the mean colour of `preprocessing`, rounded: mmsegmentation pads
    with zeros after normalisation, which this is up to 0.009 of a standard deviation, without
    another array in every batch.

    Args:
      image: Any image; a JPEG that becomes at most half as large is decoded at a half, a quarter or
        an eighth of its resolution.
      labels: Of the image's size; see `segmentation_pairs.decode_labels`.
      rng: Source of randomness; the result is a function of its state.
      options: What to do.

    Raises:
      DataError: The image is damaged, of another size than the label map, or too elongated.
    """
    size = shape_within(*labels.shape, *draw_limits(rng, options))
    pixels = decode_picture(image, labels.shape, size)
    labels = resize_labels(labels, size)
    left, top, right, bottom = sample_crop(labels, rng, options.size, options.category_max_ratio)
    labels = labels[top:bottom, left:right]
    pixels = resize(pixels, size)[top:bottom, left:right]
    if options.flip and rng.random() < 0.5:
        cv2 = jpeg.opencv()
        pixels, labels = cv2.flip(pixels, 1), cv2.flip(labels, 1)
    if options.photometric:
        pixels = distort(pixels, rng)
    crop = height_and_width(options.size)
    return pad(pixels, crop, _mean_colour(options.preprocessing)), pad(labels, crop, IGNORED)


def fit_pair(image: bytes, labels: LabelMap, canvas: Size) -> tuple[RGB, LabelMap, tuple[int, int]]:
    """Resizes an image and its label map to fit into a canvas, and pads them.

    Args:
      image, labels: As in `augment_pair`; the image is decoded at full resolution.
      canvas: Height and width of the results; one number for a square.

    Returns:
      The image, padded with zeros on the right and at the bottom, the label map, padded with 255,
      and height and width without the padding.

    Raises:
      DataError: As `augment_pair`.
    """
    pixels = decode_picture(image, labels.shape)
    (height, width), canvas = labels.shape, height_and_width(canvas)
    scale = min(canvas[0] / height, canvas[1] / width)
    size = shape_within(height, width, scale * min(height, width), scale * max(height, width))
    labels = pad(resize_labels(labels, size), canvas, IGNORED)
    return pad(resize(pixels, size), canvas), labels, size


def draw_limits(rng: np.random.Generator, options: SegmentationOptions) -> tuple[int, int]:
    """Draws the limits of the short and the long side, in pixels (mmcv's RandomResize)."""
    low, high = options.scale_range
    scale = rng.random() * (high - low) + low
    preprocessing = options.preprocessing
    return (
        max(int(preprocessing.short_side * scale), 1),
        max(int(preprocessing.long_side * scale), 1),
    )


def sample_crop(
    labels: LabelMap,
    rng: np.random.Generator,
    size: Size,
    category_max_ratio: float = CATEGORY_MAX_RATIO,
) -> Box:
    """Draws a crop as mmsegmentation's RandomCrop does.

    Crops that hold a single class, or of which one class covers the ratio or more of the pixels
    that count, are drawn again up to ten times; then the last one is taken.

    Args:
      labels: Label map of the image; along a side on which it is smaller, the crop is all of it.
      rng: Source of randomness.
      size: Height and width of the crop in pixels; one number for a square.
      category_max_ratio: The ratio; 1 for the first crop whatever it holds.

    Returns:
      Left, top, right and bottom of the crop.
    """
    height, width = height_and_width(size)

    def draw() -> Box:
        top = int(rng.integers(0, max(labels.shape[0] - height, 0) + 1))
        left = int(rng.integers(0, max(labels.shape[1] - width, 0) + 1))
        return left, top, left + width, top + height

    left, top, right, bottom = draw()
    for _ in range(CROP_ATTEMPTS if category_max_ratio < 1 else 0):
        counts = np.bincount(labels[top:bottom, left:right].ravel(), minlength=IGNORED)[:IGNORED]
        largest, total = counts.max(), counts.sum()
        if largest < total and largest / total < category_max_ratio:
            break
        left, top, right, bottom = draw()
    return left, top, right, bottom


def distort(pixels: RGB, rng: np.random.Generator) -> RGB:
    """Changes brightness, contrast, saturation and hue (mmsegmentation's PhotoMetricDistortion).

    Each is changed every other time; contrast comes before saturation and hue, or after them.
    """
    if rng.integers(2):
        pixels = _linear(pixels, 1, rng.uniform(-BRIGHTNESS, BRIGHTNESS))
    contrast_first = rng.integers(2)
    if contrast_first and rng.integers(2):
        pixels = _linear(pixels, rng.uniform(*CONTRAST), 0)
    if rng.integers(2):
        pixels = _change_hsv(pixels, 1, _table(rng.uniform(*SATURATION), 0))
    if rng.integers(2):
        pixels = _change_hsv(pixels, 0, _hue_table(int(rng.integers(-HUE, HUE))))
    if not contrast_first and rng.integers(2):
        pixels = _linear(pixels, rng.uniform(*CONTRAST), 0)
    return pixels


def _linear(pixels: RGB, factor: float, offset: float) -> RGB:
    return jpeg.opencv().LUT(np.ascontiguousarray(pixels), _table(factor, offset))


def _table(factor: float, offset: float) -> np.ndarray:
    """Returns what becomes of each value: in float32 and cut off, as mmsegmentation computes it."""
    values = np.arange(256, dtype=np.float32) * factor + offset
    return np.clip(values, 0, 255).astype(np.uint8)


def _hue_table(turn: int) -> np.ndarray:
    return ((np.arange(256) + turn) % HUES).astype(np.uint8)


def _change_hsv(pixels: RGB, channel: int, table: np.ndarray) -> RGB:
    """Replaces the values of the hue (channel 0) or the saturation (1)."""
    cv2 = jpeg.opencv()
    hsv = cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2HSV)
    tables = np.stack([np.arange(256, dtype=np.uint8)] * 3, axis=-1)
    tables[:, channel] = table
    return cv2.cvtColor(cv2.LUT(hsv, tables[None]), cv2.COLOR_HSV2RGB)


def _mean_colour(preprocessing: KeepRatio) -> list[int]:
    return [min(max(math.floor(255 * value + 0.5), 0), 255) for value in preprocessing.mean]
