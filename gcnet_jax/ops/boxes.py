"""Boxes as corners `(left, top, right, bottom)` in pixels; the width is `right - left`.

These are mmdetection's rules since version 2. The ratio of two boxes and the coding of one box
relative to another are computed in float32 in the order in which mmdetection computes them, so
that decisions at a threshold come out the same.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

# The largest change of a box's width or height: by the factor 1000 / 16, either way.
MAX_LOG_RATIO = abs(math.log(16 / 1000))


def box_area(boxes: Float[Array, '*batch 4']) -> Float[Array, '*batch']:
    """Returns width times height, in square pixels; 0 where one of them is not positive."""
    width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    # The choice also keeps the compiler from making one fused operation of this product and a sum
    # that follows: it rounds once where mmdetection rounds twice, and equal overlaps differ.
    return jnp.where((width > 0) & (height > 0), width * height, 0)


def intersection_over_union(
    first: Float[Array, '*batch n 4'], second: Float[Array, '*batch m 4']
) -> Float[Array, '*batch n m']:
    """Returns the overlap of every pair of boxes, from 0 to 1; 0 where both have no area."""
    first, second = first[..., :, None, :], second[..., None, :, :]
    top_left = jnp.maximum(first[..., :2], second[..., :2])
    bottom_right = jnp.minimum(first[..., 2:], second[..., 2:])
    intersection = box_area(jnp.concatenate([top_left, bottom_right], axis=-1))
    union = box_area(first) + box_area(second) - intersection
    return jnp.where(union > 0, intersection / jnp.where(union > 0, union, 1), 0)


def decode_deltas(
    boxes: Float[Array, '*batch 4'],
    deltas: Float[Array, '*batch 4'],
    stds: tuple[float, float, float, float],
    image_size: tuple[int, int] | Float[Array, '2'],
) -> Float[Array, '*batch 4']:
    """Moves boxes by predicted deltas `(dx, dy, dw, dh)` and clips them to the image.

    Args:
      boxes: Proposals or anchors.
      deltas: Shifts in widths and heights of the box, and logarithms of the change in size; each is
        multiplied by its standard deviation first.
      stds: The standard deviations.
      image_size: Height and width in pixels, without padding.
    """
    deltas = deltas * _for_each(stds, deltas)
    size = boxes[..., 2:] - boxes[..., :2]
    centre = (boxes[..., :2] + boxes[..., 2:]) * 0.5 + size * deltas[..., :2]
    half = size * jnp.exp(jnp.clip(deltas[..., 2:], -MAX_LOG_RATIO, MAX_LOG_RATIO)) * 0.5
    return clip_boxes(jnp.concatenate([centre - half, centre + half], axis=-1), image_size)


def encode_deltas(
    boxes: Float[Array, '*batch 4'],
    targets: Float[Array, '*batch 4'],
    stds: tuple[float, float, float, float],
) -> Float[Array, '*batch 4']:
    """Returns the deltas with which `decode_deltas` turns `boxes` into `targets`.

    Boxes and targets must have a positive width and height.
    """
    size, wanted = boxes[..., 2:] - boxes[..., :2], targets[..., 2:] - targets[..., :2]
    shift = (targets[..., :2] + targets[..., 2:] - boxes[..., :2] - boxes[..., 2:]) * 0.5
    deltas = jnp.concatenate([shift / size, jnp.log(wanted / size)], axis=-1)
    return deltas / _for_each(stds, deltas)


def clip_boxes(
    boxes: Float[Array, '*batch 4'], image_size: tuple[int, int] | Float[Array, '2']
) -> Float[Array, '*batch 4']:
    """Returns the boxes' parts inside an image of `(height, width)` pixels."""
    height, width = image_size[0], image_size[1]
    limit = jnp.stack([jnp.asarray(edge, boxes.dtype) for edge in (width, height, width, height)])
    return jnp.clip(boxes, 0, _for_each(limit, boxes))


def _for_each(
    values: tuple[float, ...] | Float[Array, '4'], boxes: Float[Array, '*batch 4']
) -> Float[Array, '*ones 4']:
    """Returns four numbers in the type of boxes or deltas, to broadcast over them."""
    return jnp.asarray(values, boxes.dtype).reshape((1,) * (boxes.ndim - 1) + (4,))
