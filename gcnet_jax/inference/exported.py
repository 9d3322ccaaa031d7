"""What is exported of a stored network: a function of images, with the weights inside.

A classifier's takes uint8 images `[batch, height, width, 3]` and returns probabilities. A
detector's takes images that lie on a canvas, and their sizes on it, and returns what is found. A
segmenter's takes images of one size and returns their label maps.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import export
from jaxtyping import Array, Float, Int, UInt8

from gcnet_jax.data.preprocessing import MAX_SIZE
from gcnet_jax.data.sizes import Size, height_and_width
from gcnet_jax.errors import CheckpointError, ConfigError
from gcnet_jax.inference.classifier import LOGITS, Classifier
from gcnet_jax.inference.detector import Detector
from gcnet_jax.inference.load import load_network
from gcnet_jax.inference.segmenter import Segmenter
from gcnet_jax.stored import ModelDescription, read_model_description

Images = UInt8[Array, 'batch height width 3']
Probabilities = Float[Array, 'batch classes']

# Outputs of a detector's function, in words.
OUTPUT_NOTES = {
    'boxes': 'float32 [batch, object, left top right bottom], in pixels of the canvas',
    'scores': 'float32 [batch, object], falling',
    'labels': 'int32 [batch, object]: index into label_names',
    'valid': 'bool [batch, object]: False where there are fewer objects than places',
    'masks': 'float32 [batch, object, 28, 28]: probability of each cell of the box',
    'finite': 'bool [batch]: False where numbers overflowed, so that objects are missing',
}
# Outputs of a segmenter's function.
SEGMENTER_NOTES = {
    'labels': 'uint8 (uint16 from 256 labels on) [batch, height, width]: index into label_names',
    'finite': 'bool [batch]: False where numbers overflowed, so that labels mean nothing',
}


@dataclasses.dataclass(frozen=True)
class Exported:
    """A function to export, and what its user must know.

    Attributes:
      description: Of the network.
      function: The weights are constants of it.
      inputs: The shape and the type of each argument; the batch is of any size.
      input_notes, output_notes: What each argument and each output is, by its name.
      notes: More of it, by topic.
    """

    description: ModelDescription
    function: Callable[..., Any]
    inputs: tuple[jax.ShapeDtypeStruct, ...]
    input_notes: Mapping[str, str]
    output_notes: Mapping[str, str]
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns what is written beside the file."""
        fields = self.description.to_json()
        return {
            'network': self.description.name,
            'source': self.description.source,
            'inputs': dict(self.input_notes),
            'outputs': dict(self.output_notes),
            'task': self.description.task,
            'preprocessing': fields['preprocessing'],
            **self.notes,
            'label_names': fields['label_names'],
        }


def load_exported(
    checkpoint: str | os.PathLike, choose: str, size: Size | None, **options: Any
) -> Exported:
    """Reads a checkpoint of any kind and returns its function.

    Args:
      checkpoint, choose, size: See `gcnet_jax.inference.export.export_jax`.
      **options: See `StoredNetwork`.

    Raises:
      CheckpointError: It cannot be read, or holds no classifier.
      ConfigError: A size that cannot be.
    """
    options |= {'choose': choose, 'devices': jax.local_devices()[:1]}
    # Their sizes are those of what the function takes, not limits of the images' sides.
    of_size = {'detection': _of_detector, 'segmentation': _of_segmenter}
    task = read_model_description(checkpoint, choose).task
    if task in of_size:
        return of_size[task](load_network(checkpoint, **options), size)
    return _of_classifier(load_network(checkpoint, size=size, **options), checkpoint)


def _of_classifier(classifier: Classifier, checkpoint: str | os.PathLike) -> Exported:
    if not classifier.num_classes:
        raise CheckpointError(
            f'{checkpoint}: {classifier.description.name} was stored without a classifier, so that '
            'there are no probabilities to export'
        )
    variables = jax.device_get(classifier.variables)

    def classify(images: Images) -> Probabilities:
        return classifier.task.probabilities(classifier.compute(variables, images)[LOGITS])

    return Exported(
        classifier.description,
        classify,
        (_any_batch(*classifier.image_shape, 3, dtype=jnp.uint8),),
        {'images': 'uint8 [batch, height, width, RGB]'},
        {'probabilities': 'float32 [batch, class]'},
    )


def _of_detector(detector: Detector, size: Size | None) -> Exported:
    preprocessing = detector.description.preprocessing
    height, width = detector.image_shape if size is None else height_and_width(size)
    if min(height, width) < 1 or preprocessing.padded(height, width) != (height, width):
        raise ConfigError(
            f'the canvas of a detector is a multiple of {preprocessing.multiple_of} pixels high '
            f'and wide, got {height}x{width}'
        )
    variables = jax.device_get(detector.variables)

    def detect_one(image: UInt8[Array, 'height width 3'], size: Int[Array, '2']) -> dict:
        inputs = {
            'image': image[None],
            'size': size[None].astype(jnp.float32),
            'scale': jnp.ones((1, 2)),
            'original_size': size[None],
        }
        outputs = detector.compute(variables, inputs)
        return {name: outputs[name][0] for name in OUTPUT_NOTES}

    def detect(images: Images, sizes: Int[Array, 'batch 2']) -> dict[str, Array]:
        # One after the other: then their number need not be known.
        return jax.lax.map(lambda each: detect_one(*each), (images, sizes))

    short, long = preprocessing.short_side, preprocessing.long_side
    return Exported(
        detector.description,
        detect,
        _any_batch_of(((height, width, 3), jnp.uint8), ((2,), jnp.int32)),
        {
            'images': f'uint8 [batch, {height}, {width}, RGB]: at the top left, zeros elsewhere',
            'sizes': 'int32 [batch, 2]: height and width of each image on its canvas',
        },
        OUTPUT_NOTES,
        {
            'resize': f'bilinearly, without antialiasing, by min({short} / min(h, w), {long} / '
            f'max(h, w), {height} / h, {width} / w), rounded to whole pixels; divide the boxes by '
            'the resulting scale of each side'
        },
    )


def _of_segmenter(segmenter: Segmenter, size: Size | None) -> Exported:
    preprocessing = segmenter.description.preprocessing
    height, width = segmenter.image_shape if size is None else height_and_width(size)
    if not 1 <= min(height, width) <= max(height, width) <= MAX_SIZE:
        raise ConfigError(
            f'the images of a segmenter are from 1 to {MAX_SIZE} pixels high and wide, got '
            f'{height}x{width}'
        )
    variables = jax.device_get(segmenter.variables)

    def label_one(image: UInt8[Array, 'height width 3']) -> dict:
        inputs = {'image': image[None], 'original': jnp.zeros((1, 0, height, width), bool)}
        outputs = segmenter.compute(variables, inputs)
        return {name: outputs[name][0] for name in SEGMENTER_NOTES}

    def label(images: Images) -> dict[str, Array]:
        # One after the other: then their number need not be known.
        return jax.lax.map(label_one, images)

    short, long = preprocessing.short_side, preprocessing.long_side
    return Exported(
        segmenter.description,
        label,
        (_any_batch(height, width, 3, dtype=jnp.uint8),),
        {'images': f'uint8 [batch, {height}, {width}, RGB]: resized, not padded'},
        SEGMENTER_NOTES,
        {
            'resize': f'bilinearly, without antialiasing, by min({short} / min(h, w), {long} / '
            f'max(h, w)), rounded to whole pixels: images that then are {height} pixels high and '
            f'{width} wide get the labels that gcnet_jax gives them, before it enlarges logits to '
            'the original size'
        },
    )


def _any_batch(*shape: int, dtype: Any) -> jax.ShapeDtypeStruct:
    return _any_batch_of((shape, dtype))[0]


def _any_batch_of(*arrays: tuple[tuple[int, ...], Any]) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Returns arrays of given shapes and types, with one batch of any size in front of all."""
    batch = export.symbolic_shape('batch')
    return tuple(jax.ShapeDtypeStruct((*batch, *shape), dtype) for shape, dtype in arrays)
