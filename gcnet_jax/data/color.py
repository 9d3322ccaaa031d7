"""Augmentation of colours and shapes on the host: RandAugment and colour jitter, by Pillow.

Operations, their strengths and their order follow torchvision's `RandAugment` and `ColorJitter` on
Pillow images, with nearest-neighbour resampling and black filling. Everything is a function of the
generator that is passed in.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance, ImageOps

RGB = UInt8[np.ndarray, 'height width 3']

# Magnitudes run from 0 to this one.
MAX_MAGNITUDE = 30
RANDAUGMENT = (
    'identity',
    'shear_x',
    'shear_y',
    'translate_x',
    'translate_y',
    'rotate',
    'brightness',
    'saturation',
    'contrast',
    'sharpness',
    'posterize',
    'solarize',
    'autocontrast',
    'equalize',
)
# Operations whose strength has a random sign.
SIGNED = frozenset(RANDAUGMENT[1:10])
_ENHANCERS = {
    'brightness': ImageEnhance.Brightness,
    'saturation': ImageEnhance.Color,
    'contrast': ImageEnhance.Contrast,
    'sharpness': ImageEnhance.Sharpness,
}


@dataclasses.dataclass(frozen=True)
class ColorOptions:
    """What `augment_color` does; by default nothing.

    Attributes:
      randaugment_ops: Operations of RandAugment applied to each image, one after the other; 0 is
        off.
      randaugment_magnitude: Their strength, from 0 to `MAX_MAGNITUDE`.
      jitter: Brightness, contrast and saturation are each multiplied by a factor drawn from
        `[max(0, 1 - jitter), 1 + jitter]`; 0 is off.
      hue_jitter: The hue is turned by a part of the colour wheel drawn from `[-hue_jitter,
        hue_jitter]`, at most 0.5; 0 is off.
    """

    randaugment_ops: int = 0
    randaugment_magnitude: int = 9
    jitter: float = 0.0
    hue_jitter: float = 0.0

    @property
    def is_on(self) -> bool:
        """Whether anything is changed."""
        return bool(self.randaugment_ops or self.jitter or self.hue_jitter)


def strength(name: str, magnitude: int, height: int, width: int) -> float:
    """Returns the strength of one of `RANDAUGMENT`'s operations, without its sign.

    Args:
      name: The operation.
      magnitude: From 0 to `MAX_MAGNITUDE`.
      height, width: Size of the image in pixels, which translations are proportional to.

    Returns:
      A slope (shear), pixels (translate), degrees (rotate), a change of a factor of 1 (brightness,
      saturation, contrast, sharpness), bits kept (posterize) or a threshold (solarize).
    """
    part = magnitude / MAX_MAGNITUDE
    if name == 'posterize':
        return 8 - round(4 * part)
    if name == 'solarize':
        return 255.0 * (1 - part)
    largest = {
        'shear_x': 0.3,
        'shear_y': 0.3,
        'translate_x': 150 / 331 * width,
        'translate_y': 150 / 331 * height,
        'rotate': 30.0,
    }
    return part * largest.get(name, 0.9 if name in _ENHANCERS else 0.0)


def apply_operation(image: Image.Image, name: str, amount: float) -> Image.Image:
    """Applies one of `RANDAUGMENT`'s operations to an RGB image.

    Args:
      image: The image; the result has its size.
      name: The operation.
      amount: Its signed strength, in the units of `strength`.
    """
    if name in _ENHANCERS:
        return _ENHANCERS[name](image).enhance(1.0 + amount)
    if name == 'rotate':
        return image.rotate(amount, Image.Resampling.NEAREST)
    if name == 'posterize':
        return ImageOps.posterize(image, int(amount))
    if name == 'solarize':
        return ImageOps.solarize(image, amount)
    if name == 'autocontrast':
        return ImageOps.autocontrast(image)
    if name == 'equalize':
        return ImageOps.equalize(image)
    if name == 'identity':
        return image
    # From a pixel of the result to one of the image: x' = a x + b y + c, y' = d x + e y + f.
    matrix = {
        'shear_x': (1, amount, 0, 0, 1, 0),
        'shear_y': (1, 0, 0, amount, 1, 0),
        'translate_x': (1, 0, -int(amount), 0, 1, 0),
        'translate_y': (1, 0, 0, 0, 1, -int(amount)),
    }[name]
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)


def turn_hue(image: Image.Image, turn: float) -> Image.Image:
    """Turns the hue of an RGB image by a part of the colour wheel, -0.5 to 0.5."""
    hue, saturation, value = image.convert('HSV').split()
    shifted = (np.asarray(hue).astype(np.int32) + math.trunc(turn * 255)) % 256
    hue = Image.fromarray(shifted.astype(np.uint8))
    return Image.merge('HSV', (hue, saturation, value)).convert('RGB')


def rand_augment(
    image: Image.Image, rng: np.random.Generator, operations: int, magnitude: int
) -> Image.Image:
    """Applies randomly chosen operations of one magnitude (Cubuk et al., arXiv 1909.13719)."""
    for _ in range(operations):
        name = RANDAUGMENT[rng.integers(len(RANDAUGMENT))]
        amount = strength(name, magnitude, image.height, image.width)
        if rng.random() < 0.5 and name in SIGNED:
            amount = -amount
        image = apply_operation(image, name, amount)
    return image


def jitter_colors(
    image: Image.Image, rng: np.random.Generator, jitter: float, hue_jitter: float
) -> Image.Image:
    """Changes brightness, contrast, saturation and hue by random amounts in a random order."""
    factors = rng.uniform(max(0.0, 1.0 - jitter), 1.0 + jitter, size=3)
    turn = rng.uniform(-hue_jitter, hue_jitter)
    for place in rng.permutation(4):
        if place == 3:
            image = turn_hue(image, turn) if hue_jitter else image
        elif jitter:
            name = ('brightness', 'contrast', 'saturation')[place]
            image = _ENHANCERS[name](image).enhance(factors[place])
    return image


def augment_color(pixels: RGB, rng: np.random.Generator, options: ColorOptions) -> RGB:
    """Applies RandAugment and then colour jitter to one image.

    Args:
      pixels: The image.
      rng: Source of randomness; it is not touched where everything is off.
      options: What to do.
    """
    if not options.is_on:
        return pixels
    image = Image.fromarray(pixels)
    if options.randaugment_ops:
        image = rand_augment(image, rng, options.randaugment_ops, options.randaugment_magnitude)
    if options.jitter or options.hue_jitter:
        image = jitter_colors(image, rng, options.jitter, options.hue_jitter)
    return np.asarray(image)
