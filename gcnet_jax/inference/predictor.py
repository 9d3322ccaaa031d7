"""A classifier from a checkpoint: images in, labels with probabilities or features out."""

import contextlib
import dataclasses
import functools
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, UInt8

from gcnet_jax.data.on_device import normalize
from gcnet_jax.errors import CheckpointError, ConfigError, DataError, unknown_name
from gcnet_jax.inference.fold import fold_batch_norms, folded_batch_norm
from gcnet_jax.inference.images import (
    LeftOut,
    find_images,
    list_images,
    load_ahead,
    load_image,
)
from gcnet_jax.inference.prediction import Prediction
from gcnet_jax.inference.quantize import WEIGHTS, dequantize_kernels, quantize_kernels
from gcnet_jax.stored import ModelDescription, find_checkpoint, load_variables
from gcnet_jax.stored.checks import check_dtype, check_weights

CHOICES = ('best', 'newest')
LOGITS, POOLED = 'logits', 'pooled'


class Classifier:
    """A network with its weights on the devices, compiled for the batch sizes that it meets.

    Batches are padded to one of a few sizes (`buckets`), each of which is compiled once: at its
    first use. With several devices every batch is split over them.

        classifier = Classifier.load('runs/digits')
        classifier('seven.png').label
        for path, prediction in classifier.stream('photos'): ...

    Args:
      description: The network, its preprocessing and its labels.
      variables: Its {'params', 'batch_stats'}.
      dtype: Type of the computation, 'float32' or 'bfloat16'; None as the network was trained.
      weights: 'int8' keeps the kernels as 8-bit integers; None as they are.
      fold: Fold BatchNorm into the convolutions: the same logits to about 1e-6, in less time.
      batch_size: Most images that are computed at once.
      devices: Devices of this process; None for all of them.

    Raises:
      CheckpointError: The variables or the label names do not fit the network, or the weights are
        not finite, in `dtype` too.
      ConfigError: An option that cannot be.
    """

    def __init__(
        self,
        description: ModelDescription,
        variables: Mapping[str, Any],
        *,
        dtype: str | None = None,
        weights: str | None = None,
        fold: bool = True,
        batch_size: int = 32,
        devices: Sequence[jax.Device] | None = None,
    ) -> None:
        if weights not in WEIGHTS:
            raise ConfigError(unknown_name('choice of weights', weights, filter(None, WEIGHTS)))
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError(f'batch_size must be 1 or more, got {batch_size!r}')
        options = dict(description.options) | ({} if dtype is None else {'dtype': dtype})
        self.description = dataclasses.replace(description, options=options)
        self._model = self.description.build()
        self._shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), dict(variables)
        )
        self.num_classes = self._check()
        check_weights(variables)
        size = description.preprocessing.test_size
        images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        if fold:
            variables = fold_batch_norms(self._model, variables, images, train=False)
        check_dtype(variables['params'], self._model.dtype)
        if weights == 'int8':
            variables = quantize_kernels(variables)
        devices = jax.local_devices() if devices is None else list(devices)
        mesh = jax.make_mesh(
            (len(devices),), ('batch',), axis_types=(AxisType.Auto,), devices=devices
        )
        self._whole = NamedSharding(mesh, PartitionSpec())
        self._by_batch = NamedSharding(mesh, PartitionSpec('batch'))
        self._variables = jax.device_put(dict(variables), self._whole)
        self.buckets = batch_buckets(batch_size, len(devices))
        self.batch_size = self.buckets[-1]
        self._compiled = functools.cache(self._jit)

    @classmethod
    def load(
        cls, checkpoint: str | os.PathLike, *, choose: str = 'best', **options: Any
    ) -> 'Classifier':
        """Reads a checkpoint of any kind.

        Args:
          checkpoint: A workdir of train.py, one of its checkpoints, or a ported directory.
          choose: 'best' by eval/accuracy (the newest where none was evaluated) or 'newest'.
          **options: See the class.

        Raises:
          CheckpointError: There is none, it is damaged, or of a newer format.
          ConfigError: An option that cannot be.
        """
        if choose not in CHOICES:
            raise ConfigError(unknown_name('choice of a checkpoint', choose, CHOICES))
        place = find_checkpoint(checkpoint, choose)
        description, variables = load_variables(place, check=False)  # The constructor does.
        try:
            return cls(description, variables, **options)
        except CheckpointError as error:
            raise CheckpointError(f'{place}: {error}') from error

    def __call__(self, images: Any, *, top_k: int = 5) -> Prediction | list[Prediction]:
        """Classifies one image or several.

        Args:
          images: A path, encoded bytes, a file opened for reading bytes, a Pillow image or an array
            (uint8, or floating point in 0..1; `[height, width]`, `[height, width, 1, 3 or 4]`, or
            with a batch dimension in front), or a sequence of them, of any sizes.
          top_k: Number of classes to tell.

        Returns:
          A Prediction for one image, a list of them for a batch or a sequence.

        Raises:
          DataError: An image cannot be read; the first such one is named.
          ConfigError: The network has no classifier.
        """
        top_k = self._check_top_k(top_k)
        listed, single = list_images(images)
        predictions = [self._prediction(row, top_k) for row in self._all_rows(listed, LOGITS)]
        return predictions[0] if single else predictions

    def stream(
        self,
        source: Any,
        *,
        top_k: int = 5,
        num_threads: int | None = None,
        left_out: LeftOut | None = None,
    ) -> Iterator[tuple[Any, Prediction | DataError]]:
        """Classifies a folder of any size, or any number of paths, in bounded memory.

        Images are decoded ahead by threads, and a batch is computed while the next one is read.

        Args:
          source: A folder (with the folders in it; see `find_images`), a file, or an iterable of
            them, which is read no more than two batches ahead.
          top_k: Number of classes to tell.
          num_threads: Threads that decode; None for one a processor, at most 16.
          left_out: Counts the files of folders that are no images.

        Yields:
          Each path, in order, with its prediction, or with the DataError that says why there is
          none.

        Raises:
          ConfigError: The network has no classifier.
        """
        top_k = self._check_top_k(top_k)
        rows = self.stream_features(source, LOGITS, num_threads=num_threads, left_out=left_out)
        return self._predictions(rows, top_k)

    def _predictions(
        self, rows: Iterator[tuple[Any, np.ndarray | DataError]], top_k: int
    ) -> Iterator[tuple[Any, Prediction | DataError]]:
        # Closing this generator must end the threads behind the rows, too.
        with contextlib.closing(rows):
            for path, row in rows:
                yield path, row if isinstance(row, DataError) else self._prediction(row, top_k)

    def features(
        self, images: Any, layer: str = POOLED
    ) -> Float[np.ndarray, '*features'] | Float[np.ndarray, 'batch *features']:
        """Computes the features of one image or several.

        Args:
          images: As in a call.
          layer: 'pooled' (the vector before the classifier), a feature map such as 'stage4',
            `[height, width, channel]`, or 'logits'; `layers` lists them.

        Returns:
          Features in float32; with a batch dimension unless one image was given.

        Raises:
          DataError: An image cannot be read.
          ConfigError: There is no such layer.
        """
        self._check_layer(layer)
        listed, single = list_images(images)
        rows = self._all_rows(listed, layer)
        if single:
            return rows[0]
        return np.stack(rows) if rows else np.zeros((0, *self.layers[layer]), np.float32)

    def stream_features(
        self,
        source: Any,
        layer: str = POOLED,
        *,
        num_threads: int | None = None,
        left_out: LeftOut | None = None,
    ) -> Iterator[tuple[Any, Float[np.ndarray, '*features'] | DataError]]:
        """Computes the features of a folder of any size, as `stream` classifies it."""
        self._check_layer(layer)
        return self._rows(find_images(source, left_out), layer, num_threads, self._load_path)

    def dispatch(
        self, images: UInt8[np.ndarray, 'batch height width 3'], layer: str = LOGITS
    ) -> Float[Array, 'bucket *features']:
        """Starts to compute a layer of images that have the network's size already.

        Args:
          images: Resized and cropped; at most `batch_size` of them.
          layer: See `features`.

        Returns:
          An array on the devices, not waited for. Rows beyond the images are of the padding.

        Raises:
          ConfigError: There are more images, or there is no such layer.
        """
        self._check_layer(layer)
        count = len(images)
        if count > self.batch_size:
            raise ConfigError(f'at most batch_size={self.batch_size} images, got {count}')
        bucket = next(size for size in self.buckets if size >= count)
        padding = ((0, bucket - count), *((0, 0),) * 3)
        batch = jax.device_put(np.pad(images, padding), self._by_batch)
        return self._compiled(layer)(self._variables, batch)

    @functools.cached_property
    def layers(self) -> dict[str, tuple[int, ...]]:
        """The shape of what `features` returns of one image, by the name of the layer."""
        outputs = self._trace()
        # Tracing has sorted them by name: back to the order of the network.
        stages = (name for name in outputs if name.startswith('stage'))
        order = ('stem', *sorted(stages, key=lambda name: int(name[5:])), POOLED, LOGITS)
        return {name: outputs[name].shape[1:] for name in order if name in outputs}

    def _trace(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of the network's outputs for one image, without computing."""
        size = self.description.preprocessing.test_size
        images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        apply = functools.partial(self._model.apply, train=False, method='outputs')
        return jax.eval_shape(apply, self._shapes, images)

    def _check(self) -> int:
        """Returns the number of classes; refuses variables that do not fit."""
        try:
            outputs = self._trace()
        except Exception as error:  # What is wrong with options or shapes has errors of many kinds.
            raise CheckpointError(
                f'its variables are not those of {self.description.name}: '
                f'{" ".join(str(error).split())[:200]}'
            ) from error
        if self.description.options.get('num_classes') == 0:
            return 0
        names, classes = len(self.description.label_names), outputs[LOGITS].shape[-1]
        if classes == 1:
            raise CheckpointError(
                'it has one logit, of which the probability would always be 100%: a classifier has '
                'a logit for each class, two at least'
            )
        if names not in (0, classes):
            raise CheckpointError(f'it has {names} label names and {classes} classes')
        return classes

    def _check_layer(self, layer: str) -> None:
        if layer == LOGITS and self.num_classes:
            return  # The other layers' shapes take a trace of the network each.
        if layer == LOGITS:
            raise ConfigError(
                f'{self.description.name} was stored without a classifier: it gives features '
                f'({", ".join(self.layers)}), not labels'
            )
        if layer not in self.layers:
            raise ConfigError(unknown_name(f'layer of {self.description.name}', layer, self.layers))

    def _check_top_k(self, top_k: int) -> int:
        self._check_layer(LOGITS)
        if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
            raise ConfigError(f'top_k must be 1 or more, got {top_k!r}')
        return min(top_k, self.num_classes)

    def _jit(self, layer: str) -> Any:
        """Returns the compiled function from variables and uint8 images to a layer."""
        preprocessing = self.description.preprocessing

        def compute(variables: Mapping[str, Any], images: Array) -> Array:
            images = normalize(images, preprocessing.mean, preprocessing.std)
            variables = dequantize_kernels(variables)
            with folded_batch_norm():
                # XLA computes the one that is returned.
                outputs = self._model.apply(variables, images, train=False, method='outputs')
            return outputs[layer].astype(jnp.float32)

        return jax.jit(
            compute,
            in_shardings=(self._whole, self._by_batch),
            out_shardings=self._by_batch,
        )

    def _load_path(self, path: Any) -> Any:
        try:
            return load_image(path, self.description.preprocessing)
        except DataError as error:
            return error

    def _all_rows(self, images: Sequence[Any], layer: str) -> list[np.ndarray]:
        """Computes a layer of images of any kind; raises at the first that cannot be read."""

        def load(item: tuple[int, Any]) -> Any:
            try:
                return load_image(item[1], self.description.preprocessing, name=f'image {item[0]}')
            except DataError as error:
                return error

        rows = []
        with contextlib.closing(self._rows(enumerate(images), layer, None, load)) as stream:
            for _, row in stream:
                if isinstance(row, DataError):
                    raise row
                rows.append(row)
        return rows

    def _rows(
        self, items: Iterable[Any], layer: str, num_threads: int | None, load: Any
    ) -> Iterator[tuple[Any, np.ndarray | DataError]]:
        """Yields every item with its row of the layer; one batch is computed ahead."""
        ahead = 2 * self.batch_size
        with contextlib.closing(load_ahead(load, items, num_threads, ahead)) as loaded:
            pending = None
            while entries := list(itertools.islice(loaded, self.batch_size)):
                images = [image for _, image in entries if not isinstance(image, DataError)]
                output = self.dispatch(np.stack(images), layer) if images else ()
                if pending is not None:
                    yield from _fetch(*pending)
                pending = entries, output
            if pending is not None:
                yield from _fetch(*pending)

    def _prediction(self, logits: Float[np.ndarray, ' classes'], top_k: int) -> Prediction:
        check_finite(logits)
        exponentials = np.exp(logits.astype(np.float64) - logits.max())
        probabilities = exponentials / exponentials.sum()
        # Stable: of equal logits the lower class comes first, as in evaluation.
        classes = np.argsort(-logits, kind='stable')[:top_k].tolist()
        names = self.description.label_names
        return Prediction(
            labels=tuple(names[index] if names else f'class {index}' for index in classes),
            probabilities=tuple(probabilities[classes].tolist()),
            classes=tuple(classes),
        )


def check_finite(logits: Float[np.ndarray, '*any']) -> None:
    """Raises CheckpointError unless all logits are finite numbers."""
    if not np.isfinite(logits).all():
        raise CheckpointError(
            'the network gives logits that are not finite: its training went wrong, or its dtype '
            'is too small for it; choose another checkpoint, or dtype float32'
        )


def batch_buckets(batch_size: int, device_count: int) -> tuple[int, ...]:
    """Returns the batch sizes that are compiled: powers of two times the devices, and the largest.

    Args:
      batch_size: Most images at once; rounded up to a multiple of the devices.
      device_count: Number of parts that a batch is split into.
    """
    largest = -(-batch_size // device_count)
    sizes = [2**power for power in range(largest.bit_length()) if 2**power < largest]
    return tuple(size * device_count for size in (*sizes, largest))


def _fetch(
    entries: Sequence[tuple[Any, Any]], output: Any
) -> Iterator[tuple[Any, np.ndarray | DataError]]:
    """Yields the entries with a row of the output in the place of each image."""
    rows = iter(np.asarray(output))
    for item, image in entries:
        yield item, image if isinstance(image, DataError) else next(rows)
