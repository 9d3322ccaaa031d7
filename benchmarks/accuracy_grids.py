"""What `benchmarks.accuracy` trains and compares: every grid, network and setting in one place.

A network is one line: its name, and the group `config.model` that builds it. A comparison names a
baseline and the networks that are set against it; one network may be in several, and is trained
once. Names are directories of runs.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gcnet_jax.errors import ConfigError, unknown_name

Options = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One part of the table: the networks that are set against a baseline.

    Attributes:
      title: Its heading.
      baseline: The network that differences are taken to.
      networks: The others, in order.
    """

    title: str
    baseline: str
    networks: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Grid:
    """Networks that are trained on one data set under one budget.

    Attributes:
      config: A config of `configs/`, by its name.
      settings: The budget: settings on top of the config, by their paths.
      seeds: Number of runs of each network, with the seeds 0, 1, ...
      networks: The group `config.model` of each network, by the network's name.
      comparisons: The parts of the table.
      in_torch: Names of the networks that are trained by PyTorch, see `torch_training`.
    """

    config: str
    settings: Options
    seeds: int
    networks: Mapping[str, Options]
    comparisons: tuple[Comparison, ...]
    in_torch: tuple[str, ...] = ()


def context(block: str, stages: tuple[int, ...], position: str, **options: Any) -> Options:
    """Returns a network's option `context`: one kind of block in some stages."""
    return {'context': {'block': block, 'stages': stages, 'position': position, **options}}


def gc(**changes: Any) -> Options:
    """The paper's block behind the last convolution of every bottleneck, but for the changes.

    The ratio is 1/4 because the bottlenecks here are 64 to 256 channels wide, not 256 to 2,048.
    """
    place = {'stages': (1, 2, 3), 'position': 'after_conv3', 'ratio': 1 / 4}
    return context('global_context', **(place | changes))


# Three stages of two bottlenecks, 64, 128 and 256 channels wide: the paper's kind of network at the
# size of the digits, with maps of 8x8, 4x4 and 2x2 positions.
BOTTLENECKS = {
    'name': 'resnet50',
    'stem': 'small',
    'stage_sizes': (2, 2, 2),
    'widths': (16, 32, 64),
    'context': None,
}
# One block before the last residual block of the middle stage, as the paper has it in c4.
ONE = {'stages': (2,), 'position': 'after_add', 'blocks': (0,)}
GCCNN_PLACE = {'stages': (1, 2, 3), 'position': 'after_conv2', 'ratio': 1 / 16}
GCCNN_GC = {'block': 'global_context', **GCCNN_PLACE}
GCCNN_SE = {'block': 'squeeze_excite', **GCCNN_PLACE}

DIGITS_NETWORKS = {
    'none': BOTTLENECKS,
    'one_gc': BOTTLENECKS | gc(**ONE),
    'one_nl': BOTTLENECKS | context('non_local', **ONE),
    'one_snl': BOTTLENECKS | context('simplified_non_local', **ONE),
    'gc': BOTTLENECKS | gc(),
    'gc_stage1': BOTTLENECKS | gc(stages=(1,)),
    'gc_stage2': BOTTLENECKS | gc(stages=(2,)),
    'gc_stage3': BOTTLENECKS | gc(stages=(3,)),
    'gc_r8': BOTTLENECKS | gc(ratio=1 / 8),
    'gc_r16': BOTTLENECKS | gc(ratio=1 / 16),
    'gc_after_conv2': BOTTLENECKS | gc(position='after_conv2'),
    'gc_after_add': BOTTLENECKS | gc(position='after_add'),
    'gc_average_add': BOTTLENECKS | gc(pooling='average'),
    'gc_attention_scale': BOTTLENECKS | gc(fusion='scale'),
    'gc_average_scale': BOTTLENECKS | gc(pooling='average', fusion='scale'),
    'se': BOTTLENECKS | context('squeeze_excite', (1, 2, 3), 'after_conv3', ratio=1 / 4),
    'gccnn_none': {'name': 'gccnn', 'context': None},
    'gccnn_gc': {'name': 'gccnn', 'context': GCCNN_GC},
    'gccnn_se': {'name': 'gccnn', 'context': GCCNN_SE},
    'gccnn_gc_se': {'name': 'gccnn', 'context': (GCCNN_GC, GCCNN_SE)},
}
DIGITS_COMPARISONS = (
    Comparison('Block design', 'none', ('one_nl', 'one_snl', 'one_gc', 'gc')),
    Comparison('Non-local blocks against one GC', 'one_gc', ('one_nl', 'one_snl')),
    Comparison('Stages', 'none', ('gc_stage1', 'gc_stage2', 'gc_stage3', 'gc')),
    Comparison('Ratio, against 1/4', 'gc', ('gc_r8', 'gc_r16')),
    Comparison('Position, against after_conv3', 'gc', ('gc_after_conv2', 'gc_after_add')),
    Comparison(
        'Pooling and fusion, against attention and add',
        'gc',
        ('gc_average_scale', 'gc_average_add', 'gc_attention_scale'),
    ),
    Comparison('SE against GC', 'gc', ('se',)),
    Comparison('GC, then SE, in GC-CNN', 'gccnn_none', ('gccnn_gc', 'gccnn_se', 'gccnn_gc_se')),
)
# A fifth of the training images, so that no network is near 100%, and all others to test on, so
# that one image is 0.07%. The whole image at evaluation: `resnet50` has ImageNet's central crop,
# and digits that are enlarged by an eighth are read at 76% instead of 96%. One evaluation at the
# end, because it takes about as long as ten epochs.
DIGITS_SETTINGS = {
    'data.train_split': 'train[:20%]',
    'data.evaluation_split': 'train[20%:]+test',
    'data.crop_fraction': 1.0,
    'training.total_epochs': 30.0,
    'training.evaluation_epochs': 30.0,
    'training.checkpoint_epochs': 30.0,
}


def cifar(data_set: str, depth: int, settings: Options, seeds: int) -> Grid:
    """CIFAR's ResNet without context, with SE and with GC in every block, and PyTorch's."""
    plain = {'name': f'resnet{depth}'}
    se = context('squeeze_excite', (1, 2, 3), 'after_conv2', ratio=1 / 4)
    return Grid(
        'cifar10',
        {'data.name': data_set, **settings},
        seeds,
        {
            'plain': plain,
            'se': plain | se,
            'gc': {'name': f'gc_resnet{depth}'},
            'plain_torch': plain,
        },
        (
            Comparison(f'ResNet-{depth}', 'plain', ('se', 'gc')),
            Comparison('GC against SE', 'se', ('gc',)),
            Comparison('The same network in PyTorch', 'plain', ('plain_torch',)),
        ),
        in_torch=('plain_torch',),
    )


FULL_LENGTH = {'training.total_epochs': 200.0, 'training.evaluation_epochs': 10.0}
GRIDS = {
    'digits': Grid('digits', DIGITS_SETTINGS, 10, DIGITS_NETWORKS, DIGITS_COMPARISONS),
    'cifar10': cifar('cifar10', 20, {'training.total_epochs': 8.0}, seeds=3),
    'cifar10_resnet20': cifar('cifar10', 20, FULL_LENGTH, seeds=5),
    'cifar10_resnet56': cifar('cifar10', 56, FULL_LENGTH, seeds=5),
    'cifar100_resnet20': cifar('cifar100', 20, FULL_LENGTH, seeds=5),
    'cifar100_resnet56': cifar('cifar100', 56, FULL_LENGTH, seeds=5),
}


def find_grid(name: str) -> Grid:
    """Returns a grid by its name.

    Raises:
      ConfigError: There is none; names the nearest.
    """
    if name not in GRIDS:
        raise ConfigError(unknown_name('grid', name, GRIDS))
    return GRIDS[name]
