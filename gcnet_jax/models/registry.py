"""Every network by name: how to build it, what its input looks like, where it comes from.

A variant is a row. Rows named `gc_*` are the paper's: global context r16 in every block of stages
2 to 4 (c3 to c5), behind the last convolution of a residual block, unless the row says otherwise.
"""

import dataclasses
import fnmatch
from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from gcnet_jax.data.sizes import Size, height_and_width
from gcnet_jax.errors import ConfigError, one_line, unknown_name
from gcnet_jax.models.byobnet import ByobNet
from gcnet_jax.models.efficientnet import EfficientNet, EfficientStage
from gcnet_jax.models.layers import parse_norm
from gcnet_jax.models.options import check_options
from gcnet_jax.models.placement import parse_context
from gcnet_jax.models.resnet import BasicBlock, BottleneckBlock, ResNet

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic')
# Bounds of what a network may ask of its images. A mean of 123.7 is meant for pixels up to 255 and
# would classify on in silence.
MAX_PIXEL, MIN_STD = 10.0, 1e-4
MIN_CROP_FRACTION, MAX_SIZE = 0.05, 4096
DTYPES = ('float32', 'bfloat16', 'float16')


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What a network expects of its images.

    Attributes:
      mean, std: A value a channel, on the scale where 255 is 1.
      interpolation: 'bilinear' or 'bicubic', for the resize at evaluation.
      crop_fraction: The central crop's part of the resized shorter side; for crops that are not
        square see `gcnet_jax.data.central_crop`.
      train_size, test_size: Height and width of the crops in pixels; one number for a square.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = 'bilinear'
    crop_fraction: float = 0.875
    train_size: Size = 224
    test_size: Size = 224

    def __post_init__(self):
        for name in ('mean', 'std'):
            values = getattr(self, name)
            if not (
                isinstance(values, tuple)
                and len(values) == 3
                and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
                and all(abs(value) <= MAX_PIXEL for value in values)  # False for a NaN too.
                and (name == 'mean' or all(value >= MIN_STD for value in values))
            ):
                raise ConfigError(
                    f'{name} must be three {"positive " if name == "std" else ""}numbers on the '
                    f'scale where 255 is 1, got {one_line(repr(values), 80)}'
                )
        if not isinstance(self.interpolation, str) or self.interpolation not in INTERPOLATIONS:
            raise ConfigError(unknown_name('interpolation', self.interpolation, INTERPOLATIONS))
        fraction = self.crop_fraction
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)):
            raise ConfigError(f'crop_fraction must be a number, got {fraction!r:.80}')
        if not MIN_CROP_FRACTION <= fraction <= 1:
            raise ConfigError(
                f'crop_fraction must be in [{MIN_CROP_FRACTION}, 1], got {fraction!r}'
            )
        for name in ('train_size', 'test_size'):
            size = getattr(self, name)
            if not _is_size(size):
                raise ConfigError(
                    f'{name} must be a whole number from 1 to {MAX_SIZE} or a pair of them, height '
                    f'and width, got {one_line(repr(size), 80)}'
                )
            if isinstance(size, tuple) and size[0] == size[1]:
                # One way to say it, so that descriptions of the same images are equal.
                object.__setattr__(self, name, size[0])

    @property
    def train_shape(self) -> tuple[int, int]:
        """Height and width of training images in pixels."""
        return height_and_width(self.train_size)

    @property
    def test_shape(self) -> tuple[int, int]:
        """Height and width of images at evaluation and inference, in pixels."""
        return height_and_width(self.test_size)


def _is_size(size: Any) -> bool:
    sides = size if isinstance(size, tuple) else (size, size)
    return len(sides) == 2 and all(
        isinstance(side, int) and not isinstance(side, bool) and 1 <= side <= MAX_SIZE
        for side in sides
    )


@dataclasses.dataclass(frozen=True)
class ModelEntry:
    """A row of the registry."""

    name: str
    module: partial[nn.Module]
    preprocessing: Preprocessing
    description: str


IMAGENET = Preprocessing()
CIFAR = Preprocessing(
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    crop_fraction=1.0,
    train_size=32,
    test_size=32,
)
# What the published weights with parameter-free shortcuts were trained with.
CIFAR_ZERO_PAD = dataclasses.replace(CIFAR, mean=IMAGENET_MEAN, std=IMAGENET_STD)

basic = partial(ResNet, block=BasicBlock)
bottleneck = partial(ResNet, block=BottleneckBlock)
resnet18 = partial(basic, stage_sizes=(2, 2, 2, 2))
resnet34 = partial(basic, stage_sizes=(3, 4, 6, 3))
resnet50 = partial(bottleneck, stage_sizes=(3, 4, 6, 3))
resnet101 = partial(bottleneck, stage_sizes=(3, 4, 23, 3))
resnet152 = partial(bottleneck, stage_sizes=(3, 8, 36, 3))
resnext50 = partial(resnet50, groups=32, base_width=4)
resnext101 = partial(resnet101, groups=32, base_width=4)
cifar = partial(basic, widths=(16, 32, 64), stem='small', num_classes=10)
resnet20 = partial(cifar, stage_sizes=(3, 3, 3))
resnet56 = partial(cifar, stage_sizes=(9, 9, 9))
zero_pad = partial(cifar, shortcut='zero_pad')
resnet20_a = partial(zero_pad, stage_sizes=(3, 3, 3))
resnet32_a = partial(zero_pad, stage_sizes=(5, 5, 5))
resnet44_a = partial(zero_pad, stage_sizes=(7, 7, 7))
resnet56_a = partial(zero_pad, stage_sizes=(9, 9, 9))
resnet110_a = partial(zero_pad, stage_sizes=(18, 18, 18))
gccnn = partial(basic, stage_sizes=(1, 1, 1), widths=(64, 128, 256), stem='none', num_classes=10)


def _context(position, block='global_context', stages=(2, 3, 4), **options) -> dict[str, Any]:
    return {'block': block, 'stages': stages, 'position': position, **options}


gc_basic = _context('after_conv2', ratio=1 / 16)
gc_bottleneck = _context('after_conv3', ratio=1 / 16)
gc_bottleneck_r4 = _context('after_conv3', ratio=1 / 4)
gc_cifar = _context('after_conv2', stages=(1, 2, 3), ratio=1 / 4)
# One block "right before the last residual block of c4", as non-local networks place it.
one_gc = _context('after_add', stages=(3,), blocks=(-2,), ratio=1 / 16)
one_nl = _context('after_add', 'non_local', stages=(3,), blocks=(-2,))
one_snl = _context('after_add', 'simplified_non_local', stages=(3,), blocks=(-2,))
gc_then_se = (
    _context('after_conv2', stages=(1, 2, 3), ratio=1 / 16),
    _context('after_conv2', 'squeeze_excite', stages=(1, 2, 3), ratio=1 / 16),
)

# timm's: in all stages, on the inner channels, with its rounding and its LayerNorm.
gc_timm = _context(
    'after_conv2', stages=(1, 2, 3, 4), ratio=1 / 8, rounding='nearest', norm_epsilon=1e-6
)
byobnet50 = partial(ByobNet, stage_sizes=(3, 4, 6, 3), context=gc_timm)
byobnet26 = partial(ByobNet, stage_sizes=(2, 2, 2, 2), context=gc_timm)
byobnet33 = partial(
    ByobNet,
    stage_sizes=(2, 3, 3, 2),
    widths=(256, 512, 1536, 1536),
    head_width=1280,
    activation='silu',
    context=gc_timm,
)
grouped = {'stem_pool': True, 'group_size': 32, 'activation': 'silu'}
# The sizes and the crop of timm's own tests; at 256 pixels it crops to 0.9 instead.
TIMM = Preprocessing(interpolation='bicubic', crop_fraction=1.0, train_size=256, test_size=288)
TIMM_EFFICIENT = dataclasses.replace(TIMM, train_size=224)


def _entry(name, module, description, preprocessing=IMAGENET, **defaults) -> ModelEntry:
    return ModelEntry(name, partial(module, **defaults), preprocessing, description)


_ENTRIES = (
    _entry('resnet18', resnet18, 'torchvision ResNet-18'),
    _entry('resnet34', resnet34, 'torchvision ResNet-34'),
    _entry('resnet50', resnet50, 'torchvision ResNet-50 (v1.5)'),
    _entry('resnet101', resnet101, 'torchvision ResNet-101'),
    _entry('resnet152', resnet152, 'torchvision ResNet-152'),
    _entry('resnext50_32x4d', resnext50, 'torchvision ResNeXt-50 32x4d'),
    _entry('resnext101_32x4d', resnext101, 'mmdetection ResNeXt-101 32x4d'),
    _entry('gc_resnet18', resnet18, 'GC r16 in c3-c5', context=gc_basic),
    _entry('gc_resnet34', resnet34, 'GC r16 in c3-c5', context=gc_basic),
    _entry('gc_resnet50', resnet50, 'paper: GC r16 in c3-c5', context=gc_bottleneck),
    _entry('gc_resnet50_r4', resnet50, 'paper: GC r4 in c3-c5', context=gc_bottleneck_r4),
    _entry('gc_resnet50_c4', resnet50, 'paper: one GC r16 in c4', context=one_gc),
    _entry('nl_resnet50_c4', resnet50, 'paper: one non-local block in c4', context=one_nl),
    _entry('snl_resnet50_c4', resnet50, 'paper: one simplified NL block in c4', context=one_snl),
    _entry('gc_resnet101', resnet101, 'GC r16 in c3-c5', context=gc_bottleneck),
    _entry('gc_resnet152', resnet152, 'GC r16 in c3-c5', context=gc_bottleneck),
    _entry('gc_resnext50_32x4d', resnext50, 'GC r16 in c3-c5', context=gc_bottleneck),
    _entry('gc_resnext101_32x4d', resnext101, 'GC r16 in c3-c5', context=gc_bottleneck),
    _entry('resnet20', resnet20, 'CIFAR ResNet-20, projection shortcuts', CIFAR),
    _entry('resnet56', resnet56, 'CIFAR ResNet-56, projection shortcuts', CIFAR),
    _entry('resnet20_a', resnet20_a, 'CIFAR ResNet-20, zero-padded shortcuts', CIFAR_ZERO_PAD),
    _entry('resnet32_a', resnet32_a, 'CIFAR ResNet-32, zero-padded shortcuts', CIFAR_ZERO_PAD),
    _entry('resnet44_a', resnet44_a, 'CIFAR ResNet-44, zero-padded shortcuts', CIFAR_ZERO_PAD),
    _entry('resnet56_a', resnet56_a, 'CIFAR ResNet-56, zero-padded shortcuts', CIFAR_ZERO_PAD),
    _entry('resnet110_a', resnet110_a, 'CIFAR ResNet-110, zero-padded shortcuts', CIFAR_ZERO_PAD),
    _entry('gc_resnet20', resnet20, 'GC r4 in every block', CIFAR, context=gc_cifar),
    _entry('gc_resnet56', resnet56, 'GC r4 in every block', CIFAR, context=gc_cifar),
    _entry('gccnn', gccnn, 'three blocks, each with GC, then SE (r16)', CIFAR, context=gc_then_se),
    _entry('gcresnext26ts', byobnet26, 'timm ResNeXt-26-TS, GC in all blocks', TIMM, **grouped),
    _entry('gcresnet33ts', byobnet33, 'timm ResNet-33-TS, GC in all blocks', TIMM),
    _entry('gcresnet50t', byobnet50, 'timm ResNet-50-T, GC in all blocks', TIMM),
    _entry('gcresnext50ts', byobnet50, 'timm ResNeXt-50-TS, GC in all blocks', TIMM, **grouped),
    _entry(
        'gc_efficientnetv2_rw_t',
        EfficientNet,
        'timm EfficientNet-V2 tiny, GC in place of SE',
        TIMM_EFFICIENT,
    ),
)
_MODELS = {entry.name: entry for entry in _ENTRIES}


def list_models(pattern: str = '*') -> list[str]:
    """Returns the names of the networks that match a glob pattern, such as 'gc_*'."""
    return sorted(fnmatch.filter(_MODELS, pattern))


def model_entry(name: str) -> ModelEntry:
    """Returns a network's row: how it is built, its preprocessing, its description.

    Raises:
      ConfigError: No network has that name; names the nearest.
    """
    if name not in _MODELS:
        raise ConfigError(unknown_name('model', name, _MODELS))
    return _MODELS[name]


def create_model(name: str, **overrides: Any) -> nn.Module:
    """Builds a network by name.

    Args:
      name: One of `list_models()`.
      **overrides: Attributes of its module that differ from the row's, such as `num_classes`,
        `dtype` (also as a string: 'bfloat16'), `dropout_rate`, `context` (see `parse_context`;
        None for the plain network), or `norm` (see `parse_norm`).

    Raises:
      ConfigError: An unknown name or option (names the nearest), or a value out of range.
    """
    entry = model_entry(name)
    check_options(name, entry.module.func, overrides)
    options = entry.module.keywords | overrides
    _check_together(name, options, overrides)
    if 'context' in options:
        options['context'] = parse_context(options['context'])
    if 'norm' in options:
        options['norm'] = parse_norm(options['norm'])
    try:
        options |= {'dtype': jnp.dtype(options['dtype'])} if 'dtype' in options else {}
    except TypeError:
        raise ConfigError(
            f'{name}: dtype must be one of {DTYPES}, got {options["dtype"]!r:.80}'
        ) from None
    return entry.module.func(**options)


def _check_together(name: str, options: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
    """Refuses options that contradict each other, and those that this network does not read."""
    dtype = options.get('dtype')
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise ConfigError(unknown_name('dtype', dtype, DTYPES))
    if options.get('block') is BasicBlock:
        for option, plain in (('groups', 1), ('base_width', 64)):
            if overrides.get(option, plain) != plain:
                raise ConfigError(
                    f'{name}: {option} is {overrides[option]}, but its blocks have two ordinary '
                    'convolutions, which do not read it; choose a network of bottlenecks, such as '
                    'resnet50 or resnext50_32x4d'
                )
    sizes, widths = options.get('stage_sizes'), options.get('widths')
    if sizes is not None and widths is not None and len(widths) < len(sizes):
        raise ConfigError(
            f'{name}: stage_sizes has {len(sizes)} stages and widths {len(widths)}; '
            'give a width for each stage'
        )
    stages = overrides.get('stages', ())
    if not isinstance(stages, (list, tuple)) or not all(
        isinstance(stage, EfficientStage) for stage in stages
    ):
        raise ConfigError(f'{name}: stages must be a list of EfficientStage, got {stages!r:.80}')
    if not isinstance(options.get('block', BasicBlock), type):
        raise ConfigError(f'{name}: block must be a module class, got {options["block"]!r:.80}')
