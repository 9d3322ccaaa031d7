"""What a network expects of its images: their values, and how they come to its size."""

import dataclasses
from typing import Any

from gcnet_jax.data.sizes import Size, height_and_width
from gcnet_jax.errors import ConfigError, one_line, unknown_name

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic')
# Bounds of what a network may ask of its images. A mean of 123.7 is meant for pixels up to 255 and
# would classify on in silence.
MAX_PIXEL, MIN_STD = 10.0, 1e-4
MIN_CROP_FRACTION, MAX_SIZE = 0.05, 4096


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What a network expects of its images.

    Attributes:
      mean, std: A value a channel, on the scale where 255 is 1.
      interpolation: 'bilinear' or 'bicubic', for the resize at evaluation.
      crop_fraction: The central crop's part of the resized shorter side; for crops that are not
        square see `gcnet_jax.data.central_crop`.
      train_size, test_size: Height and width of the crops in pixels; one number for a square.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = 'bilinear'
    crop_fraction: float = 0.875
    train_size: Size = 224
    test_size: Size = 224

    def __post_init__(self):
        _check_statistics(self)
        if not isinstance(self.interpolation, str) or self.interpolation not in INTERPOLATIONS:
            raise ConfigError(unknown_name('interpolation', self.interpolation, INTERPOLATIONS))
        fraction = self.crop_fraction
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)):
            raise ConfigError(f'crop_fraction must be a number, got {fraction!r:.80}')
        if not MIN_CROP_FRACTION <= fraction <= 1:
            raise ConfigError(
                f'crop_fraction must be in [{MIN_CROP_FRACTION}, 1], got {fraction!r}'
            )
        for name in ('train_size', 'test_size'):
            size = getattr(self, name)
            _check_size(name, size)
            object.__setattr__(self, name, _canonical(size))

    def with_size(self, size: Size) -> 'Preprocessing':
        """Returns the same with other sizes of images at inference."""
        return dataclasses.replace(self, test_size=size)

    @property
    def train_shape(self) -> tuple[int, int]:
        """Height and width of training images in pixels."""
        return height_and_width(self.train_size)

    @property
    def test_shape(self) -> tuple[int, int]:
        """Height and width of images at evaluation and inference, in pixels."""
        return height_and_width(self.test_size)


@dataclasses.dataclass(frozen=True)
class KeepRatio:
    """What a detector or a segmenter expects of its images: whole, in their own ratio, padded.

    An image is resized until a side reaches its limit, normalised, and padded with zeros on the
    right and at the bottom (mmdetection's `Resize(keep_ratio=True)` and `Pad`).

    Attributes:
      mean, std: A value a channel, on the scale where 255 is 1.
      short_side, long_side: Limits of the resized image's sides, in pixels.
      multiple_of: Height and width of the padded image are the next multiples of it.
      train_size: Height and width of the crops that a segmenter is trained on, in pixels; one
        number for a square; None for what is not trained on crops.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    short_side: int = 800
    long_side: int = 1333
    multiple_of: int = 32
    train_size: Size | None = None

    def __post_init__(self):
        _check_statistics(self)
        for name in ('short_side', 'long_side', 'multiple_of'):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_SIZE:
                raise ConfigError(
                    f'{name} must be a whole number from 1 to {MAX_SIZE}, got '
                    f'{one_line(repr(value), 80)}'
                )
        if self.short_side > self.long_side:
            raise ConfigError(
                f'short_side is {self.short_side} and long_side {self.long_side}; '
                'the short side cannot be the longer one'
            )
        if self.train_size is not None:
            _check_size('train_size', self.train_size)
            object.__setattr__(self, 'train_size', _canonical(self.train_size))

    def with_size(self, size: Size) -> 'KeepRatio':
        """Returns the same with other limits: of the short side, or of the short and the long one.

        With one number the long side keeps its ratio to the short one.
        """
        if not _is_size(size):
            raise ConfigError(
                f'size must be a whole number from 1 to {MAX_SIZE} (the short side) or a pair of '
                f'them (short, long), got {one_line(repr(size), 80)}'
            )
        if isinstance(size, int):
            size = (size, min(MAX_SIZE, round(size * self.long_side / self.short_side)))
        return dataclasses.replace(self, short_side=size[0], long_side=size[1])

    @property
    def train_shape(self) -> tuple[int, int]:
        """Height and width of training crops in pixels."""
        return height_and_width(self.train_size)

    @property
    def test_shape(self) -> tuple[int, int]:
        """Height and width of the padded image of a landscape that fills both limits."""
        return self.padded(self.short_side, self.long_side)

    def padded(self, height: int, width: int) -> tuple[int, int]:
        """Returns height and width after padding."""
        return tuple(-(-side // self.multiple_of) * self.multiple_of for side in (height, width))


def _check_statistics(preprocessing: Any) -> None:
    for name in ('mean', 'std'):
        values = getattr(preprocessing, name)
        if not (
            isinstance(values, tuple)
            and len(values) == 3
            and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
            and all(abs(value) <= MAX_PIXEL for value in values)  # False for a NaN too.
            and (name == 'mean' or all(value >= MIN_STD for value in values))
        ):
            raise ConfigError(
                f'{name} must be three {"positive " if name == "std" else ""}numbers on the '
                f'scale where 255 is 1, got {one_line(repr(values), 80)}'
            )


def _check_size(name: str, size: Any) -> None:
    if not _is_size(size):
        raise ConfigError(
            f'{name} must be a whole number from 1 to {MAX_SIZE} or a pair of them, height '
            f'and width, got {one_line(repr(size), 80)}'
        )


def _canonical(size: Size) -> Size:
    """One way to write a square, so that descriptions of the same images are equal."""
    return size[0] if isinstance(size, tuple) and size[0] == size[1] else size


def _is_size(size: Any) -> bool:
    sides = size if isinstance(size, tuple) else (size, size)
    return len(sides) == 2 and all(
        isinstance(side, int) and not isinstance(side, bool) and 1 <= side <= MAX_SIZE
        for side in sides
    )


IMAGENET = Preprocessing()
