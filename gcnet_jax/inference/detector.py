"""A detector from a checkpoint: images in, objects with boxes, labels and masks out."""

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gcnet_jax.data import keep_ratio
from gcnet_jax.data.on_device import normalize, zero_padding
from gcnet_jax.data.preprocessing import KeepRatio
from gcnet_jax.data.sizes import Size, format_size, height_and_width
from gcnet_jax.errors import ConfigError, DataError, one_line, unknown_name
from gcnet_jax.inference.batches import Inputs, convert_rows
from gcnet_jax.inference.images import LeftOut, list_images, load_keeping_ratio
from gcnet_jax.inference.whole_images import WholeImageNetwork, not_finite
from gcnet_jax.models.roi_heads import SCORE_THRESHOLD
from gcnet_jax.tasks.instances import Instances

# What makes the Instances of an image.
INSTANCE_OUTPUTS = ('boxes', 'scores', 'labels', 'valid', 'masks', 'original_size', 'finite')
# Outputs about objects, which are not features of an image.
NO_LAYERS = frozenset({*INSTANCE_OUTPUTS, 'proposals'})


class Detector(WholeImageNetwork):
    """A stored network that finds objects: a box, a label and a mask for each.

        detector = Detector.load('checkpoints/mask_rcnn')
        detector('street.jpg', threshold=0.5).labels
        for path, instances in detector.stream('photos'): ...

    Images keep their ratio and are padded to multiples of 32 pixels; each padded size is compiled
    once, and only images of one padded size share a batch. Arguments, devices and checkpoints are
    those of `WholeImageNetwork`.

    Args:
      canvas: Pads images further, to one of a few sizes (each a number, or height and width; the
        smallest that an image fits into is taken), so that little is compiled. Global context sees
        the padding: answers differ from those without (features by 6 to 9% of their maximum in the
        part that lies next to the padding, for 32 pixels more). None pads as little as can be.

    Raises:
      CheckpointError: The variables or the label names do not fit the network.
      ConfigError: An option that cannot be.
    """

    task = 'detection'
    no_layers = NO_LAYERS
    size_advice = 'pad images to a few sizes with the option canvas'

    def __init__(
        self,
        *args: Any,
        canvas: Size | Sequence[Size] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self._canvases = _canvases(canvas, self.description.preprocessing)

    def __call__(
        self,
        images: Any,
        *,
        threshold: float = SCORE_THRESHOLD,
        classes: Collection[str] | None = None,
    ) -> Instances | list[Instances]:
        """Finds the objects in one image or several.

        Args:
          images: A path, encoded bytes, a file opened for reading bytes, a Pillow image or an array
            (uint8, or floating point in 0..1; `[height, width]`, `[height, width, 1, 3 or 4]`, or
            with a batch dimension in front), or a sequence of them, of any sizes.
          threshold: The lowest score of an object; the network itself drops those up to 0.05.
          classes: Labels that are wanted; None for all.

        Returns:
          The instances of one image, a list of them for a batch or a sequence.

        Raises:
          DataError: An image cannot be read; the first such one is named.
          ConfigError: A threshold that is no score, or an unknown label.
        """
        self._check_choice(threshold, classes)
        listed, single = list_images(images)
        rows = self.compute_all(listed, INSTANCE_OUTPUTS)
        found = [self._instances(row, threshold, classes) for row in rows]
        return found[0] if single else found

    def stream(
        self,
        source: Any,
        *,
        threshold: float = SCORE_THRESHOLD,
        classes: Collection[str] | None = None,
        num_threads: int | None = None,
        left_out: LeftOut | None = None,
    ) -> Iterator[tuple[Any, Instances | DataError]]:
        """Goes through a folder of any size, or any number of paths, in bounded memory.

        Args:
          source: A folder (with the folders in it; see `find_images`), a file, or an iterable of
            them, which is read no more than two batches ahead.
          threshold, classes: As in a call.
          num_threads: Threads that decode; None for one per processor, at most 16.
          left_out: Counts the files of folders that are no images.

        Yields:
          Each path, in order, with its instances, or with the DataError that says why there are
          none.
        """
        self._check_choice(threshold, classes)
        rows = self.stream_outputs(
            source, INSTANCE_OUTPUTS, num_threads=num_threads, left_out=left_out
        )
        return convert_rows(
            rows, functools.partial(self._instances, threshold=threshold, classes=classes)
        )

    def load_image(self, image: Any, name: object = None) -> Inputs:
        """Reads one image of any kind as the network takes it.

        Returns:
          'image', uint8, resized and padded; 'size', height and width of it without padding;
          'scale', of the original to it along the width and the height; and 'original_size', height
          and width of the original.

        Raises:
          DataError: It cannot be read, or fits no canvas.
        """
        preprocessing = self.description.preprocessing
        resized, original = load_keeping_ratio(image, preprocessing, name)
        size = resized.shape[:2]
        canvas = self._canvas(size, image if name is None else name)
        ratios = [new / old for new, old in zip(size, original, strict=True)]
        return {
            'image': keep_ratio.pad(resized, canvas),
            'size': np.array(size, np.float32),
            'scale': np.array(ratios[::-1], np.float32),
            'original_size': np.array(original, np.int32),
        }

    def compute(self, variables: Mapping[str, Any], inputs: Inputs) -> dict[str, Array]:
        """Returns every output; the pure function that `dispatch` compiles.

        Args:
          variables: As in the attribute.
          inputs: As `load_image` makes them, with a batch dimension in front.

        Returns:
          The outputs of `MaskRCNN.outputs`, with 'boxes' in pixels of the original image, and
          'original_size'.
        """
        outputs = self._apply(variables, *self.module_inputs(inputs))
        scale = jnp.tile(inputs['scale'], 2)[:, None]
        return {
            **outputs,
            'boxes': outputs['boxes'] / scale,
            'original_size': inputs['original_size'],
        }

    def module_inputs(self, inputs: Inputs) -> tuple[Array, ...]:
        """Returns the arguments of the module: normalised images, and their sizes."""
        preprocessing, size = self.description.preprocessing, inputs['size']
        images = normalize(inputs['image'], preprocessing.mean, preprocessing.std)
        return zero_padding(images, size), size

    def _check(self, variables: Mapping[str, Any]) -> None:
        super()._check(variables)
        self.output_shapes['original_size'] = (2,)

    def _canvas(self, size: tuple[int, int], name: object) -> tuple[int, int]:
        """Returns the padded height and width of a resized image."""
        if not self._canvases:
            return self.description.preprocessing.padded(*size)
        fitting = [
            canvas for canvas in self._canvases if size[0] <= canvas[0] and size[1] <= canvas[1]
        ]
        if not fitting:
            sizes = ', '.join(map(format_size, self._canvases))
            raise DataError(
                f'{one_line(name)}: resized to {format_size(size)} pixels it fits into no canvas '
                f'({sizes})'
            )
        return min(fitting, key=lambda canvas: canvas[0] * canvas[1])

    def _check_choice(self, threshold: float, classes: Collection[str] | None) -> None:
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
            raise ConfigError(f'threshold must be a number from 0 to 1, got {threshold!r:.80}')
        if not 0 <= threshold <= 1:
            raise ConfigError(f'threshold must be from 0 to 1, got {threshold}')
        if isinstance(classes, str):
            raise ConfigError(f'classes must be several labels, such as [{classes!r:.80}]')
        known = self.label_names
        for label in classes or ():
            if label not in known:
                raise ConfigError(unknown_name('label', label, known))

    def _instances(
        self, row: Mapping[str, np.ndarray], threshold: float, classes: Collection[str] | None
    ) -> Instances:
        if not row['finite']:
            raise not_finite('features, logits or boxes')
        found = np.flatnonzero(row['valid'])
        labels = row['labels'][found]
        names = self.label_names
        height, width = map(int, row['original_size'])
        instances = Instances(
            boxes=row['boxes'][found],
            scores=row['scores'][found],
            labels=tuple(names[label] for label in labels),
            classes=labels,
            size=(height, width),
            mask_probabilities=row['masks'][found],
        )
        return instances.select(threshold, classes)


def _canvases(
    canvas: Size | Sequence[Size] | None, preprocessing: KeepRatio
) -> list[tuple[int, int]]:
    """Reads the option `canvas`.

    Raises:
      ConfigError: A side is no multiple of what the network needs.
    """
    if canvas is None:
        return []
    sides = isinstance(canvas, Sequence) and all(isinstance(side, int) for side in canvas)
    if isinstance(canvas, list) and sides:
        raise ConfigError(
            f'canvas {one_line(repr(canvas), 80)} is ambiguous: write a tuple (height, width) for '
            'one canvas, or a list of tuples for several'
        )
    sizes = list(canvas) if isinstance(canvas, Sequence) and not sides else [canvas]
    multiple = preprocessing.multiple_of
    for size in sizes:
        sides = size if isinstance(size, tuple) else (size, size)
        if len(sides) != 2 or not all(
            isinstance(side, int) and side > 0 and side % multiple == 0 for side in sides
        ):
            raise ConfigError(
                f'a canvas is a multiple of {multiple} pixels, or height and width of such, got '
                f'{one_line(repr(size), 80)}'
            )
    return [height_and_width(size) for size in sizes]
