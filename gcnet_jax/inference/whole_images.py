"""What detectors and segmenters share: whole images of any ratio in, labels by their names out."""

from collections.abc import Mapping
from typing import Any, ClassVar

from gcnet_jax.errors import CheckpointError, ConfigError, unknown_name
from gcnet_jax.inference.batches import Inputs
from gcnet_jax.inference.stored_network import StoredNetwork
from gcnet_jax.stored import ModelDescription

# What loads the networks of a task; all others are classifiers.
CLASSES = {'detection': 'Detector', 'segmentation': 'Segmenter'}


def wrong_class(description: ModelDescription, wanted: str) -> CheckpointError:
    """Returns the error for a network that is not for the task `wanted`; names what loads it."""
    return CheckpointError(
        f'{description.name} is for {description.task}, not for {wanted}: load it with '
        f'gcnet_jax.{CLASSES.get(description.task, "Classifier")}'
    )


def not_finite(what: str) -> CheckpointError:
    """Returns the error for values of a network that are no numbers."""
    return CheckpointError(
        f'{what} are NaN or not finite: training diverged, or the range of the dtype is too '
        'small; use another checkpoint, or dtype float32'
    )


class WholeImageNetwork(StoredNetwork):
    """A stored network that sees images whole, in their own ratio, each size compiled for itself.

    Its inputs are a dict with the image under 'image'. Only images of one size share a batch.
    Arguments, devices and checkpoints are those of `StoredNetwork`.

    Args:
      batch_size: Most images that are computed at once.

    Attributes:
      task: What the network must be for.
      no_layers: Outputs that are answers, not features of an image.
    """

    max_image_sizes = 128
    task: ClassVar[str]
    no_layers: ClassVar[frozenset[str]]

    def __init__(self, *args: Any, batch_size: int = 1, **options: Any) -> None:
        super().__init__(*args, batch_size=batch_size, **options)

    @property
    def label_names(self) -> tuple[str, ...]:
        """The name of each class; 'class 7' and so on where the checkpoint knows none."""
        count = self.model.num_classes
        return self.description.label_names or tuple(f'class {i}' for i in range(count))

    @property
    def layers(self) -> dict[str, tuple[int, ...]]:
        """The shape of what `features` returns of an image that fills both limits, by its name."""
        shapes = self.output_shapes
        return {name: shape for name, shape in shapes.items() if name not in self.no_layers}

    def _check_layer(self, layer: str) -> None:
        if layer in self.no_layers:
            layers = ', '.join(self.layers)
            raise ConfigError(f'{layer!r} is what predict gives, not a layer; layers: {layers}')
        if layer not in self.layers:
            raise ConfigError(unknown_name(f'layer of {self.description.name}', layer, self.layers))

    def _check(self, variables: Mapping[str, Any]) -> None:
        """Refuses variables and label names that do not fit the network."""
        if self.description.task != self.task:
            raise wrong_class(self.description, self.task)
        super()._check(variables)
        names, classes = len(self.description.label_names), self.model.num_classes
        if names not in (0, classes):
            raise CheckpointError(f'it has {names} label names and {classes} classes')

    def _check_images(self, images: Inputs) -> int:
        return super()._check_images(images['image'])

    def _check_size(self, images: Inputs) -> None:
        super()._check_size(images['image'])
