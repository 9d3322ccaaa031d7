"""Pictures of attention: each block's map over the image, and NonLocal's maps query by query.

Figures are made without pyplot, so that nothing here touches a program's own figures or needs a
screen. matplotlib is imported when the first one is drawn.
"""

import io
import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from gcnet_jax.analysis.attention_maps import in_order
from gcnet_jax.errors import ConfigError, UserError
from gcnet_jax.files import as_path, write_whole

# Row and column of the default queries, as parts of the height and the width.
QUERIES = ((0.5, 0.5), (0.2, 0.2), (0.2, 0.8), (0.8, 0.2), (0.8, 0.8))
COLORMAP = 'inferno'
SCALE = 'scale: attention as a multiple of uniform attention, which is 1 everywhere'
# How much of a panel is colour, at no attention and at the peak. The rest is the image, in grey so
# that it cannot be mistaken for a colour of the scale.
OPACITY = (0.4, 0.85)
PANEL_INCHES = 2.2
TITLE_INCHES, NOTE_INCHES, FOOT_INCHES = 0.4, 0.3, 0.25
# In a panel, beside the image: three lines of text above, the scale below.
TEXT_INCHES, SCALE_INCHES = 0.55, 0.42
DPI = 100
MAX_COLUMNS = 8
POOL = '/pool'

Picture = UInt8[np.ndarray, 'height width 3']


def draw_attention(
    image: Picture,
    maps: Mapping[str, Float[np.ndarray, 'map_height map_width']],
    *,
    title: str = '',
    all_blocks: bool = False,
) -> Any:
    """Draws what blocks with one map per image attend to: a panel for the last block of each stage.

    A stage is what has the same first name, up to its number, and the same size of map. Colours say
    how often the attention of a position is the uniform attention, from 0 to the panel's peak.

    Args:
      image: What the network saw, before normalisation.
      maps: One image's maps by path: of `attention_maps`, without the batch dimension.
      title: Above the panels.
      all_blocks: A row for each stage with a panel for each of its blocks.

    Returns:
      A matplotlib Figure; `save_figure` writes it.

    Raises:
      ConfigError: The image or a map is of a wrong shape, or there is no map.
    """
    _check_image(image)
    for path, attention in maps.items():
        if np.ndim(attention) != 2:
            raise ConfigError(
                f'{path}: a map to draw is [height, width], got shape {np.shape(attention)}; '
                'draw_queries draws the maps of NonLocal, and a batch is drawn image by image'
            )
    stages = group_by_stage(maps)
    if not stages:
        raise ConfigError('there is no attention map to draw')
    if all_blocks:
        rows = [part for stage in stages for part in _parts(stage, MAX_COLUMNS - 1)]
    else:
        rows = _parts([stage[-1] for stage in stages], MAX_COLUMNS - 1)
    panels = _Panels(image, len(rows), 1 + max(map(len, rows)), title)
    enlarged = _enlarged(image)
    for row, paths in enumerate(rows):
        panels.show(row, 0, enlarged, 'what the network saw', ' x '.join(map(str, image.shape[:2])))
        for column, path in enumerate(paths, start=1):
            panels.show_map(row, column, enlarged, _values(maps[path]), _name(path))
    return panels.figure


def draw_queries(
    image: Picture,
    maps: Mapping[str, Float[np.ndarray, 'map_height map_width map_height map_width']],
    *,
    queries: Sequence[tuple[float, float]] = QUERIES,
    notes: Mapping[str, object] | None = None,
    title: str = '',
) -> Any:
    """Draws the attention of NonLocal blocks for several queries: a row a block, a panel a query.

    Args:
      image: What the network saw, before normalisation.
      maps: One image's maps by path, first the query's position, then the key's: of
        `attention_maps`, without the batch dimension.
      queries: Row and column of each query, as parts of the height and the width, in [0, 1].
      notes: A line below each row, by path, such as its QueryDistances.
      title: Above the panels.

    Returns:
      A matplotlib Figure; `save_figure` writes it.

    Raises:
      ConfigError: The image or a map is of a wrong shape, a query is out of range, or there is no
        map.
    """
    _check_image(image)
    check_queries(queries)
    if not maps:
        raise ConfigError('there is no attention map to draw')
    panels = _Panels(image, len(maps), 1 + len(queries), title, notes=bool(notes))
    enlarged = _enlarged(image)
    for row, (path, attention) in enumerate(in_order(maps).items()):
        attention = _values(attention)
        if attention.ndim != 4 or attention.shape[:2] != attention.shape[2:]:
            raise ConfigError(
                f'{path}: maps of queries are [height, width, height, width], got shape '
                f'{attention.shape}'
            )
        whole = panels.show(row, 0, enlarged, _name(path), 'and the queries')
        # One scale a row: its panels are there to be compared.
        cells = [_cell(query, attention.shape[:2]) for query in queries]
        peak = max(float(attention[cell].max()) for cell in cells)
        for number, cell in enumerate(cells, start=1):
            axes = panels.show_map(row, number, enlarged, attention[cell], f'query {number}', peak)
            for marked in (whole, axes):
                _mark(marked, enlarged, cell, attention.shape[:2], number)
        if notes and path in notes:
            panels.note(row, str(notes[path]))
    return panels.figure


def overlay(image: Picture, attention: Float[np.ndarray, 'map_height map_width'], peak: float):
    """Returns the image in grey under the map's colours, `[height, width, 3]` in uint8.

    Args:
      image: What the network saw.
      attention: Each value covers an equal part of the image.
      peak: The value that gets the brightest colour.
    """
    import matplotlib

    height, width = image.shape[:2]
    values = np.ascontiguousarray(attention / peak if peak > 0 else attention, np.float32)
    # Bilinear never exceeds the map's own values.
    smooth = Image.fromarray(values).resize((width, height), Image.Resampling.BILINEAR)
    values = np.clip(np.asarray(smooth), 0, 1)
    colours = matplotlib.colormaps[COLORMAP](values)[..., :3]
    grey = np.asarray(Image.fromarray(image).convert('L'), np.float32)[..., None] / 255
    opacity = np.interp(values, (0, 1), OPACITY)[..., None]
    return np.round(255 * (opacity * colours + (1 - opacity) * grey)).astype(np.uint8)


def group_by_stage(maps: Mapping[str, np.ndarray]) -> list[list[str]]:
    """Returns the paths of each stage; the stage with the largest maps comes first."""
    stages: dict[tuple, list[str]] = {}
    for path, attention in in_order(maps).items():
        name = re.sub(r'_\d+$', '', path.partition('/')[0])
        stages.setdefault((name, np.shape(attention)), []).append(path)
    return [stages[key] for key in sorted(stages, key=lambda key: -math.prod(key[1]))]


def check_queries(queries: Iterable[tuple[float, float]]) -> None:
    """Raises ConfigError unless each query is a row and a column in [0, 1]."""
    for query in queries:
        if len(query) != 2 or not all(0 <= part <= 1 for part in query):
            raise ConfigError(
                f'a query is its row and its column as parts of the height and the width, from 0 '
                f'to 1, such as 0.5,0.25; got {",".join(map(str, query))}'
            )


def save_figure(figure: Any, path: str | os.PathLike) -> Path:
    """Writes a figure as PNG, completely or not at all.

    Raises:
      UserError: It cannot be written.
    """
    path = as_path(path, '--out')
    with write_whole(path, UserError) as partial:
        partial.write_bytes(png_bytes(figure))
    return path


def png_bytes(figure: Any) -> bytes:
    """Returns a figure as the bytes of a PNG file."""
    data = io.BytesIO()
    with warnings.catch_warnings():
        # A letter that the font lacks, in the name of a file, is drawn as a box.
        warnings.filterwarnings('ignore', message='.*Glyph')
        figure.savefig(data, format='png', dpi=DPI)
    return data.getvalue()


def _values(attention: Any) -> np.ndarray:
    return np.asarray(attention, np.float32)


def _parts(paths: list[str], size: int) -> list[list[str]]:
    return [paths[start : start + size] for start in range(0, len(paths), size)]


def _check_image(image: Any) -> None:
    shape, dtype = np.shape(image), getattr(image, 'dtype', type(image).__name__)
    if len(shape) != 3 or shape[-1] != 3 or 0 in shape or dtype != np.uint8:
        raise ConfigError(
            f'the image to draw on is uint8 [height, width, 3], before normalisation; got {dtype} '
            f'of shape {shape}'
        )


class _Panels:
    """A figure of equal panels, each with three lines of text above it and a scale below.

    Laid out in inches: matplotlib's own layouts give panels with and without a scale other sizes.
    """

    def __init__(self, image: Picture, rows: int, columns: int, title: str, notes: bool = False):
        from matplotlib.figure import Figure

        height, width = image.shape[:2]
        self._panel = (PANEL_INCHES, PANEL_INCHES * height / width)
        self._row = TEXT_INCHES + self._panel[1] + SCALE_INCHES + (NOTE_INCHES if notes else 0.0)
        self._top = TITLE_INCHES if title else 0.1
        self._size = (
            columns * (PANEL_INCHES + 0.15) + 0.15,
            rows * self._row + self._top + FOOT_INCHES,
        )
        self.figure = Figure(figsize=self._size)
        if title:
            self._text(0.5 * self._size[0], self._size[1] - 0.22, title, 10, ha='center')

        self._text(0.15, 0.08, SCALE, 7, color='0.3')

    def _axes(self, row: int, column: int, top: float, height: float) -> Any:
        """Adds axes; `top` and `height` in inches, from the top of the panel's image."""
        left = 0.15 + column * (PANEL_INCHES + 0.15)
        bottom = self._size[1] - self._top - row * self._row - TEXT_INCHES - top - height
        width, total = self._size
        return self.figure.add_axes(
            (left / width, bottom / total, PANEL_INCHES / width, height / total)
        )

    def show(self, row: int, column: int, picture: Picture, *lines: str) -> Any:
        """Draws a picture with lines of text above it; returns its axes."""
        axes = self._axes(row, column, 0.0, self._panel[1])
        axes.imshow(picture, aspect='auto', interpolation='antialiased')
        axes.set_axis_off()
        axes.set_title('\n'.join(lines), fontsize=8, pad=3, parse_math=False)
        return axes

    def show_map(
        self,
        row: int,
        column: int,
        image: Picture,
        attention: np.ndarray,
        name: str,
        peak: float | None = None,
    ) -> Any:
        """Draws a map over the image, with its scale from 0 to `peak`, or to the map's own."""
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        highest = float(attention.max())
        peak = highest if peak is None else peak
        size = ' x '.join(map(str, attention.shape))
        text = f'{size}, peak {_factor(highest * attention.size)} x uniform'
        axes = self.show(row, column, overlay(image, attention, peak), name, text)
        scale = ScalarMappable(Normalize(0, peak * attention.size), COLORMAP)
        bar = self._axes(row, column, self._panel[1] + 0.05, 0.07)
        # Short labels: that of the end stands close to the 0 of the next panel.
        self.figure.colorbar(scale, cax=bar, orientation='horizontal', format='%g')
        bar.tick_params(labelsize=7, length=2, pad=1)
        bar.locator_params(nbins=5)
        return axes

    def note(self, row: int, text: str) -> None:
        """Writes a line below a row."""
        self._text(0.15, self._size[1] - self._top - (row + 1) * self._row + 0.15, text, 9)

    def _text(self, left: float, bottom: float, text: str, size: int, **options: Any) -> None:
        """Writes text at a place in inches; a file's name may look like TeX to matplotlib."""
        width, height = self._size
        self.figure.text(
            left / width, bottom / height, text, fontsize=size, parse_math=False, **options
        )


def _mark(axis: Any, image: Picture, cell: tuple[int, int], shape: tuple[int, int], number: int):
    """Rings the middle of a query's cell and writes its number beside it."""
    y, x = ((index + 0.5) / count for index, count in zip(cell, shape, strict=True))
    y, x = y * image.shape[0] - 0.5, x * image.shape[1] - 0.5
    axis.plot(x, y, 'o', markersize=9, markerfacecolor='none', markeredgecolor='black', mew=3)
    axis.plot(x, y, 'o', markersize=9, markerfacecolor='none', markeredgecolor='white', mew=1.5)
    axis.annotate(
        str(number),
        (x, y),
        (7, 5),
        textcoords='offset points',
        color='white',
        fontsize=8,
        bbox={'boxstyle': 'round,pad=0.15', 'facecolor': 'black', 'linewidth': 0},
    )


def _cell(query: tuple[float, float], shape: tuple[int, int]) -> tuple[int, int]:
    """Returns the position of the map that a query in parts of the height and width lies in."""
    row, column = (min(int(part * size), size - 1) for part, size in zip(query, shape, strict=True))
    return row, column


def _enlarged(image: Picture) -> Picture:
    """Repeats the pixels of a small image, so that the maps over it are drawn smoothly."""
    times = max(1, math.ceil(PANEL_INCHES * DPI / max(image.shape[:2])))
    return image.repeat(times, axis=0).repeat(times, axis=1)


def _name(path: str) -> str:
    """The block's path without what is the same in each, on two lines."""
    return path.removesuffix(POOL).replace('/', '\n', 1)


def _factor(value: float) -> str:
    return f'{value:.2f}' if value < 10 else f'{value:.0f}'
