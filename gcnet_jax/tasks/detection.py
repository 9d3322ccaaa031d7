"""Object detection: boxes with labels and masks, learned by the losses of Mask R-CNN.

Images keep their ratio: in training they are resized to the limits `config.data.image_size` (short
side, long side), or to one of several `config.data.scales`, in evaluation to those of
`config.data.evaluation_image_size`. They are padded to one of a few `config.data.canvases`, each of
which is compiled once. Evaluation while training is COCO's average precision on these canvases; the
figure to report, with as little padding as the network needs, is that of `gcnet_jax evaluate`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gcnet_jax.data import on_device
from gcnet_jax.data.detection_ranges import (
    FLIP,
    LEAST_CELLS,
    LEAST_SIDE,
    MASK_SIZE,
    MAX_BOXES,
    MOST_BOXES,
    MOST_CELLS,
)
from gcnet_jax.data.preprocessing import MAX_SIZE, KeepRatio
from gcnet_jax.data.sizes import plain_size
from gcnet_jax.errors import ConfigError
from gcnet_jax.ranges import Range, whole
from gcnet_jax.tasks.class_task import ClassTask, as_backbone
from gcnet_jax.tasks.detection_evaluation import METRICS, DetectionEvaluation
from gcnet_jax.tasks.detection_losses import loss_sums
from gcnet_jax.tasks.task import Batch, Described, Examples, OutputPlan, Sums

MOST_STAGES = 3
# What a classifier has nothing for.
NEW_MODULES = (
    'neck',
    'rpn_head',
    *(f'{kind}_head_{stage}' for kind in ('box', 'mask') for stage in range(MOST_STAGES)),
)
TERMS = ('rpn_class', 'rpn_box', 'class', 'box', 'mask')
RESULTS = ('boxes', 'scores', 'labels', 'valid', 'finite')


def _is_pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(map(whole(1).allows, value))


def _is_limits(value: Any) -> bool:
    sides = value if _is_pair(value) else (value, value)
    return all(map(_LIMIT.allows, sides)) and sides[0] <= sides[1]


def _some(allows: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def allows_all(value: Any) -> bool:
        return isinstance(value, (tuple, list)) and len(value) > 0 and all(map(allows, value))

    return allows_all


def _between(least: int, most: int) -> Range:
    return Range(
        lambda value: whole(least).allows(value) and value <= most,
        f'a whole number from {least} to {most}',
    )


_LIMIT = _between(LEAST_SIDE, MAX_SIZE)
_LIMITS = Range(
    _is_limits,
    f'{_LIMIT.text} (the short side of the images, in pixels) or limits of both sides, the short '
    'one first, such as (800, 1333)',
)


@dataclasses.dataclass(frozen=True)
class Detection(ClassTask):
    """Objects with boxes, labels and masks.

    A batch is one of `detection_loader.train_batches`, or `evaluation_batches`.

    Attributes:
      num_classes: Without the background.
      mean, std: Per channel, on the scale where 255 is 1.
      max_boxes: Places for objects of an image.
      mask_size: Height and width of the masks' crops; None: masks are neither trained nor judged.
    """

    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    max_boxes: int = MAX_BOXES
    mask_size: int | None = MASK_SIZE

    name: ClassVar[str] = 'detection'
    # Of masks, or of boxes where the data set has no masks.
    best: ClassVar[str] = 'ap'
    percentages: ClassVar[frozenset[str]] = frozenset({'ap', 'box_accuracy', *METRICS})
    networks: ClassVar[str] = 'detection'
    backbones: ClassVar[frozenset[str]] = frozenset({'classification', 'multilabel'})
    output_modules: ClassVar[tuple[str, ...]] = tuple(
        f'{module}_head_{stage}/{name}'
        for stage in range(MOST_STAGES)
        for module, names in (('box', ('logits', 'deltas')), ('mask', ('kernel', 'bias')))
        for name in names
    )
    training_method: ClassVar[str] = 'training_outputs'
    evaluates_by_device: ClassVar[bool] = True
    fewest_classes: ClassVar[int] = 1  # Beside it there is the background.
    settings: ClassVar[Mapping[str, Any]] = {
        # Objects of an image that are trained; of more, those with the largest boxes.
        'max_boxes': MAX_BOXES,
        # Cells along each side of a mask, which covers an object's box; see `data.detection_masks`.
        'mask_size': MASK_SIZE,
    }
    ranges: ClassVar[Mapping[str, Range]] = {
        'max_boxes': _between(1, MOST_BOXES),
        'mask_size': _between(LEAST_CELLS, MOST_CELLS),
    }
    data_settings: ClassVar[Mapping[str, Any]] = {
        # Limits (short side, long side) in pixels, one of which is drawn for each training image;
        # None: `image_size` alone.
        'scales': None,
        # Sizes (height, width) that images are padded to, in multiples of 32; None: one for
        # landscapes and one for portraits, as large as the limits need.
        'canvases': None,
    }
    data_ranges: ClassVar[Mapping[str, Range]] = {
        'image_size': _LIMITS,
        'evaluation_image_size': _LIMITS,
        'scales': Range(
            _some(lambda value: _is_pair(value) and _is_limits(value)),
            f'limits (short, long) from {LEAST_SIDE} to {MAX_SIZE} pixels, such as ((640, 1333), '
            '(800, 1333))',
        ),
        'canvases': Range(
            _some(_is_pair), 'sizes (height, width), such as ((800, 1344), (1344, 800))'
        ),
    }

    @classmethod
    def build(
        cls, settings: Mapping[str, Any], source: Any, preprocessing: KeepRatio
    ) -> 'Detection':
        return cls(
            source.num_classes,
            preprocessing.mean,
            preprocessing.std,
            settings['max_boxes'],
            settings['mask_size'] if source.has_masks else None,
        )

    @classmethod
    def conflict_in(cls, data: Mapping[str, Any]) -> str | None:
        if data['scales'] is not None and data['image_size'] is not None:
            return (
                f'config.data.image_size is {data["image_size"]} and config.data.scales '
                f'{data["scales"]}: training images are resized to one of the scales; leave '
                'image_size unset, and set evaluation_image_size'
            )
        return None

    @classmethod
    def preprocessing(cls, data: Mapping[str, Any], base: KeepRatio) -> KeepRatio:
        """Returns the limits of evaluation, with the size of a canvas as that of training."""
        from gcnet_jax.data.detection_canvases import make_canvases

        limits = plain_size(data['evaluation_image_size']) or plain_size(data['image_size'])
        if limits is not None:
            base = base.with_size(limits)
        canvases = make_canvases(base, *_canvas_options(data, base).values())
        return dataclasses.replace(base, train_size=canvases.sizes[0])

    @classmethod
    def load_source(
        cls, name: str, split: str | None, data_dir: str | None = None, *, purpose: str
    ) -> Examples:
        from gcnet_jax.data import detection_sources  # Slow to import.

        return detection_sources.load_detection(name, split, data_dir, purpose=purpose)

    @classmethod
    def read_label_names(cls, name: str, data_dir: str | None = None) -> tuple[str, ...]:
        from gcnet_jax.data import detection_sources

        return detection_sources.read_detection_names(name, data_dir)

    def notes(self, source: Any) -> list[str]:
        from gcnet_jax.data.detection_sources import count_beyond

        notes = []
        objects, images = count_beyond(source, self.max_boxes)
        if objects:
            notes.append(
                f'{objects:,} objects of {images:,} training images are left out: an image holds '
                f'{self.max_boxes}, see config.task.max_boxes'
            )
        if self.mask_size is None:
            notes.append(
                'boxes alone are trained and judged: not every object of the training images has '
                'a mask; masks that the network predicts all the same are not trained'
            )
        return notes

    def train_loader(self, data: Mapping[str, Any], preprocessing: KeepRatio) -> Callable[..., Any]:
        from gcnet_jax.data.detection_loader import train_batches  # Slow to import.

        masks = {} if self.mask_size is None else {'mask_size': self.mask_size}
        return functools.partial(
            train_batches,
            preprocessing=preprocessing,
            **_canvas_options(data, preprocessing),
            flip=FLIP if data['flip'] else 0.0,
            max_boxes=self.max_boxes,
            masks=self.mask_size is not None,
            **masks,
        )

    def evaluation_loader(
        self, data: Mapping[str, Any], preprocessing: KeepRatio
    ) -> Callable[..., Any]:
        from gcnet_jax.data.detection_loader import evaluation_batches

        return functools.partial(
            evaluation_batches, preprocessing=preprocessing, canvases=_sizes(data['canvases'])
        )

    @classmethod
    def take_over(
        cls, there: Described, variables: Mapping[str, Any]
    ) -> tuple[Mapping[str, Any], tuple[str, ...]]:
        """Puts a classifier in the place of the backbone, without its last layer."""
        if there.task not in cls.backbones:
            return variables, ()
        return as_backbone(variables), NEW_MODULES

    @classmethod
    def plan_outputs(
        cls, here: Described, there: Described, new_classifier: bool | None, place: str
    ) -> OutputPlan:
        """Keeps the outputs of the classes that the checkpoint knows by name, and the background's.

        Whatever does not depend on the classes is the checkpoint's in any case.
        """
        if there.task in cls.backbones:
            if new_classifier is False:
                raise ConfigError(
                    f'config.training.new_classifier is False, but {place} holds {there.name}, '
                    'which has no heads for detection; leave it unset, and they start at random'
                )
            return OutputPlan(
                (), f'the backbone is that of {there.name}; all that follows it starts at random'
            )
        plan = super().plan_outputs(here, there, new_classifier, place)
        if plan.kept is None:
            return plan
        ours, theirs = here.build(), there.build()
        background = ((ours.num_classes, theirs.num_classes),) if plan.kept else ()
        boxes = ((0, 0),) if ours.cascade else plan.kept
        deltas = tuple((4 * a + i, 4 * b + i) for a, b in boxes for i in range(4))
        kept_of = {}
        for stage in range(MOST_STAGES):
            kept_of[f'box_head_{stage}/logits'] = plan.kept + background
            kept_of[f'box_head_{stage}/deltas'] = deltas
        return dataclasses.replace(plan, kept_of=kept_of)

    def batch_spec(self) -> dict[str, tuple[str, ...]]:
        return {'image': ('batch', 'height')} | dict.fromkeys(self._object_arrays(), ('batch',))

    def evaluation_spec(self) -> dict[str, tuple[str, ...]]:
        names = ('size', 'original_size', 'index', 'mask')
        return {'image': ('batch', 'height')} | dict.fromkeys(names, ('batch',))

    def batch_shapes(
        self, batch_size: int, height: int, width: int
    ) -> dict[str, jax.ShapeDtypeStruct]:
        arrays = {'image': ((height, width, 3), jnp.uint8)} | self._object_arrays()
        return {
            name: jax.ShapeDtypeStruct((batch_size, *shape), dtype)
            for name, (shape, dtype) in arrays.items()
        }

    def _object_arrays(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Returns shape and type, for one image, of what a training batch holds beside it."""
        boxes, cells = self.max_boxes, self.mask_size
        arrays = {
            'size': ((2,), jnp.int32),
            'boxes': ((boxes, 4), jnp.float32),
            'labels': ((boxes,), jnp.int32),
        }
        if cells is not None:
            arrays['masks'] = ((boxes, cells, cells), jnp.uint8)
            arrays['mask_boxes'] = ((boxes, 4), jnp.float32)
        return arrays

    def prepare(self, batch: Batch, key: Array | None) -> dict[str, Array]:
        """Normalises the images; their padding is zero after that."""
        images = on_device.normalize(batch['image'], self.mean, self.std)
        return {**batch, 'image': on_device.zero_padding(images, batch['size'])}

    def inputs(self, batch: Batch) -> tuple[Any, ...]:
        """Returns the images, and the objects: the network chooses what it is trained on."""
        return batch['image'], batch

    def evaluation_inputs(self, batch: Batch) -> tuple[Any, ...]:
        """Returns the images and their sizes."""
        return batch['image'], batch['size'].astype(jnp.float32)

    def weight(self, batch: Batch) -> Float[Array, '']:
        return jnp.asarray(batch['image'].shape[0], jnp.float32)

    def loss(self, outputs: Mapping[str, Array], batch: Batch) -> Sums:
        return loss_sums(outputs)

    def training_metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Returns the loss and its terms, and how the first box head fares.

        That is 'box_accuracy', the share of the trained boxes that got their label, and
        'object_boxes', how many of them belong to an object, for each image.
        """
        terms = {f'{term}_loss': sums[term] / sums['weight'] for term in TERMS if term in sums}
        return {
            'loss': sums['loss'] / sums['weight'],
            **terms,
            'box_accuracy': sums['correct'] / (sums['boxes'] or 1.0),
            'object_boxes': sums['positives'] / sums['count'],
        }

    def results(self, outputs: Mapping[str, Array], batch: Batch) -> dict[str, Array]:
        """Returns the detections of each image, boxes in pixels of the original one.

        Probabilities of masks are in steps of 1/255, which makes them a quarter as large.
        """
        scale = batch['size'].astype(jnp.float32) / batch['original_size'].astype(jnp.float32)
        results = {name: outputs[name] for name in RESULTS}
        results['boxes'] = results['boxes'] / jnp.tile(scale[:, ::-1], 2)[:, None]
        if self.mask_size is not None:
            results['masks'] = jnp.round(255 * outputs['masks']).astype(jnp.uint8)
        return results | {name: batch[name] for name in ('original_size', 'index', 'mask')}

    @classmethod
    def evaluation(cls, source: Examples) -> 'DetectionEvaluation':
        return DetectionEvaluation(source)


def _sizes(setting: Any) -> tuple[tuple[int, int], ...] | None:
    return None if setting is None else tuple(map(plain_size, setting))


def _canvas_options(data: Mapping[str, Any], preprocessing: KeepRatio) -> dict[str, Any]:
    """Returns the scales of training images, and the canvases."""
    scales = _sizes(data['scales'])
    if scales is None:
        limits = plain_size(data['image_size'])
        own = preprocessing if limits is None else preprocessing.with_size(limits)
        scales = ((own.short_side, own.long_side),)
    return {'scales': scales, 'canvases': _sizes(data['canvases'])}
