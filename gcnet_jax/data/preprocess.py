"""From encoded bytes to an RGB image of the size that the network takes, in uint8 on the host.

Training follows torchvision's RandomResizedCrop, evaluation timm's evaluation transform (Resize of
the shorter side, then CenterCrop); both resize with Pillow's antialiased filters, as they do. EXIF
orientation is not applied, because neither torchvision nor timm applies it, and published
accuracies were measured without it.

Training reads ordinary JPEGs by a faster way (`gcnet_jax.data.jpeg`), whose pixels differ slightly.
"""

import math

import numpy as np
from PIL import Image

from gcnet_jax.data import image_limits, jpeg
from gcnet_jax.data.central_crop import middle, resized_size, too_elongated
from gcnet_jax.data.decode import RGB, open_within_limits, opened, to_rgb
from gcnet_jax.data.image_limits import DECODING_MEMORY, MAX_PIXELS, check_size
from gcnet_jax.data.sizes import Size, height_and_width
from gcnet_jax.errors import ConfigError, unknown_name

INTERPOLATIONS = {
    'nearest': Image.Resampling.NEAREST,
    'bilinear': Image.Resampling.BILINEAR,
    'bicubic': Image.Resampling.BICUBIC,
}
AUGMENTATIONS = ('none', 'pad_crop', 'resized_crop')
CROP_PADDING = 4
CROP_SCALE = (0.08, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)

Box = tuple[int, int, int, int]


def interpolation_filter(name: str) -> Image.Resampling:
    """Returns Pillow's filter of that name.

    Raises:
      ConfigError: If there is no such interpolation.
    """
    if name not in INTERPOLATIONS:
        raise ConfigError(unknown_name('interpolation', name, INTERPOLATIONS))
    return INTERPOLATIONS[name]


def sample_crop(
    height: int,
    width: int,
    rng: np.random.Generator,
    scale: tuple[float, float] = CROP_SCALE,
    ratio: tuple[float, float] = CROP_RATIO,
) -> Box:
    """Draws a crop as torchvision's RandomResizedCrop.get_params does.

    Args:
      height: Height of the image in pixels.
      width: Width of the image in pixels.
      rng: Source of randomness.
      scale: Range of the crop's share of the image's area.
      ratio: Range of the crop's width over its height, sampled in the logarithm.

    Returns:
      Left, top, right and bottom of the crop.
    """
    log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(*log_ratio))
        crop_width = round(math.sqrt(area * aspect))
        crop_height = round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(rng.integers(0, height - crop_height + 1))
            left = int(rng.integers(0, width - crop_width + 1))
            return left, top, left + crop_width, top + crop_height
    # No crop of that shape fits: the largest one in the middle.
    crop_width, crop_height = width, height
    if width / height < ratio[0]:
        crop_height = round(width / ratio[0])
    elif width / height > ratio[1]:
        crop_width = round(height * ratio[1])
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return left, top, left + crop_width, top + crop_height


def random_resized_crop(
    image: RGB,
    size: Size,
    rng: np.random.Generator,
    scale: tuple[float, float] = CROP_SCALE,
    ratio: tuple[float, float] = CROP_RATIO,
    interpolation: str = 'bilinear',
) -> RGB:
    """Returns a random part of the image in the size wanted (torchvision's RandomResizedCrop).

    The range of the part's shape does not depend on the size: one that is not square stretches it.
    """
    box = sample_crop(*image.shape[:2], rng, scale, ratio)
    return _crop_and_resize(Image.fromarray(image), box, size, interpolation)


def decode_resized_crop(
    data: bytes,
    size: Size,
    rng: np.random.Generator,
    scale: tuple[float, float] = CROP_SCALE,
    ratio: tuple[float, float] = CROP_RATIO,
    interpolation: str = 'bilinear',
    *,
    fast: bool = True,
    max_pixels: int = MAX_PIXELS,
) -> RGB:
    """Decodes and takes a random resized crop in one.

    With `fast`, a JPEG whose crop is at least twice the size wanted is decoded at a half, a quarter
    or an eighth of its resolution; where it can be, no further down than the crop reaches, and
    resized by OpenCV. That is much faster. The crop is the same, its pixels differ slightly.
    Without it, the result is that of `random_resized_crop(decode(data), ...)`, bit for bit.

    Raises:
      DataError: As `decode`.
    """
    frame = jpeg.read_frame(data) if fast and interpolation == 'bilinear' else None
    box = None
    if frame is not None:
        check_size(frame.width, frame.height, max_pixels)
        box = sample_crop(frame.height, frame.width, rng, scale, ratio)
        with DECODING_MEMORY.hold(6 * frame.height * frame.width):
            crop = jpeg.decode_crop(data, frame, box, size)
        if crop is not None:
            return crop
    with opened(data, max_pixels) as image:
        box = box or sample_crop(image.height, image.width, rng, scale, ratio)
        return _pillow_crop(image, box, size, interpolation, draft=fast)


def _pillow_crop(image: Image.Image, box: Box, size: Size, interpolation: str, draft: bool) -> RGB:
    (width, height), (left, top, right, bottom) = image.size, box
    if draft:
        wanted_height, wanted_width = height_and_width(size)
        shrink = min((right - left) / wanted_width, (bottom - top) / wanted_height)
        image.draft('RGB', (math.ceil(width / max(shrink, 1)), math.ceil(height / max(shrink, 1))))
    image = to_rgb(image)
    if image.size == (width, height):
        return _crop_and_resize(image, box, size, interpolation)
    # On the smaller image the corners lie between pixels.
    x, y = image.width / width, image.height / height
    box = (left * x, top * y, right * x, bottom * y)
    wanted = height_and_width(size)[::-1]
    return np.asarray(image.resize(wanted, interpolation_filter(interpolation), box))


def _crop_and_resize(image: Image.Image, box: Box, size: Size, interpolation: str) -> RGB:
    cropped, wanted = image.crop(box), height_and_width(size)[::-1]
    if cropped.size != wanted:
        cropped = cropped.resize(wanted, interpolation_filter(interpolation))
    return np.asarray(cropped)


def decode_and_crop(
    data: bytes,
    size: Size,
    crop_fraction: float = 0.875,
    interpolation: str = 'bicubic',
    max_pixels: int = MAX_PIXELS,
) -> RGB:
    """Returns `resize_and_crop(decode(data), ...)`, bit for bit, in less time and memory.

    Raises:
      DataError: As `decode` and `resize_and_crop`; an image that is too elongated is not decoded.
    """
    image, memory = open_within_limits(data, max_pixels)
    width, height = resized_size(*image.size, size, crop_fraction)
    # Pillow resizes the width first, then the height.
    memory += 4 * width * (image.height + height)
    if memory > image_limits.MAX_DECODING_BYTES:
        raise too_elongated(*image.size)
    with DECODING_MEMORY.hold(memory):
        return _resize_and_crop(to_rgb(image), size, crop_fraction, interpolation)


def resize_and_crop(
    image: RGB, size: Size, crop_fraction: float = 0.875, interpolation: str = 'bicubic'
) -> RGB:
    """Returns the middle of the image in the size wanted, by timm's evaluation transform.

    Args:
      image: Of any size.
      size: Height and width wanted, in pixels; one number for a square.
      crop_fraction: The size over that of the image that is cropped, in (0, 1]; for a square the
        share of the resized shorter side that is kept.
      interpolation: `nearest`, `bilinear` or `bicubic`.

    Raises:
      DataError: If the image is so elongated that it would have more than `MAX_PIXELS` once it
        covers that size.
    """
    height, width = image.shape[:2]
    if resized_size(width, height, size, crop_fraction) == (width, height):
        left, top, right, bottom = middle(width, height, size)
        return image[top:bottom, left:right]
    return _resize_and_crop(Image.fromarray(image), size, crop_fraction, interpolation)


def _resize_and_crop(
    image: Image.Image, size: Size, crop_fraction: float, interpolation: str
) -> RGB:
    new_size = resized_size(*image.size, size, crop_fraction)
    if new_size != image.size:
        image = image.resize(new_size, interpolation_filter(interpolation))
    return np.asarray(image.crop(middle(*new_size, size)))


def random_pad_crop(image: RGB, padding: int, rng: np.random.Generator) -> RGB:
    """Pads with black on every side and crops back at random, as is customary for CIFAR.

    Args:
      image: `[height, width, 3]`; the result has its size.
      padding: Pixels on every side.
      rng: Source of randomness.
    """
    height, width = image.shape[:2]
    # np.pad would take as long as decoding does.
    padded = np.zeros((height + 2 * padding, width + 2 * padding, 3), np.uint8)
    padded[padding : padding + height, padding : padding + width] = image
    top, left = rng.integers(0, 2 * padding + 1, size=2)
    return padded[top : top + height, left : left + width]


def random_flip(image: RGB, rng: np.random.Generator) -> RGB:
    """Mirrors left and right every other time."""
    # numpy would take longer to copy the mirrored view into the batch than a JPEG takes to decode.
    return jpeg.opencv().flip(image, 1) if rng.random() < 0.5 else image


def augment(
    data: bytes,
    rng: np.random.Generator,
    *,
    size: Size,
    augmentation: str = 'resized_crop',
    flip: bool = True,
    interpolation: str = 'bilinear',
    crop_scale: tuple[float, float] = CROP_SCALE,
) -> RGB:
    """Makes a training image in the size wanted of an encoded one.

    Args:
      data: Encoded image.
      rng: Source of randomness; the result is a function of its state.
      size: Height and width wanted, in pixels; one number for a square.
      augmentation: `none` (the middle of the resized image), `pad_crop` (the same, then shifted by
        up to `CROP_PADDING` pixels) or `resized_crop`.
      flip: Mirror at random. Never for digits or letters.
      interpolation: `nearest`, `bilinear` or `bicubic`.
      crop_scale: Range of the share of the area that `resized_crop` keeps.

    Raises:
      DataError: If the image is damaged.
    """
    if augmentation == 'resized_crop':
        image = decode_resized_crop(data, size, rng, crop_scale, interpolation=interpolation)
    else:
        image = decode_and_crop(data, size, 1.0, interpolation)
        if augmentation == 'pad_crop':
            image = random_pad_crop(image, CROP_PADDING, rng)
    return random_flip(image, rng) if flip else image
