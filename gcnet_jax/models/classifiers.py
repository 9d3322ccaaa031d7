"""The classifiers of the registry. A variant is a row.

Rows named `gc_*` are the paper's: global context r16 in every block of stages 2 to 4 (c3 to c5),
behind the last convolution of a residual block, unless the row says otherwise.
"""

import dataclasses
from functools import partial
from typing import Any

from gcnet_jax.data.preprocessing import IMAGENET, IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from gcnet_jax.models.byobnet import ByobNet
from gcnet_jax.models.efficientnet import EfficientNet
from gcnet_jax.models.entry import ModelEntry
from gcnet_jax.models.resnet import BasicBlock, BottleneckBlock, ResNet

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


CLASSIFIERS = (
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
