"""The few sizes that images of detectors are padded to, and which image belongs on which.

A network is compiled once for each size. An image is laid on the smallest canvas that it fits on at
every size it may be resized to, which its own size alone decides: every process finds the same.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from gcnet_jax.data.keep_ratio import shape_within
from gcnet_jax.data.preprocessing import MAX_SIZE, KeepRatio
from gcnet_jax.data.sizes import Size, format_size, height_and_width, plain_size
from gcnet_jax.errors import ConfigError, DataError, one_line

# Limits of the short and the long side, in pixels.
Limits = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Canvases:
    """Where images go; see `make_canvases`.

    Attributes:
      scales: Limits of the sides, one of which an image is resized to.
      sizes: Height and width of each canvas.
    """

    scales: tuple[Limits, ...]
    sizes: tuple[tuple[int, int], ...]

    def choose(self, height: int, width: int) -> int:
        """Returns the number of the smallest canvas that an image fits on at every scale.

        Raises:
          DataError: It fits on none, or is too elongated to be resized.
        """
        shapes = [shape_within(height, width, *limits) for limits in self.scales]
        needed = tuple(max(sides) for sides in zip(*shapes, strict=True))
        fitting = [
            number
            for number, size in enumerate(self.sizes)
            if needed[0] <= size[0] and needed[1] <= size[1]
        ]
        if not fitting:
            raise DataError(
                f'an image of {width} x {height} pixels becomes up to {needed[1]} x {needed[0]}, '
                f'which fits on no canvas; canvases, as height x width, are '
                f'{", ".join(map(format_size, self.sizes))}'
            )
        return min(fitting, key=lambda number: self.sizes[number][0] * self.sizes[number][1])

    def choose_all(self, source: Any) -> Int[np.ndarray, ' images']:
        """Returns the canvas of every image of a `detection_sources.DetectionSource`.

        Raises:
          DataError: One fits on none; the error names it.
        """
        sizes, first, places = np.unique(
            source.index.sizes, axis=0, return_index=True, return_inverse=True
        )
        chosen = []
        for size, index in zip(sizes.tolist(), first.tolist(), strict=True):
            try:
                chosen.append(self.choose(*size))
            except DataError as error:
                raise DataError(
                    f'{source.describe(index)}: {error}; choose larger limits or canvases, or '
                    'prepare the data set without this image'
                ) from error
        return np.array(chosen, np.int64)[places.reshape(-1)]


def make_canvases(
    preprocessing: KeepRatio,
    scales: Sequence[Limits] | None = None,
    sizes: Sequence[Size] | None = None,
) -> Canvases:
    """Returns the canvases for the limits of a network's images, or for several.

    Args:
      preprocessing: Of the network: its limits, and what canvases are multiples of.
      scales: Limits of the short and the long side, in place of the network's own.
      sizes: Height and width of each canvas, or one number for a square; if None, one for
        landscapes and one for portraits, as large as the largest limits need.

    Raises:
      ConfigError: A limit or a size cannot be.
    """
    if scales is None:
        scales = [(preprocessing.short_side, preprocessing.long_side)]
    scales = tuple(map(plain_size, scales))
    for limits in scales:
        _check_limits(limits)
    if not scales:
        raise ConfigError('scales is empty; it holds limits (short side, long side)')
    if sizes is None:
        short, long = (max(sides) for sides in zip(*scales, strict=True))
        landscape = preprocessing.padded(short, long)
        sizes = dict.fromkeys((landscape, landscape[::-1]))
    sizes = tuple(dict.fromkeys(_canvas(size, preprocessing.multiple_of) for size in sizes))
    if not sizes:
        raise ConfigError('canvases is empty; it holds sizes (height, width)')
    return Canvases(scales, sizes)


def _check_limits(limits: Any) -> None:
    if not _is_pair(limits) or limits[0] > limits[1]:
        raise ConfigError(
            'scales holds limits (short side, long side) of whole numbers from 1 to '
            f'{MAX_SIZE}, the short one first; got {one_line(repr(limits), 80)}'
        )


def _canvas(size: Any, multiple: int) -> tuple[int, int]:
    size = plain_size(size)
    pair = height_and_width(size) if type(size) is int else size
    most = -(-MAX_SIZE // multiple) * multiple
    if not _is_pair(pair, most) or any(side % multiple for side in pair):
        raise ConfigError(
            f'a canvas is height and width in multiples of {multiple} pixels up to {most}, got '
            f'{one_line(repr(size), 80)}'
        )
    return pair


def _is_pair(value: Any, most: int = MAX_SIZE) -> bool:
    is_pair = isinstance(value, tuple) and len(value) == 2
    return is_pair and all(type(side) is int and 1 <= side <= most for side in value)
