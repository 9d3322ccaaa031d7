"""A stored network on the devices: images in, named outputs out. It knows no labels.

What reads the outputs is built on it: `Classifier`, `Detector` and `Segmenter`.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, UInt8

from gcnet_jax.data.on_device import normalize
from gcnet_jax.data.sizes import Size, format_size
from gcnet_jax.errors import CheckpointError, ConfigError, DataError, unknown_name
from gcnet_jax.inference.batches import Inputs, Row, batch_buckets, pad_batch, stream_rows
from gcnet_jax.inference.fold import fold_batch_norms, folded_batch_norm
from gcnet_jax.inference.images import LeftOut, find_images, list_images, load_image
from gcnet_jax.inference.quantize import WEIGHTS, dequantize_kernels, quantize_kernels
from gcnet_jax.stored import ModelDescription, find_checkpoint, load_variables
from gcnet_jax.stored.checks import check_dtype, check_weights

CHOICES = ('best', 'newest')
POOLED = 'pooled'

Images = UInt8[np.ndarray, 'batch height width 3']


class StoredNetwork:
    """A network with its weights on the devices, compiled for the batches that it meets.

    Batches are padded to one of a few sizes (`buckets`), each of which is compiled once for an
    image size and a choice of outputs: at its first use. With several devices every batch is split
    over them.

        network = StoredNetwork.load('runs/digits')
        maps = network.dispatch(images, ['stage2', 'stage3'])['stage3']
        for path, pooled in network.stream_outputs('photos', 'pooled'): ...

    Args:
      description: The network and its preprocessing.
      variables: Its {'params', 'batch_stats'}.
      dtype: Type of the computation, 'float32' or 'bfloat16'; None as the network was trained.
      weights: 'int8' keeps the kernels as 8-bit integers; None as they are.
      fold: Fold BatchNorm into the convolutions: the same outputs to about 1e-6, in less time.
      batch_size: Most images that are computed at once.
      devices: Devices of this process; None for all of them.

    Attributes:
      description: With `dtype` among its options.
      model: The linen module.
      variables: On the devices, folded and quantized.
      output_shapes: The shape of each output for one image of the network's own size, by its name,
        in the order in which the network computes them.
      buckets: The batch sizes that are compiled.
      batch_size: Most images of one `dispatch`: the largest of them.

    Raises:
      CheckpointError: The variables do not fit the network, or the weights are not finite, in
        `dtype` too.
      ConfigError: An option that cannot be.
    """

    # Each image size is compiled for itself, for every batch size that it is met with.
    max_image_sizes = 8
    size_advice = 'resize to one of these'

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
        self.model = self.description.build()
        self.output_shapes: dict[str, tuple[int, ...]] = {}
        self._check(variables)
        check_weights(variables)
        self._fold = fold
        if fold:
            image = jax.ShapeDtypeStruct((1, *self.image_shape, 3), jnp.float32)
            variables = fold_batch_norms(
                self.model, variables, image, train=False, method='outputs'
            )
        check_dtype(variables['params'], self.model.dtype)
        if weights == 'int8':
            variables = quantize_kernels(variables)
        devices = jax.local_devices() if devices is None else list(devices)
        mesh = jax.make_mesh(
            (len(devices),), ('batch',), axis_types=(AxisType.Auto,), devices=devices
        )
        self._whole = NamedSharding(mesh, PartitionSpec())
        self._by_batch = NamedSharding(mesh, PartitionSpec('batch'))
        self.variables = jax.device_put(dict(variables), self._whole)
        self.buckets = batch_buckets(batch_size, len(devices))
        self.batch_size = self.buckets[-1]
        self._image_sizes: set[tuple[int, int]] = set()
        self._compiled = functools.cache(self._jit)

    @classmethod
    def load(
        cls,
        checkpoint: str | os.PathLike,
        *,
        choose: str = 'best',
        size: Size | None = None,
        **options: Any,
    ) -> Self:
        """Reads a checkpoint of any kind.

        Args:
          checkpoint: A workdir of train.py, one of its checkpoints, or a ported directory.
          choose: 'best' by what the run was evaluated on (the newest where none was evaluated), or
            'newest'.
          size: Size that images get, in pixels: one number for a square, or height and width; for a
            detector or a segmenter the limits of the short and the long side. None for the
            network's own.
          **options: See the class.

        Raises:
          CheckpointError: There is none, it is damaged, or of a newer format.
          ConfigError: An option that cannot be.
        """
        if choose not in CHOICES:
            raise ConfigError(unknown_name('choice of a checkpoint', choose, CHOICES))
        if isinstance(size, int) and size < 1:
            raise ConfigError(f'size must be 1 or more, got {size}')
        place = find_checkpoint(checkpoint, choose)
        description, variables = load_variables(place, check=False)  # The constructor does.
        if size is not None:
            preprocessing = description.preprocessing.with_size(size)
            description = dataclasses.replace(description, preprocessing=preprocessing)
        try:
            return cls(description, variables, **options)
        except CheckpointError as error:
            raise CheckpointError(f'{place}: {error}') from error

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the images that `load_image` makes, in pixels."""
        return self.description.preprocessing.test_shape

    def compute(
        self, variables: Mapping[str, Any], images: UInt8[Array, 'batch height width 3']
    ) -> dict[str, Array]:
        """Returns every output of images; the pure function that `dispatch` compiles.

        Args:
          variables: As in the attribute.
          images: Resized and cropped, from 0 to 255.

        Returns:
          The outputs by their names, floating-point ones in float32. Under `jax.jit` only those
          that are used are computed.
        """
        return self._apply(variables, *self.module_inputs(images))

    def module_inputs(self, images: Inputs) -> tuple[Array, ...]:
        """Returns the arguments of the module: of `compute`'s images, normalised ones."""
        preprocessing = self.description.preprocessing
        return (normalize(images, preprocessing.mean, preprocessing.std),)

    def _apply(self, variables: Mapping[str, Any], *inputs: Array) -> dict[str, Array]:
        """Returns every output of what the module itself reads."""
        variables = dequantize_kernels(variables)
        with folded_batch_norm() if self._fold else contextlib.nullcontext():
            outputs = self.model.apply(variables, *inputs, train=False, method='outputs')
        return jax.tree.map(_float32, outputs)

    def dispatch(self, images: Inputs, outputs: str | Sequence[str]) -> Any:
        """Starts to compute outputs of images that are resized and cropped already.

        Args:
          images: At most `batch_size` of them, all of one size, as `load_image` makes them, with a
            batch dimension in front; of up to `max_image_sizes` sizes in all calls.
          outputs: The name of one output, or several names.

        Returns:
          An array `[bucket, ...]` on the devices, not waited for, or a dict of them by the names.
          Rows beyond the images are of the padding.

        Raises:
          ConfigError: There are more images or more sizes, or there is no such output.
        """
        names = self._names(outputs)
        count = self._check_images(images)
        self._check_size(images)
        bucket = next(size for size in self.buckets if size >= count)
        batch = jax.device_put(pad_batch(images, bucket), self._by_batch)
        computed = self._compiled(names)(self.variables, batch)
        return computed[outputs] if isinstance(outputs, str) else computed

    def load_image(self, image: Any, name: object = None) -> Inputs:
        """Reads one image of any kind as the network takes it; see `gcnet_jax.inference.images`.

        Raises:
          DataError: It cannot be read.
        """
        return load_image(image, self.description.preprocessing, name)

    def compute_all(self, images: Sequence[Any], outputs: str | Sequence[str]) -> list[Row]:
        """Computes outputs of any number of images of any kind.

        Args:
          images: Each a path, bytes, a binary file, a Pillow image or an array.
          outputs: See `dispatch`.

        Returns:
          For each image the output as a numpy array, or a dict of several by their names.

        Raises:
          DataError: An image cannot be read; the first such one is named.
          ConfigError: There is no such output.
        """
        self._names(outputs)

        def load(item: tuple[int, Any]) -> Any:
            return self.load_image(item[1], f'image {item[0]}')

        found = []
        with contextlib.closing(self._rows(enumerate(images), outputs, None, load)) as rows:
            for _, row in rows:
                if isinstance(row, DataError):
                    raise row
                found.append(row)
        return found

    def stream_outputs(
        self,
        source: Any,
        outputs: str | Sequence[str],
        *,
        num_threads: int | None = None,
        left_out: LeftOut | None = None,
    ) -> Iterator[tuple[Any, Row | DataError]]:
        """Computes outputs of a folder of any size, or of any number of paths, in bounded memory.

        Images are decoded ahead by threads, and a batch is computed while the next one is read.

        Args:
          source: A folder (with the folders in it; see `find_images`), a file, or an iterable of
            them, which is read no more than two batches ahead.
          outputs: See `dispatch`.
          num_threads: Threads that decode; None for one per processor, at most 16.
          left_out: Counts the files of folders that are no images.

        Yields:
          Each path, in order, with its row as `compute_all` returns it, or with the DataError that
          says why there is none.
        """
        self._names(outputs)
        return self._rows(find_images(source, left_out), outputs, num_threads, self.load_image)

    @property
    def layers(self) -> dict[str, tuple[int, ...]]:
        """The shape of what `features` returns of one image, by the name of the layer."""
        return self.output_shapes

    def features(
        self, images: Any, layer: str = POOLED
    ) -> Float[np.ndarray, '*features'] | Float[np.ndarray, 'batch *features']:
        """Computes the features of one image or several.

        Args:
          images: As in a call.
          layer: 'pooled' (the vector before the classifier), a feature map such as 'stage4' or a
            detector's 'p3', `[height, width, channel]`, or 'logits'; `layers` lists them.

        Returns:
          Features in float32; with a batch dimension unless one image was given.

        Raises:
          DataError: An image cannot be read.
          ConfigError: There is no such layer, or images of different sizes give different maps.
        """
        self._check_layer(layer)
        listed, single = list_images(images)
        rows = self.compute_all(listed, layer)
        if single:
            return rows[0]
        shapes = {row.shape for row in rows}
        if len(shapes) > 1:
            raise ConfigError(
                f'{layer} has another shape for each size of image ({len(shapes)} here): give '
                'images one by one, or of one size'
            )
        return np.stack(rows) if rows else np.zeros((0, *self.layers[layer]), np.float32)

    def stream_features(
        self,
        source: Any,
        layer: str = POOLED,
        *,
        num_threads: int | None = None,
        left_out: LeftOut | None = None,
    ) -> Iterator[tuple[Any, Float[np.ndarray, '*features'] | DataError]]:
        """Computes the features of a folder of any size, as `stream_outputs` does."""
        self._check_layer(layer)
        return self.stream_outputs(source, layer, num_threads=num_threads, left_out=left_out)

    def _check(self, variables: Mapping[str, Any]) -> None:
        """Finds the shapes of the outputs; refuses variables that do not fit the network."""
        names: list[str] = []

        def apply(variables: Mapping[str, Any], images: Array) -> dict[str, Array]:
            outputs = self.model.apply(variables, images, train=False, method='outputs')
            names.extend(outputs)  # JAX sorts what is returned.
            return outputs

        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), dict(variables)
        )
        image = jax.ShapeDtypeStruct((1, *self.image_shape, 3), jnp.float32)
        try:
            outputs = jax.eval_shape(apply, shapes, image)
        except Exception as error:  # What is wrong with options or shapes has errors of many kinds.
            raise CheckpointError(
                f'its variables are not those of {self.description.name}: '
                f'{" ".join(str(error).split())[:200]}'
            ) from error
        self.output_shapes = {name: outputs[name].shape[1:] for name in names}

    def _check_layer(self, layer: str) -> None:
        self._names(layer)

    def _names(self, outputs: str | Sequence[str]) -> tuple[str, ...]:
        """Returns the names of outputs, each once and in one order; refuses unknown ones."""
        names = {outputs} if isinstance(outputs, str) else set(outputs)
        for name in names - self.output_shapes.keys():
            what = f'output of {self.description.name}'
            raise ConfigError(unknown_name(what, name, self.output_shapes))
        return tuple(sorted(names))

    def _check_images(self, images: Inputs) -> int:
        """Returns the number of images; refuses what cannot be a batch."""
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise ConfigError(
                'a batch must be uint8 [batch, height, width, 3], got '
                f'{images.dtype} of shape {images.shape}'
            )
        if len(images) > self.batch_size:
            raise ConfigError(f'at most batch_size={self.batch_size} images, got {len(images)}')
        return len(images)

    def _check_size(self, images: Inputs) -> None:
        """Counts the sizes that are compiled; refuses more than `max_image_sizes`."""
        size = images.shape[1:3]
        if size not in self._image_sizes and len(self._image_sizes) == self.max_image_sizes:
            known = ', '.join(map(format_size, sorted(self._image_sizes)[:8]))
            raise ConfigError(
                f'images of {format_size(size)} pixels: a network is compiled for at most '
                f'{self.max_image_sizes} sizes, and this one was for {known}: {self.size_advice}'
            )
        self._image_sizes.add(size)

    def _jit(self, names: tuple[str, ...]) -> Callable[..., dict[str, Array]]:
        """Returns the compiled function from variables and uint8 images to some outputs."""

        def compute(variables: Mapping[str, Any], images: Array) -> dict[str, Array]:
            outputs = self.compute(variables, images)
            return {name: outputs[name] for name in names}

        return jax.jit(
            compute,
            in_shardings=(self._whole, self._by_batch),
            out_shardings=self._by_batch,
        )

    def _rows(
        self,
        items: Iterable[Any],
        outputs: str | Sequence[str],
        num_threads: int | None,
        load: Callable[[Any], Inputs],
    ) -> Iterator[tuple[Any, Row | DataError]]:
        def dispatch(batch: Inputs) -> Any:
            return self.dispatch(batch, outputs)

        return stream_rows(items, load, dispatch, self.batch_size, num_threads)


def _float32(values: Array) -> Array:
    return values.astype(jnp.float32) if jnp.issubdtype(values.dtype, jnp.floating) else values
