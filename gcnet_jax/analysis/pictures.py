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
from gcnet_jax.data.sizes import format_size
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
# Letters of a title that would not fit become smaller; a letter's mean width by its height.
TITLE_POINTS, LETTER_WIDTH = 10, 0.55
POOL = '/pool'

Picture = UInt8[np.ndarray, 'height width 3']


def draw_attention(
    image: Picture,
    maps: Mapping[str, Float[np.ndarray, 'map_height map_width']],
    *,
    title: str = '',
    all_blocks: bool = False,
    shown: tuple[int, int] | None = None,
) -> Any:
    """Draws what blocks with one map per image attend to: a panel for the last block of each stage.

    A stage is what has the same first name, up to its number, and the same size of map. Colours say
    how often the attention of a position is the uniform attention, from 0 to the panel's peak.

    Args:
      image: What the network saw, before normalisation.
      maps: One image's maps by path: of `attention_maps`, without the batch dimension.
      title: Above the panels.
      all_blocks: A row for each stage with a panel for each of its blocks.
      shown: Height and width of the part at the top left that is drawn, where the rest is padding;
        None for all of the image.

    Returns:
      A matplotlib Figure; `save_figure` writes it.

    Raises:
      ConfigError: The image or a map is of a wrong shape, or there is no map.
    """
    canvas = _Canvas(image, shown)
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
    panels = _Panels(canvas, len(rows), 1 + max(map(len, rows)), title)
    for row, paths in enumerate(rows):
        size = ' x '.join(map(str, canvas.shown))
        panels.show(row, 0, canvas.picture, 'what the network saw', size)
        for column, path in enumerate(paths, start=1):
            panels.show_map(row, column, _values(maps[path]), _name(path))
    return panels.figure


def draw_queries(
    image: Picture,
    maps: Mapping[str, Float[np.ndarray, 'map_height map_width map_height map_width']],
    *,
    queries: Sequence[tuple[float, float]] = QUERIES,
    notes: Mapping[str, object] | None = None,
    title: str = '',
    shown: tuple[int, int] | None = None,
) -> Any:
    """Draws the attention of NonLocal blocks for several queries: a row a block, a panel a query.

    Args:
      image: What the network saw, before normalisation.
      maps: One image's maps by path, first the query's position, then the key's: of
        `attention_maps`, without the batch dimension.
      queries: Row and column of each query, as parts of the height and the width, in [0, 1].
      notes: A line below each row, by path, such as its QueryDistances.
      title: Above the panels.
      shown: As in `draw_attention`.

    Returns:
      A matplotlib Figure; `save_figure` writes it.

    Raises:
      ConfigError: The image or a map is of a wrong shape, a query is out of range, or there is no
        map.
    """
    canvas = _Canvas(image, shown)
    check_queries(queries)
    if not maps:
        raise ConfigError('there is no attention map to draw')
    panels = _Panels(canvas, len(maps), 1 + len(queries), title, notes=bool(notes))
    for row, (path, attention) in enumerate(in_order(maps).items()):
        attention = _values(attention)
        if attention.ndim != 4 or attention.shape[:2] != attention.shape[2:]:
            raise ConfigError(
                f'{path}: maps of queries are [height, width, height, width], got shape '
                f'{attention.shape}'
            )
        whole = panels.show(row, 0, canvas.picture, _name(path), 'and the queries')
        # One scale a row: its panels are there to be compared.
        cells = [canvas.cell(query, attention.shape[:2]) for query in queries]
        peak = max(float(canvas.seen(attention[cell]).max()) for cell in cells)
        for number, cell in enumerate(cells, start=1):
            axes = panels.show_map(row, number, attention[cell], f'query {number}', peak)
            for marked in (whole, axes):
                _mark(marked, canvas.middle(cell, attention.shape[:2]), number)
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


class _Canvas:
    """What the network saw, enlarged where it is small, and the part of it that is shown."""

    def __init__(self, image: Picture, shown: tuple[int, int] | None) -> None:
        _check_image(image)
        self._whole = image.shape[:2]
        self.shown = self._whole if shown is None else shown
        if not all(1 <= part <= whole for part, whole in zip(self.shown, self._whole, strict=True)):
            raise ConfigError(
                f'what is shown of an image of {format_size(self._whole)} pixels cannot be '
                f'{format_size(self.shown)}'
            )
        # Pixels are repeated, so that the maps over them are drawn smoothly.
        self._times = max(1, math.ceil(PANEL_INCHES * DPI / max(self.shown)))
        self._enlarged = image.repeat(self._times, axis=0).repeat(self._times, axis=1)

    @property
    def picture(self) -> Picture:
        """The part that is shown."""
        return self._crop(self._enlarged)

    def overlay(self, attention: Float[np.ndarray, 'map_height map_width'], peak: float) -> Picture:
        """Returns the part that is shown under a map's colours; the map covers the whole."""
        return self._crop(overlay(self._enlarged, attention, peak))

    def seen(self, attention: Float[np.ndarray, 'map_height map_width']) -> np.ndarray:
        """Returns the values of a map that lie on the part that is shown."""
        rows, columns = (math.ceil(share * n) for share, n in self._shares(attention.shape))
        return attention[:rows, :columns]

    def cell(self, query: tuple[float, float], shape: tuple[int, int]) -> tuple[int, int]:
        """Returns where on a map a query lies, which is in parts of the height and width shown."""
        row, column = (
            min(int(part * share * size), math.ceil(share * size) - 1)
            for part, (share, size) in zip(query, self._shares(shape), strict=True)
        )
        return row, column

    def middle(self, cell: tuple[int, int], shape: tuple[int, int]) -> tuple[float, float]:
        """Returns the middle of what is shown of a map's position, in pixels of `picture`."""
        y, x = (
            (index / count * whole + min((index + 1) / count * whole, part)) / 2 * self._times - 0.5
            for index, count, whole, part in zip(cell, shape, self._whole, self.shown, strict=True)
        )
        return y, x

    def _shares(self, shape: tuple[int, int]) -> list[tuple[float, int]]:
        """Returns how much of the height and of the width is shown, each with a map's size."""
        parts = zip(self.shown, self._whole, strict=True)
        return [(part / whole, size) for (part, whole), size in zip(parts, shape, strict=True)]

    def _crop(self, picture: Picture) -> Picture:
        height, width = self.shown
        return picture[: height * self._times, : width * self._times]


class _Panels:
    """A figure of equal panels, each with three lines of text above it and a scale below.

    Laid out in inches: matplotlib's own layouts give panels with and without a scale other sizes.
    """

    def __init__(self, canvas: _Canvas, rows: int, columns: int, title: str, notes: bool = False):
        from matplotlib.figure import Figure

        self._canvas = canvas
        height, width = canvas.shown
        self._panel = (PANEL_INCHES, PANEL_INCHES * height / width)
        self._row = TEXT_INCHES + self._panel[1] + SCALE_INCHES + (NOTE_INCHES if notes else 0.0)
        self._top = TITLE_INCHES if title else 0.1
        self._size = (
            columns * (PANEL_INCHES + 0.15) + 0.15,
            rows * self._row + self._top + FOOT_INCHES,
        )
        self.figure = Figure(figsize=self._size)
        if title:
            fitting = 72 * self._size[0] / (LETTER_WIDTH * len(title))
            place = 0.5 * self._size[0], self._size[1] - 0.22
            self._text(*place, title, min(TITLE_POINTS, fitting), ha='center')

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
        attention: np.ndarray,
        name: str,
        peak: float | None = None,
    ) -> Any:
        """Draws a map over the image, with its scale from 0 to `peak`, or to the map's own."""
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        highest = float(self._canvas.seen(attention).max())
        peak = highest if peak is None else peak
        size = ' x '.join(map(str, attention.shape))
        text = f'{size}, peak {_factor(highest * attention.size)} x uniform'
        axes = self.show(row, column, self._canvas.overlay(attention, peak), name, text)
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

    def _text(self, left: float, bottom: float, text: str, size: float, **options: Any) -> None:
        """Writes text at a place in inches; a file's name may look like TeX to matplotlib."""
        width, height = self._size
        self.figure.text(
            left / width, bottom / height, text, fontsize=size, parse_math=False, **options
        )


def _mark(axis: Any, place: tuple[float, float], number: int) -> None:
    """Rings a query and writes its number beside it."""
    y, x = place
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


def _name(path: str) -> str:
    """The block's path without what is the same in each, on two lines."""
    return path.removesuffix(POOL).replace('/', '\n', 1)


def _factor(value: float) -> str:
    return f'{value:.2f}' if value < 10 else f'{value:.0f}'
