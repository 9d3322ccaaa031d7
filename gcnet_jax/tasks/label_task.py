"""What the tasks have in common whose answer about an image is labels."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from gcnet_jax.data.color import MAX_MAGNITUDE, ColorOptions
from gcnet_jax.data.preprocess import AUGMENTATIONS, INTERPOLATIONS
from gcnet_jax.data.preprocessing import Preprocessing
from gcnet_jax.data.sizes import plain_size
from gcnet_jax.errors import ConfigError
from gcnet_jax.ranges import Range, choice, number, whole
from gcnet_jax.tasks.class_task import ClassTask
from gcnet_jax.tasks.task import Batch, Examples


def _is_scale(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and 0 < value[0] <= value[1] <= 1


@dataclasses.dataclass(frozen=True)
class LabelTask(ClassTask):
    """A task on images with labels; the network has one logit per label.

    A batch is {'image': uint8 [batch, height, width, 3], 'label': int32 [batch], or [batch,
    classes] with several labels per image}.

    Attributes:
      num_classes: Number of labels.
      mean, std: Per channel, on the scale where 255 is 1.
    """

    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    networks: ClassVar[str] = 'classification'
    output_modules: ClassVar[tuple[str, ...]] = ('classifier',)
    data_settings: ClassVar[Mapping[str, Any]] = {
        # Evaluation's central crop, as a part of the resized shorter side, and its resize
        # ('bilinear', 'bicubic'); None as for `image_size`.
        'crop_fraction': float,
        'interpolation': str,
        # 'none' (resize), 'pad_crop' (4 pixels, CIFAR) or 'resized_crop' (ImageNet).
        'augmentation': 'resized_crop',
        # Smallest and largest area of 'resized_crop', as parts of the image; None: (0.08,
        # 1.0).
        'crop_scale': tuple,
        # RandAugment: number of operations for each image (0: off) and their strength, 0 to 30;
        # None: 9.
        'randaugment_ops': 0,
        'randaugment_magnitude': int,
        # Largest relative change of brightness, contrast and saturation, and of the hue in turns
        # of the colour wheel (at most 0.5).
        'color_jitter': 0.0,
        'hue_jitter': 0.0,
    }
    data_ranges: ClassVar[Mapping[str, Range]] = {
        'crop_fraction': number(0, 1, open_low=True),
        'interpolation': choice(*INTERPOLATIONS),
        'augmentation': choice(*AUGMENTATIONS),
        'crop_scale': Range(_is_scale, 'two numbers with 0 < smallest <= largest <= 1'),
        'randaugment_ops': whole(0),
        'randaugment_magnitude': Range(
            lambda value: whole(0).allows(value) and value <= MAX_MAGNITUDE,
            f'a whole number from 0 to {MAX_MAGNITUDE}',
        ),
        'color_jitter': number(0),
        'hue_jitter': number(0, 0.5),
    }

    @classmethod
    def conflict_in(cls, data: Mapping[str, Any]) -> str | None:
        if data['crop_scale'] is not None and data['augmentation'] != 'resized_crop':
            return (
                f'config.data.crop_scale is {data["crop_scale"]} but config.data.augmentation is '
                f'{data["augmentation"]!r}; leave it unset, or choose resized_crop'
            )
        if data['randaugment_magnitude'] is not None and not data['randaugment_ops']:
            return (
                f'config.data.randaugment_magnitude is {data["randaugment_magnitude"]} but '
                'config.data.randaugment_ops is 0; set it to the number of operations, such as 2'
            )
        return None

    @classmethod
    def preprocessing(cls, data: Mapping[str, Any], base: Preprocessing) -> Preprocessing:
        size = plain_size(data['image_size'])
        changes = {name: data[name] for name in ('crop_fraction', 'interpolation')}
        return dataclasses.replace(
            base,
            train_size=size or base.train_size,
            test_size=plain_size(data['evaluation_image_size']) or size or base.test_size,
            **{name: value for name, value in changes.items() if value is not None},
        )

    @classmethod
    def load_source(
        cls, name: str, split: str | None, data_dir: str | None = None, *, purpose: str
    ) -> Examples:
        from gcnet_jax.data import sources  # Slow to import.

        return sources.load_source(name, split, data_dir, purpose=purpose)

    @classmethod
    def read_label_names(cls, name: str, data_dir: str | None = None) -> tuple[str, ...]:
        from gcnet_jax.data import sources

        return sources.read_label_names(name, data_dir)

    def train_loader(
        self, data: Mapping[str, Any], preprocessing: Preprocessing
    ) -> Callable[..., Any]:
        from gcnet_jax.data.loader import train_batches  # Slow to import.

        magnitude = data['randaugment_magnitude']
        options = {
            'image_size': preprocessing.train_size,
            'interpolation': preprocessing.interpolation,
            'augmentation': data['augmentation'],
            'flip': data['flip'],
            'color': ColorOptions(
                randaugment_ops=data['randaugment_ops'],
                randaugment_magnitude=9 if magnitude is None else magnitude,
                jitter=data['color_jitter'],
                hue_jitter=data['hue_jitter'],
            ),
        }
        if data['crop_scale'] is not None:
            options['crop_scale'] = tuple(data['crop_scale'])
        return functools.partial(train_batches, **options)

    def evaluation_loader(
        self, data: Mapping[str, Any], preprocessing: Preprocessing
    ) -> Callable[..., Any]:
        from gcnet_jax.data.loader import evaluation_batches

        return functools.partial(
            evaluation_batches,
            image_size=preprocessing.test_size,
            interpolation=preprocessing.interpolation,
            crop_fraction=preprocessing.crop_fraction,
        )

    @classmethod
    def check_source(cls, source: Any) -> None:
        """Raises ConfigError unless the images have as many labels as the task expects."""
        if source.is_multilabel and not cls.is_multilabel:
            raise ConfigError(
                f'data set {source.name} has several labels per image; train on it with '
                "config.task.name='multilabel'"
            )
        if cls.is_multilabel and not source.is_multilabel:
            raise ConfigError(
                f'data set {source.name} has one label per image; train on it with '
                "config.task.name='classification'"
            )

    def batch_spec(self) -> dict[str, tuple[str, ...]]:
        return {'image': ('batch', 'height'), 'label': ('batch',)}

    def batch_shapes(
        self, batch_size: int, height: int, width: int
    ) -> dict[str, jax.ShapeDtypeStruct]:
        labels = (batch_size, self.num_classes) if self.is_multilabel else (batch_size,)
        return {
            'image': jax.ShapeDtypeStruct((batch_size, height, width, 3), jnp.uint8),
            'label': jax.ShapeDtypeStruct(labels, jnp.int32),
        }

    def results(self, outputs: Mapping[str, Array], batch: Batch) -> dict[str, Array]:
        return {'logits': outputs['logits'], 'label': batch['label'], 'mask': batch['mask']}

    @staticmethod
    @abc.abstractmethod
    def probabilities(logits: Any, numpy: Any = jnp) -> Any:
        """Returns the probability of each label.

        Args:
          logits: `[*batch, classes]`.
          numpy: The module that computes: `jax.numpy`, or `numpy` on the host.
        """
