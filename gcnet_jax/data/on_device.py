"""Augmentation on the device, within the step: normalisation, mixup, cutmix, random erasing.

Everything is a pure function of the key with static shapes, so it gives the same on one device and
on many. An image is mixed with the one at the mirrored place of the batch, as in timm: over a
sharded batch that is one exchange between pairs of devices.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

Images = Float[Array, 'batch height width channel']
Targets = Float[Array, 'batch classes']

BETA_QUANTILES = 4096
ERASING_TRIES = 10


def normalize(
    images: UInt8[Array, 'batch height width channel'],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: Dtype = jnp.float32,
) -> Images:
    """Returns `(images / 255 - mean) / std`.

    Args:
      images: Values from 0 to 255.
      mean: Of every channel, on the scale from 0 to 1.
      std: Of every channel, on that scale.
      dtype: Type of the result; the arithmetic is float32.
    """
    scale = 1 / (255 * jnp.asarray(std, jnp.float32))
    shift = 255 * jnp.asarray(mean, jnp.float32)
    # Ranks are made equal explicitly: JAX can be configured to raise where they are not.
    shift, scale = (values.reshape((1,) * (images.ndim - 1) + (-1,)) for values in (shift, scale))
    return ((images.astype(jnp.float32) - shift) * scale).astype(dtype)


def zero_padding(images: Images, size: Float[Array, 'batch 2'] | Int[Array, 'batch 2']) -> Images:
    """Returns normalised images with zeros beyond their sizes.

    Args:
      images: Padded on the right and at the bottom; the padding is zero after the normalisation,
        not before.
      size: Height and width of each image without padding.
    """
    size = jnp.asarray(size)
    rows = jnp.arange(images.shape[1], dtype=size.dtype)[None] < size[:, :1]
    columns = jnp.arange(images.shape[2], dtype=size.dtype)[None] < size[:, 1:]
    return jnp.where(rows[:, :, None, None] & columns[:, None, :, None], images, 0)


def mix(
    key: PRNGKeyArray,
    images: Images,
    targets: Targets,
    mixup_alpha: float,
    cutmix_alpha: float,
) -> tuple[Images, Targets]:
    """Applies mixup or cutmix; where both are on, one of them, equally likely, to the whole batch.

    Mixup (Zhang et al., arXiv 1710.09412) mixes every image with its partner, with one share for
    the batch. Cutmix (Yun et al., arXiv 1905.04899) replaces one rectangle of every image by its
    partner's; the labels are mixed by the share of the pixels that were replaced, because the
    rectangle may reach over the edge.

    Args:
      key: Draws the choice and what follows from it.
      images: Normalised images.
      targets: Their labels, one-hot or smoothed.
      mixup_alpha: The share is from Beta(alpha, alpha); 0 switches mixup off.
      cutmix_alpha: The rectangle's share of the area, before clipping, is from Beta(alpha, alpha);
        0 switches cutmix off.
    """
    if not mixup_alpha and not cutmix_alpha:
        return images, targets
    height, width = images.shape[1:3]
    # One draw of all numbers: every further one takes the compiler half a second.
    choice, share, area, row, column = jax.random.uniform(key, (5,))
    # What is left of the image itself, at every pixel.
    weights = jnp.ones((height, width))
    if mixup_alpha:
        weights *= _beta_quantile(share, mixup_alpha)
    if cutmix_alpha:
        side = jnp.sqrt(1 - _beta_quantile(area, cutmix_alpha))
        kept = ~_cutmix_rectangle(height, width, side, row, column)
        use_mixup = choice < (0.5 if mixup_alpha else 0.0)
        weights = jnp.where(use_mixup, weights, kept.astype(jnp.float32))
    pixels = weights[None, :, :, None]
    mixed = images * pixels + images[::-1] * (1 - pixels)
    share = weights.mean()
    return mixed.astype(images.dtype), targets * share + targets[::-1] * (1 - share)


def _beta_quantile(uniform: Float[Array, ''], alpha: float) -> Float[Array, '']:
    """Maps a uniform number to a sample of Beta(alpha, alpha), by a table of its quantiles.

    `jax.random.beta` takes the compiler ten times as long.
    """
    import scipy.special  # A tenth of the imports' time, and inference does without.

    grid = (np.arange(BETA_QUANTILES) + 0.5) / BETA_QUANTILES
    quantiles = jnp.asarray(scipy.special.betaincinv(alpha, alpha, grid), jnp.float32)
    return quantiles[_below(uniform, BETA_QUANTILES)]


def _below(
    uniform: Float[Array, '*batch'], count: int | Int[Array, '*batch']
) -> Int[Array, '*batch']:
    """Makes an integer from 0 to count - 1 of a number that is at least 0 and less than 1.

    The largest of `jax.random.uniform` in float32 is 1 - 2**-23, whose product stays below `count`.
    """
    count = jnp.asarray(count, jnp.int32)
    return (uniform * count.astype(uniform.dtype)).astype(jnp.int32)


def _cutmix_rectangle(
    height: int,
    width: int,
    side: Float[Array, ''],
    row: Float[Array, ''],
    column: Float[Array, ''],
) -> Bool[Array, 'height width']:
    """timm's rand_bbox: the middle may be anywhere (0 to 1), and what reaches over is cut off."""
    row, column = _below(row, height), _below(column, width)
    half_height = (height * side).astype(jnp.int32) // 2
    half_width = (width * side).astype(jnp.int32) // 2
    return _rectangle(
        height,
        width,
        row - half_height,
        row + half_height,
        column - half_width,
        column + half_width,
    )


def _rectangle(
    height: int,
    width: int,
    top: Int[Array, '*batch'],
    bottom: Int[Array, '*batch'],
    left: Int[Array, '*batch'],
    right: Int[Array, '*batch'],
) -> Bool[Array, '*batch height width']:
    like_one = (1,) * top.ndim + (-1,)
    rows, columns = (jnp.arange(size).reshape(like_one) for size in (height, width))
    inside_rows = (rows >= top[..., None]) & (rows < bottom[..., None])
    inside_columns = (columns >= left[..., None]) & (columns < right[..., None])
    return inside_rows[..., :, None] & inside_columns[..., None, :]


def random_erasing(
    key: PRNGKeyArray,
    images: Images,
    probability: float,
    *,
    area: tuple[float, float] = (0.02, 1 / 3),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
    noise: bool = True,
) -> Images:
    """Fills one rectangle of some images (Zhong et al., arXiv 1708.04896; timm's geometry).

    Args:
      key: Draws the choice, the rectangles and the noise.
      images: Normalised images.
      probability: That an image loses a rectangle; 0 changes nothing.
      area: Range of the rectangle's share of the image's area.
      aspect: Range of its height over its width, sampled in the logarithm.
      noise: Fill with standard normal noise rather than with zeros, which is the mean colour.
    """
    if not probability:
        return images
    batch, height, width, _ = images.shape
    key, noise_key = jax.random.split(key)
    drawn = jax.random.uniform(key, (batch, 2 * ERASING_TRIES + 3))
    areas = height * width * (area[0] + (area[1] - area[0]) * drawn[:, :ERASING_TRIES])
    low, high = math.log(aspect[0]), math.log(aspect[1])
    aspects = jnp.exp(low + (high - low) * drawn[:, ERASING_TRIES:-3])
    heights = jnp.round(jnp.sqrt(areas * aspects)).astype(jnp.int32)
    widths = jnp.round(jnp.sqrt(areas / aspects)).astype(jnp.int32)
    # The first rectangle that fits; none fits hardly ever, and then nothing is erased wherever the
    # first one would lie.
    fits = (heights < height) & (widths < width)
    first = jnp.argmax(fits, axis=1)[:, None]
    box_height = jnp.take_along_axis(heights, first, axis=1)[:, 0]
    box_width = jnp.take_along_axis(widths, first, axis=1)[:, 0]
    top = _below(drawn[:, -3], height - box_height + 1)
    left = _below(drawn[:, -2], width - box_width + 1)
    inside = _rectangle(height, width, top, top + box_height, left, left + box_width)
    chosen = (drawn[:, -1] < probability) & fits.any(axis=1)
    erased = (inside & chosen[:, None, None])[..., None]
    fill = jax.random.normal(noise_key, images.shape, images.dtype) if noise else 0.0
    return jnp.where(erased, fill, images).astype(images.dtype)
