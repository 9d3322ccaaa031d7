"""Pictures of what a detector found: boxes, masks and labels over the image.

Drawn with Pillow at the resolution of the image, so that a mask's pixels are those of the picture.
"""

import math
import os
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw

from gcnet_jax.analysis.drawing import Picture, enlarged, load_font, write_picture
from gcnet_jax.errors import one_line
from gcnet_jax.tasks.instances import Instances

Box = tuple[float, float, float, float]

# How much of a mask is colour; the rest is the image.
OPACITY = 0.45
# Of the longer side of the picture: lines of boxes, and letters.
LINE, LETTER = 1 / 500, 1 / 64
MIN_LETTER = 12
# From so many labels on, letters are smaller, because the labels would hide the picture.
MANY, MANY_LETTER = 25, 0.85
# Colours differ by the golden angle in hue, and take turns in lightness (OKLCH).
GOLDEN_ANGLE = math.radians(137.508)
LIGHTNESS, CHROMA = (0.76, 0.66, 0.86), 0.17
INK = (0, 0, 0)
MAX_LABEL = 40
# How bad it is that a label hides a box of its own size or smaller, beside hiding a label.
HIDDEN_BOX = 0.5


def draw_instances(image: Picture | Image.Image, instances: Instances) -> Image.Image:
    """Draws the objects of one image: boxes, translucent masks, labels with scores.

    Every object has a colour of its own. Small objects lie over large ones, and labels stay inside
    the picture and out of each other's way where there is room.

    Args:
      image: The original image, whose pixels the boxes are in.
      instances: What to draw; `Instances.select` leaves out the uncertain ones.

    Returns:
      A picture in RGB, of the size of the image, or of a multiple of it for small images.

    Raises:
      ConfigError: The image is not of the size that the instances belong to.
    """
    pixels, factor = enlarged(image, instances.size, 'instances')
    size = (pixels.shape[1], pixels.shape[0])
    colors = instance_colors(len(instances))
    line = max(1, round(max(size) * LINE))
    # The largest first, so that the smaller ones lie on top.
    areas = np.prod(instances.boxes[:, 2:] - instances.boxes[:, :2], axis=1)
    order = np.argsort(-areas, kind='stable').tolist()
    if instances.has_masks:
        _draw_masks(pixels, instances, colors, order, factor, line)
    picture = Image.fromarray(pixels)
    draw = ImageDraw.Draw(picture)
    boxes = [_on_picture(box, factor, size) for box in instances.boxes.tolist()]
    for index in order:
        draw.rectangle(boxes[index], outline=tuple(colors[index].tolist()), width=line)
    _draw_labels(draw, instances, boxes, colors, size)
    return picture


def write_instances(
    image: Picture | Image.Image, instances: Instances, path: str | os.PathLike
) -> Path:
    """Writes the picture of `draw_instances` to a PNG or JPEG file; see `write_picture`."""
    return write_picture(lambda: draw_instances(image, instances), path)


def instance_colors(count: int) -> UInt8[np.ndarray, 'count 3']:
    """Returns colours that can be told apart, equally strong, on all of which black can be read."""
    index = np.arange(count)
    hue = index * GOLDEN_ANGLE + 0.5
    lightness = np.array(LIGHTNESS)[index % len(LIGHTNESS)]
    # From OKLab to linear sRGB, by https://bottosson.github.io/posts/oklab/.
    a, b = CHROMA * np.cos(hue), CHROMA * np.sin(hue)
    cones = np.stack(
        [
            lightness + 0.3963377774 * a + 0.2158037573 * b,
            lightness - 0.1055613458 * a - 0.0638541728 * b,
            lightness - 0.0894841775 * a - 1.2914855480 * b,
        ]
    )
    to_rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = np.clip(to_rgb @ cones**3, 0, 1).T
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.round(255 * encoded).astype(np.uint8)


def _draw_masks(
    pixels: Picture,
    instances: Instances,
    colors: UInt8[np.ndarray, 'count 3'],
    order: list[int],
    factor: int,
    line: int,
) -> None:
    """Colours the pixels of each mask in place; where masks overlap, the smallest box has them."""
    owner = np.full(pixels.shape[:2], -1, np.int32)
    edges = np.zeros(pixels.shape[:2], bool)
    for index in order:
        # One at a time: all together would take gigabytes for a large image.
        ((top, left, inside),) = instances.take([index]).pasted_masks()
        inside = inside.repeat(factor, axis=0).repeat(factor, axis=1)
        part = np.s_[
            top * factor : top * factor + inside.shape[0],
            left * factor : left * factor + inside.shape[1],
        ]
        owner[part][inside] = index
        edges[part][inside] = _edge(inside, line)[inside]
    covered = owner >= 0
    color = colors[owner[covered]].astype(np.float32)
    opacity = np.where(edges[covered], 1, OPACITY).astype(np.float32)[:, None]
    pixels[covered] = np.round(pixels[covered] * (1 - opacity) + color * opacity)


def _edge(inside: Bool[np.ndarray, 'rows columns'], line: int) -> Bool[np.ndarray, 'rows columns']:
    """Returns the pixels of a mask that are within `line` pixels of its edge."""
    rows, columns = inside.shape
    padded = np.pad(inside, line)
    within = inside.copy()
    for shift in range(1, line + 1):
        for down, right in ((shift, 0), (-shift, 0), (0, shift), (0, -shift)):
            within &= padded[
                line + down : line + down + rows, line + right : line + right + columns
            ]
    return inside & ~within


def _on_picture(box: list[float], factor: int, size: tuple[int, int]) -> Box:
    """Returns a box in pixels of the picture, within it, with corners in order."""
    left, top, right, bottom = (
        min(max(value * factor, 0), size[axis % 2] - 1) for axis, value in enumerate(box)
    )
    return left, top, max(left, right), max(top, bottom)


def _draw_labels(
    draw: ImageDraw.ImageDraw,
    instances: Instances,
    boxes: list[Box],
    colors: UInt8[np.ndarray, 'count 3'],
    size: tuple[int, int],
) -> None:
    """Writes labels with scores, those of the best first, because they get the best places."""
    letter = max(MIN_LETTER, max(size) * LETTER * (MANY_LETTER if len(boxes) >= MANY else 1))
    font = load_font(round(letter))
    pad = max(2, round(letter / 6))
    corners = np.array(boxes).reshape(-1, 4)
    taken, weights = corners, HIDDEN_BOX * np.ones(len(boxes))
    written = []
    for label, score, box, color in zip(
        instances.labels, instances.scores, boxes, colors.tolist(), strict=True
    ):
        text = f'{one_line(label, MAX_LABEL)} {score:.2f}'
        width = draw.textlength(text, font=font) + 2 * pad
        height = sum(font.getmetrics()) + pad
        small = (corners[:, 2:] - corners[:, :2]).prod(axis=1) <= width * height
        weights[: len(boxes)] = HIDDEN_BOX * small
        place = _free_place(box, (width, height), size, taken, weights)
        taken, weights = np.concatenate([taken, [place]]), np.append(weights, 1)
        written.append((place, text, tuple(color)))
    # The best one last: where there is no room, it lies on top.
    for place, text, color in reversed(written):
        draw.rectangle(place, fill=color)
        draw.text((place[0] + pad, place[1] + pad / 2), text, fill=INK, font=font)


def _free_place(
    box: Box,
    label: tuple[float, float],
    size: tuple[int, int],
    taken: Float[np.ndarray, 'places 4'],
    weights: Float[np.ndarray, ' places'],
) -> Box:
    """Returns where a label goes: where it hides least, and above its box if it can."""
    left, top, right, bottom = box
    width, height = label
    best, least = (0.0, 0.0, width, height), math.inf
    for x, y in (
        (left, top - height),  # Above the box,
        (right - width, top - height),
        (left, bottom),  # below it,
        (right - width, bottom),
        (left, top),  # inside at its top,
        (right - width, top),
        (left, bottom - height),  # inside at its bottom,
        (right - width, bottom - height),
        (right, top),  # beside it,
        (left - width, top),
        (left, top - 2 * height),  # and farther above or below.
        (left, bottom + height),
    ):
        x = max(0, min(x, size[0] - 1 - width))
        y = max(0, min(y, size[1] - 1 - height))
        place = (x, y, x + width, y + height)
        overlap = np.minimum(taken[:, 2:], place[2:]) - np.maximum(taken[:, :2], place[:2])
        hidden = float(np.clip(overlap, 0, None).prod(axis=1) @ weights)
        if hidden < least:
            best, least = place, hidden
    return best
