"""Semantic segmentation: a class for each pixel, learned by softmax cross-entropy.

Images keep their ratio. In training an image is resized to fit into the limits
`config.data.evaluation_image_size` (short side, long side) times a random factor of `scale_range`,
and cropped to `config.data.image_size` (height, width). In evaluation while training it is resized
to fit into a canvas of the limits, short side high and long side wide, and padded on the right and
at the bottom: one shape for all images, so portraits become smaller than they could be. Labels are
compared at that size. The figure to report, at the images' own sizes, is that of `gcnet_jax
evaluate`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gcnet_jax.data import on_device
from gcnet_jax.data.label_maps import IGNORED
from gcnet_jax.data.preprocessing import KeepRatio
from gcnet_jax.data.segmentation_ranges import CATEGORY_MAX_RATIO, MAX_SCALE, SCALE_RANGE
from gcnet_jax.data.sizes import plain_size
from gcnet_jax.errors import ConfigError, DataError
from gcnet_jax.ranges import Range, kind, number
from gcnet_jax.tasks.class_task import ClassTask, as_backbone
from gcnet_jax.tasks.confusion import summary
from gcnet_jax.tasks.task import Batch, Described, Examples, OutputPlan, Sums

HEADS = ('head', 'auxiliary_head')

Logits = Float[Array, 'batch height width classes']
Labels = Int[Array, 'batch height width']


def _is_scale_range(value: Any) -> bool:
    factor = number(0, MAX_SCALE, open_low=True)
    is_pair = isinstance(value, (tuple, list)) and len(value) == 2
    return is_pair and all(map(factor.allows, value)) and value[0] <= value[1]


_FLAG = kind(bool, 'True or False')


@dataclasses.dataclass(frozen=True)
class Segmentation(ClassTask):
    """A class for each pixel; the network has a logit per pixel and class.

    A batch is {'image': uint8 [batch, height, width, 3], 'label': uint8 [batch, height, width]},
    where pixels labelled `IGNORED` do not count; a batch of evaluation also has 'size', int32
    [batch, 2], height and width of the images without their padding.

    Attributes:
      num_classes: Number of classes.
      mean, std: Per channel, on the scale where 255 is 1.
      auxiliary_weight: Weight of the auxiliary head's loss, where the network has that head.
      count_ignored: Divide the loss by all pixels, and not by those that count.
    """

    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    auxiliary_weight: float = 0.4
    count_ignored: bool = False

    name: ClassVar[str] = 'segmentation'
    best: ClassVar[str] = 'miou'
    percentages: ClassVar[frozenset[str]] = frozenset({'miou', 'pixel_accuracy', 'mean_accuracy'})
    networks: ClassVar[str] = 'segmentation'
    backbones: ClassVar[frozenset[str]] = frozenset({'classification', 'multilabel'})
    output_modules: ClassVar[tuple[str, ...]] = tuple(f'{head}/logits' for head in HEADS)
    settings: ClassVar[Mapping[str, Any]] = {
        # Weight of the loss of the auxiliary head, where the network has one.
        'auxiliary_weight': 0.4,
        # Divide the summed loss by all pixels of a batch (mmsegmentation's default), and not only
        # by those that have a label (F.cross_entropy with ignore_index).
        'count_ignored': False,
    }
    ranges: ClassVar[Mapping[str, Range]] = {
        'auxiliary_weight': number(0),
        'count_ignored': _FLAG,
    }
    data_settings: ClassVar[Mapping[str, Any]] = {
        # Smallest and largest random factor on the limits that training images are resized to.
        'scale_range': SCALE_RANGE,
        # Another crop is drawn, up to ten times, while one class fills more than this part of the
        # labelled pixels; 1.0: the first is taken.
        'category_max_ratio': CATEGORY_MAX_RATIO,
        # Random brightness, contrast, saturation and hue, as in mmsegmentation.
        'photometric': True,
    }
    data_ranges: ClassVar[Mapping[str, Range]] = {
        'scale_range': Range(
            _is_scale_range, f'two numbers with 0 < smallest <= largest <= {MAX_SCALE:g}'
        ),
        'category_max_ratio': number(0, 1, open_low=True),
        'photometric': _FLAG,
    }

    @classmethod
    def build(
        cls, settings: Mapping[str, Any], source: Any, preprocessing: KeepRatio
    ) -> 'Segmentation':
        options = {name: settings[name] for name in cls.settings}
        return cls(source.num_classes, preprocessing.mean, preprocessing.std, **options)

    @classmethod
    def preprocessing(cls, data: Mapping[str, Any], base: KeepRatio) -> KeepRatio:
        size = plain_size(data['image_size']) or base.train_size
        if size is None:
            raise ConfigError(
                'config.data.image_size is not set, and neither the checkpoint nor the network '
                'says how large its training crops are; set it to (height, width)'
            )
        limits = plain_size(data['evaluation_image_size'])
        if limits is not None:
            base = base.with_size(limits)
        return dataclasses.replace(base, train_size=size)

    @classmethod
    def load_source(
        cls, name: str, split: str | None, data_dir: str | None = None, *, purpose: str
    ) -> Examples:
        from gcnet_jax.data import segmentation_sources  # Slow to import.

        return segmentation_sources.load_segmentation(name, split, data_dir, purpose=purpose)

    @classmethod
    def read_label_names(cls, name: str, data_dir: str | None = None) -> tuple[str, ...]:
        from gcnet_jax.data import segmentation_sources

        return segmentation_sources.read_segmentation_names(name, data_dir)

    def train_loader(self, data: Mapping[str, Any], preprocessing: KeepRatio) -> Callable[..., Any]:
        from gcnet_jax.data.segmentation_loader import train_batches  # Slow to import.

        return functools.partial(
            train_batches,
            image_size=preprocessing.train_size,
            preprocessing=preprocessing,
            scale_range=tuple(data['scale_range']),
            category_max_ratio=data['category_max_ratio'],
            flip=data['flip'],
            photometric=data['photometric'],
        )

    def evaluation_loader(
        self, data: Mapping[str, Any], preprocessing: KeepRatio
    ) -> Callable[..., Any]:
        from gcnet_jax.data.segmentation_loader import evaluation_batches

        return functools.partial(evaluation_batches, image_size=preprocessing.test_shape)

    @classmethod
    def take_over(
        cls, there: Described, variables: Mapping[str, Any]
    ) -> tuple[Mapping[str, Any], tuple[str, ...]]:
        """Puts a classifier in the place of the backbone, without its last layer."""
        if there.task not in cls.backbones:
            return variables, ()
        return as_backbone(variables), HEADS

    @classmethod
    def plan_outputs(
        cls, here: Described, there: Described, new_classifier: bool | None, place: str
    ) -> OutputPlan:
        if there.task not in cls.backbones:
            return super().plan_outputs(here, there, new_classifier, place)
        if new_classifier is False:
            raise ConfigError(
                f'config.training.new_classifier is False, but {place} holds {there.name}, which '
                'has no head for segmentation; leave it unset, and the head starts at random'
            )
        return OutputPlan((), f'the backbone is that of {there.name}; the heads start at random')

    def batch_spec(self) -> dict[str, tuple[str, ...]]:
        return {'image': ('batch', 'height'), 'label': ('batch', 'height')}

    def evaluation_spec(self) -> dict[str, tuple[str, ...]]:
        return {**super().evaluation_spec(), 'size': ('batch',)}

    def batch_shapes(
        self, batch_size: int, height: int, width: int
    ) -> dict[str, jax.ShapeDtypeStruct]:
        shape = (batch_size, height, width)
        return {
            'image': jax.ShapeDtypeStruct((*shape, 3), jnp.uint8),
            'label': jax.ShapeDtypeStruct(shape, jnp.uint8),
        }

    def prepare(self, batch: Batch, key: Array | None) -> dict[str, Array]:
        """Normalises the images; the padding of a batch of evaluation is zero after that."""
        images = on_device.normalize(batch['image'], self.mean, self.std)
        if 'size' in batch:
            images = on_device.zero_padding(images, batch['size'])
        return {'image': images, 'label': batch['label'].astype(jnp.int32)}

    def weight(self, batch: Batch) -> Float[Array, '']:
        if self.count_ignored:
            return jnp.asarray(batch['label'].size, jnp.float32)
        return jnp.sum(_counted(batch['label']).astype(jnp.float32))

    def loss(self, outputs: Mapping[str, Array], batch: Batch) -> Sums:
        labels, logits = batch['label'], outputs['logits']
        counted = _counted(labels)
        loss = jnp.sum(pixel_losses(logits, labels))
        if 'auxiliary_logits' in outputs:
            auxiliary = pixel_losses(outputs['auxiliary_logits'], labels)
            loss = loss + self.auxiliary_weight * jnp.sum(auxiliary)
        correct = (jnp.argmax(logits, axis=-1) == labels) & counted
        return {
            'loss': loss,
            'correct': jnp.sum(correct.astype(jnp.float32)),
            'pixels': jnp.sum(counted.astype(jnp.float32)),
        }

    def training_metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {  # Zero where no pixel of these steps counts.
            'loss': sums['loss'] / (sums['weight'] or 1.0),
            'pixel_accuracy': sums['correct'] / (sums['pixels'] or 1.0),
        }

    def results(self, outputs: Mapping[str, Array], batch: Batch) -> dict[str, Array]:
        """Returns each image's confusion matrix, and its summed loss over the pixels that count."""
        labels, logits = batch['label'].astype(jnp.int32), outputs['logits']
        return {
            'confusion': confusion_matrices(labels, jnp.argmax(logits, axis=-1), self.num_classes),
            'loss': jnp.sum(pixel_losses(logits, labels), axis=(1, 2)),
            'mask': batch['mask'],
        }

    @classmethod
    def evaluation(cls, source: Examples) -> 'SegmentationEvaluation':
        return SegmentationEvaluation(source.num_classes)


def _counted(labels: Labels) -> Bool[Array, 'batch height width']:
    return labels != IGNORED


def pixel_losses(logits: Logits, labels: Labels) -> Float[Array, 'batch height width']:
    """Returns the cross-entropy of each pixel in float32; 0 where the label is `IGNORED`."""
    logits = logits.astype(jnp.float32)
    # A sum over the classes and no lookup: it is elementwise, wherever a pixel lives.
    own = labels[..., None] == jnp.arange(logits.shape[-1])[None, None, None]
    losses = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(own, logits, 0), axis=-1)
    return jnp.where(_counted(labels), losses, 0)


def confusion_matrices(
    labels: Labels, answers: Labels, num_classes: int
) -> Int[Array, 'batch classes classes']:
    """Counts each image's pixels by label (row) and answer (column), without those `IGNORED`."""
    cells = num_classes**2
    places = jnp.where(labels < num_classes, labels * num_classes + answers, cells)
    empty = jnp.zeros(cells + 1, jnp.int32)  # The last one takes what does not count.
    counts = jax.vmap(lambda places: empty.at[places.reshape(-1)].add(1))(places)
    return counts[:, :cells].reshape(-1, num_classes, num_classes)


class SegmentationEvaluation:
    """Adds up the confusion matrices of all images, and their losses.

    Attributes:
      examples: Images, each once.
      confusion: Number of pixels by class (row) and the class they were taken for (column).
    """

    def __init__(self, num_classes: int) -> None:
        self.examples = 0
        self.confusion: Int[np.ndarray, 'classes classes'] = np.zeros(
            (num_classes, num_classes), np.int64
        )
        self._loss = 0.0

    def add(self, results: Mapping[str, np.ndarray]) -> None:
        mask = np.asarray(results['mask'])
        self.examples += int(mask.sum())
        self.confusion += np.asarray(results['confusion'])[mask].sum(axis=0, dtype=np.int64)
        self._loss += float(np.asarray(results['loss'], np.float64)[mask].sum())

    def metrics(self) -> dict[str, float]:
        """Returns the loss per pixel, 'miou', 'pixel_accuracy', 'mean_accuracy' and 'examples'.

        Raises:
          DataError: No pixel counts.
        """
        pixels = int(self.confusion.sum())
        if self.examples and not pixels:
            raise DataError(
                f'all pixels of the {self.examples} images to evaluate on are labelled {IGNORED}, '
                'which does not count; choose another config.data.evaluation_split'
            )
        count = pixels or float('nan')
        return {'loss': self._loss / count, **summary(self.confusion), 'examples': self.examples}
