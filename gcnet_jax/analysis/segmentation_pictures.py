"""Pictures of label maps: colours over the image with a legend, and the maps themselves.

Drawn with Pillow at the resolution of the image, so that a label's pixels are those of the picture.
"""

import os
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt, UInt8
from PIL import Image, ImageDraw

from gcnet_jax.analysis.drawing import Picture, enlarged, load_font, write_picture
from gcnet_jax.data.segmentation_labels import palette
from gcnet_jax.errors import DataError, one_line
from gcnet_jax.files import as_path, write_whole
from gcnet_jax.tasks.label_map import LabelMap, format_share

# How much of the picture is colour, inside of regions; the rest is the image. Their borders are
# darkened by the last factor.
OPACITY, BORDER = 0.55, 0.45
# Rows that are coloured at once: the picture in floating point takes eight times its memory.
BAND_ROWS = 256
# Letters of the legend, of the longer side of the picture.
LETTER, MIN_LETTER = 1 / 62, 13
PAPER, INK, FRAME = (255, 255, 255), (20, 20, 20), (120, 120, 120)
# Labels in the legend, and letters of one.
MAX_LISTED, MAX_LABEL = 40, 40


def draw_label_map(
    image: Picture | Image.Image,
    label_map: LabelMap,
    colors: UInt8[np.ndarray, 'classes 3'] | None = None,
) -> Image.Image:
    """Draws the labels of an image: translucent colours, and a legend below the image.

    The legend lists the labels that occur with their shares of the image, the largest first.

    Args:
      image: The original image.
      label_map: Its labels.
      colors: Of each label; None for those of `data.segmentation_labels.palette`.

    Returns:
      A picture in RGB with the image, or with a multiple of a small image, at the top left.

    Raises:
      ConfigError: The image is not of the size of the label map.
    """
    if colors is None:
        colors = palette(label_map.label_names, len(label_map.label_names))
    pixels, factor = enlarged(image, label_map.size, 'labels')
    _draw_labels(pixels, label_map.labels, colors, factor)
    legend = _draw_legend(label_map, colors, pixels.shape[1], max(pixels.shape[:2]))
    size = (max(pixels.shape[1], legend.width), pixels.shape[0] + legend.height)
    picture = Image.new('RGB', size, PAPER)
    picture.paste(Image.fromarray(pixels), (0, 0))
    picture.paste(legend, (0, pixels.shape[0]))
    return picture


def write_overlay(
    image: Picture | Image.Image, label_map: LabelMap, path: str | os.PathLike
) -> Path:
    """Writes the picture of `draw_label_map` to a PNG or JPEG file; see `write_picture`."""
    return write_picture(lambda: draw_label_map(image, label_map), path)


def write_label_map(label_map: LabelMap, path: str | os.PathLike) -> Path:
    """Writes the labels to a PNG file of the size of the image.

    Its values are the numbers of the labels, and its palette their colours; of maps with more than
    256 labels it is 16-bit grey.

    Raises:
      DataError: It cannot be written.
    """
    path = as_path(path, '--maps')
    labels = label_map.labels
    if labels.dtype == np.uint8:
        picture = Image.fromarray(labels)
        picture.putpalette(palette(label_map.label_names, len(label_map.label_names)).tobytes())
    else:
        picture = Image.fromarray(labels.astype(np.uint16))
    with write_whole(path, DataError) as aside:
        picture.save(aside, 'PNG')
    return path


def _draw_labels(
    pixels: Picture,
    labels: UInt[np.ndarray, 'height width'],
    colors: UInt8[np.ndarray, 'classes 3'],
    factor: int,
) -> None:
    """Colours the pixels in place, a band of rows at a time."""
    line = max(1, round(max(pixels.shape[:2]) / 1000))
    for top in range(0, len(pixels), BAND_ROWS):
        bottom = min(top + BAND_ROWS, len(pixels))
        # With the rows around the band, in which a border could lie.
        first, last = max(0, top - line), min(len(pixels), bottom + line)
        rows = np.arange(first, last) // factor
        around = labels[rows].repeat(factor, axis=1)
        border = _borders(around, line)[top - first : bottom - first]
        color = colors[around[top - first : bottom - first]].astype(np.float32)
        color[border] *= BORDER
        opacity = np.where(border, 0.85, OPACITY).astype(np.float32)[..., None]
        band = pixels[top:bottom]
        band[:] = np.round(band * (1 - opacity) + color * opacity)


def _borders(
    labels: UInt[np.ndarray, 'rows columns'], line: int
) -> Bool[np.ndarray, 'rows columns']:
    """Returns the pixels whose label differs from that of a pixel `line` below or beside them."""
    border = np.zeros(labels.shape, bool)
    border[:-line] |= labels[:-line] != labels[line:]
    border[:, :-line] |= labels[:, :-line] != labels[:, line:]
    return border


def _draw_legend(
    label_map: LabelMap, colors: UInt8[np.ndarray, 'classes 3'], width: int, side: int
) -> Image.Image:
    """Draws the labels that occur, in columns of equal width, row by row."""
    letter = max(MIN_LETTER, round(side * LETTER))
    font, gap = load_font(letter), round(letter * 0.6)
    found = label_map.found()
    entries = [
        (
            tuple(colors[label].tolist()),
            one_line(label_map.label_names[label], MAX_LABEL),
            format_share(count / label_map.labels.size),
        )
        for label, count in found[:MAX_LISTED]
    ]
    if len(found) > MAX_LISTED:
        rest = sum(count for _, count in found[MAX_LISTED:]) / label_map.labels.size
        entries.append((PAPER, f'{len(found) - MAX_LISTED} more', format_share(rest)))
    names = max(font.getlength(name) for _, name, _ in entries)
    shares = max(font.getlength(share) for *_, share in entries)
    column = round(letter + gap + names + gap + shares + 3 * gap)
    columns = max(1, min(len(entries), (width - gap) // column))
    row = round(letter * 1.6)
    height = -(-len(entries) // columns) * row + 2 * gap
    picture = Image.new('RGB', (max(width, column + gap), height), PAPER)
    draw = ImageDraw.Draw(picture)
    for index, (color, name, share) in enumerate(entries):
        left, top = gap + index % columns * column, gap + index // columns * row
        box = (left, top + (row - letter) // 2, left + letter, top + (row - letter) // 2 + letter)
        draw.rectangle(box, fill=color, outline=PAPER if color == PAPER else FRAME)
        middle = top + row // 2
        draw.text((left + letter + gap, middle), name, fill=INK, font=font, anchor='lm')
        right = left + column - 3 * gap
        draw.text((right, middle), share, fill=INK, font=font, anchor='rm')
    return picture
