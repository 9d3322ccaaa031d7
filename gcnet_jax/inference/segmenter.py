"""A segmenter from a checkpoint: images in, maps of labels out."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gcnet_jax.errors import CheckpointError, ConfigError, DataError
from gcnet_jax.inference.batches import Inputs, convert_rows
from gcnet_jax.inference.images import LeftOut, list_images, load_keeping_ratio
from gcnet_jax.inference.whole_images import WholeImageNetwork, not_finite
from gcnet_jax.ops.resize import map_resized
from gcnet_jax.tasks.label_map import LabelMap

LABELS, PROBABILITIES, FINITE = 'labels', 'probabilities', 'finite'
# What makes the LabelMap of an image.
LABEL_OUTPUTS = (LABELS, FINITE)
# Logits of this many pixels times classes are resized at once, in float32.
BLOCK_VALUES = 2**24
# Probabilities of a batch; labels take a byte a pixel instead of four bytes a class.
MAX_PROBABILITY_BYTES = 4_000_000_000
# With more labels than this, the value 255 of a byte would be a label and not the ignored one.
MAX_BYTE_LABELS = 255


class Segmenter(WholeImageNetwork):
    """A stored network that gives each pixel of an image a label.

        segmenter = Segmenter.load('checkpoints/gc_cityscapes')
        segmenter('street.jpg').labels
        for path, label_map in segmenter.stream('photos'): ...

    Images keep their ratio and are not padded: global context sees the image and nothing else. The
    network's logits are resized to the original image, and the largest one is its label. Each pair
    of an original and a resized size is compiled for itself; when there are `max_image_sizes`, all
    are dropped and compiled anew where they are met again.

    Raises:
      CheckpointError: The variables, the label names or the preprocessing do not fit the network.
      ConfigError: An option that cannot be.
    """

    task = 'segmentation'
    no_layers = frozenset({*LABEL_OUTPUTS, PROBABILITIES})

    def __call__(self, images: Any, *, probabilities: bool = False) -> LabelMap | list[LabelMap]:
        """Labels the pixels of one image or several.

        Args:
          images: A path, encoded bytes, a file opened for reading bytes, a Pillow image or an array
            (uint8, or floating point in 0..1; `[height, width]`, `[height, width, 1, 3 or 4]`, or
            with a batch dimension in front), or a sequence of them, of any sizes.
          probabilities: Return those of all labels, too: four bytes for each pixel and label.

        Returns:
          The label map of one image, a list of them for a batch or a sequence.

        Raises:
          DataError: An image cannot be read; the first such one is named.
          ConfigError: The probabilities would take too much memory.
        """
        listed, single = list_images(images)
        rows = self.compute_all(listed, _outputs(probabilities))
        found = [self._label_map(row) for row in rows]
        return found[0] if single else found

    def stream(
        self,
        source: Any,
        *,
        probabilities: bool = False,
        num_threads: int | None = None,
        left_out: LeftOut | None = None,
    ) -> Iterator[tuple[Any, LabelMap | DataError]]:
        """Goes through a folder of any size, or any number of paths, in bounded memory.

        Args:
          source: A folder (with the folders in it; see `find_images`), a file, or an iterable of
            them, which is read no more than two batches ahead.
          probabilities: As in a call.
          num_threads: Threads that decode; None for one per processor, at most 16.
          left_out: Counts the files of folders that are no images.

        Yields:
          Each path, in order, with its label map, or with the DataError that says why there is
          none.
        """
        rows = self.stream_outputs(
            source, _outputs(probabilities), num_threads=num_threads, left_out=left_out
        )
        return convert_rows(rows, self._label_map)

    def stream_items(
        self, items: Any, load: Any, *, num_threads: int | None = None
    ) -> Iterator[tuple[Any, LabelMap | DataError]]:
        """Does as `stream` with anything that `load` turns into what `load_image` returns.

        Args:
          items: Read no more than two batches ahead.
          load: Called in threads; its DataErrors take the place of label maps.
          num_threads: Threads that load; None for one per processor, at most 16.
        """
        return convert_rows(self._rows(items, LABEL_OUTPUTS, num_threads, load), self._label_map)

    def load_image(self, image: Any, name: object = None) -> Inputs:
        """Reads one image of any kind as the network takes it.

        Returns:
          'image', uint8, resized; and 'original', `[0, height, width]`: an empty array, whose shape
          is that of the original image, for which the network is compiled.

        Raises:
          DataError: It cannot be read.
        """
        resized, original = load_keeping_ratio(image, self.description.preprocessing, name)
        return {'image': resized, 'original': np.zeros((0, *original), bool)}

    def dispatch(self, images: Inputs, outputs: str | Sequence[str] = LABEL_OUTPUTS) -> Any:
        """Starts to compute outputs, the labels by default; see `StoredNetwork.dispatch`."""
        if PROBABILITIES in self._names(outputs):
            self._check_memory(images)
        return super().dispatch(images, outputs)

    def compute(self, variables: Mapping[str, Any], inputs: Inputs) -> dict[str, Array]:
        """Returns every output; the pure function that `dispatch` compiles.

        Args:
          variables: As in the attribute.
          inputs: As `load_image` makes them, with a batch dimension in front.

        Returns:
          The outputs of `EncoderDecoder.outputs`; 'labels' and 'probabilities' of each pixel of the
          original images; and 'finite', whether an image's logits are numbers.
        """
        outputs = self._apply(variables, *self.module_inputs(inputs))
        logits = outputs['logits']
        byte = self.model.num_classes <= MAX_BYTE_LABELS
        resized = functools.partial(
            map_resized,
            values=logits,
            size=inputs['original'].shape[2:],
            align_corners=self.model.align_corners,
            max_values=BLOCK_VALUES,
        )
        kind = jnp.uint8 if byte else jnp.uint16
        return {
            **outputs,
            LABELS: resized(lambda values: jnp.argmax(values, axis=-1).astype(kind)),
            PROBABILITIES: resized(lambda values: jax.nn.softmax(values, axis=-1)),
            FINITE: jnp.isfinite(logits).all(axis=(1, 2, 3)),
        }

    def module_inputs(self, inputs: Inputs) -> tuple[Array, ...]:
        """Returns the arguments of the module: normalised images."""
        return super().module_inputs(inputs['image'])

    def _check(self, variables: Mapping[str, Any]) -> None:
        super()._check(variables)
        multiple = self.description.preprocessing.multiple_of
        if multiple != 1:
            raise CheckpointError(
                f'its preprocessing pads images to multiples of {multiple} pixels; a segmenter '
                'sees them without padding: multiple_of must be 1'
            )
        *size, classes = self.output_shapes['logits']
        self.output_shapes |= {LABELS: (*size,), PROBABILITIES: (*size, classes), FINITE: ()}

    def _check_size(self, images: Inputs) -> None:
        """Drops what is compiled where there would be too much of it."""
        size = (*images['image'].shape[1:3], *images['original'].shape[2:])
        if size not in self._image_sizes and len(self._image_sizes) >= self.max_image_sizes:
            self._compiled.cache_clear()
            self._image_sizes.clear()
        self._image_sizes.add(size)

    def _check_memory(self, images: Inputs) -> None:
        batch, _, height, width = images['original'].shape
        needed = 4 * batch * height * width * self.model.num_classes
        if needed > MAX_PROBABILITY_BYTES:
            raise ConfigError(
                f'the probabilities of {self.model.num_classes} classes for {batch} x {height} x '
                f'{width} pixels would take {needed / 1e9:.1f} GB, more than '
                f'{MAX_PROBABILITY_BYTES / 1e9:.0f} GB: ask for labels only, or give smaller images'
            )

    def _label_map(self, row: Mapping[str, np.ndarray]) -> LabelMap:
        if not row[FINITE]:
            raise not_finite('logits')
        return LabelMap(row[LABELS], self.label_names, row.get(PROBABILITIES))


def _outputs(probabilities: bool) -> tuple[str, ...]:
    return (*LABEL_OUTPUTS, PROBABILITIES) if probabilities else LABEL_OUTPUTS
