"""Which ResNet a file holds, for all families that name their stages `layer1` to `layer4`."""

import re

import flax.linen as nn

from gcnet_jax.models.resnet import BasicBlock, BottleneckBlock, ResNet
from gcnet_jax.porting.families.rules import Shapes
from gcnet_jax.porting.families.structure import registered_network, stage_sizes

# The two kinds of shortcuts as errors call them, by the network's option.
SHORTCUTS = {
    'projection': 'projection shortcuts (option B)',
    'zero_pad': 'parameter-free shortcuts (option A)',
}
SE_RESNET = {
    r'layer\d+\.\d+\.se\w*\.': (
        'it is an SE ResNet: those are not among the networks here, whose squeeze_excite is a '
        'block of its own'
    )
}
AVERAGED_SHORTCUTS = {
    r'layer\d+\.\d+\.downsample\.2\.': (
        'its shortcuts average before they convolve (ResNet-D), which no network of these names '
        'does here'
    )
}


def plain_network(shapes: Shapes) -> str:
    """Returns the name of the registered ResNet without context blocks that the file holds.

    Raises:
      CheckpointError: There is none.
    """
    return registered_network(_structure(shapes), _structure_of)


def shortcuts(shapes: Shapes) -> str:
    """Returns the kind of the file's shortcuts: only a projection has tensors."""
    pattern = r'layer\d+\.(\d+\.)?(downsample|shortcut)\.'
    return 'projection' if any(re.match(pattern, name) for name in shapes) else 'zero_pad'


def _structure(shapes: Shapes) -> tuple:
    """What tells the registered networks apart.

    That is (blocks of each stage, whether bottlenecks, width and inputs per group of the first 3x3,
    width of the stem, kind of the shortcuts).
    """
    return (
        stage_sizes(shapes, r'layer(\d+)\.(\d+)\.'),
        'layer1.0.conv3.weight' in shapes,
        tuple(shapes.get('layer1.0.conv2.weight', (0, 0))[:2]),
        _stem_width(shapes),
        shortcuts(shapes),
    )


def _stem_width(shapes: Shapes) -> int:
    # One convolution, or the last of three.
    found = next((shapes[n] for n in ('conv1.weight', 'stem.6.weight') if n in shapes), ())
    return found[0] if found else 0


def _structure_of(model: nn.Module) -> tuple | None:
    if not isinstance(model, ResNet) or model.block not in (BasicBlock, BottleneckBlock):
        return None
    if model.context:
        return None
    is_bottleneck = model.block is BottleneckBlock
    width = model.widths[0]
    inner = width * model.base_width // 64 if is_bottleneck else width
    first = (inner * model.groups if is_bottleneck else width, inner)
    stem = width if model.stem != 'none' else 0
    return tuple(model.stage_sizes), is_bottleneck, first, stem, model.shortcut
