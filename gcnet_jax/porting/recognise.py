"""Tells from the names and shapes in a file whose network it is, and which."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn

from gcnet_jax.context.global_context import GlobalContext
from gcnet_jax.errors import CheckpointError, ConfigError, unknown_name
from gcnet_jax.models.byobnet import ByobNet
from gcnet_jax.models.efficientnet import EfficientNet
from gcnet_jax.models.registry import create_model, list_models, model_entry
from gcnet_jax.models.resnet import BasicBlock, BottleneckBlock, ResNet
from gcnet_jax.porting.convert import is_classifier
from gcnet_jax.porting.names import FAMILIES, LIBRARIES, Family

Shapes = Mapping[str, tuple[int, ...]]
# What the two kinds of shortcuts are called in errors, by the network's option.
SHORTCUTS = {
    'projection': 'projection shortcuts (option B)',
    'zero_pad': 'parameter-free shortcuts (option A)',
}


def recognise_family(names: Iterable[str], library: str | None = None) -> Family:
    """Returns the family whose names these are.

    Args:
      names: Of the tensors in a file.
      library: Whose names they must be; None for whoever's they are.

    Raises:
      CheckpointError: Nobody's, or not that library's.
    """
    names = list(names)
    for family in families(library):
        if all(any(re.fullmatch(p, name) for name in names) for p in family.recognise):
            return family
    whose = f'{library} does not use' if library else 'no known library uses'
    raise CheckpointError(
        f'{whose} the names in this file: {", ".join(names[:4])}, ...; '
        f'known: global context networks of {", ".join(LIBRARIES)}'
    )


def families(library: str | None) -> list[Family]:
    """Returns the families of a library; of all libraries for None."""
    if library is not None and library not in LIBRARIES:
        raise ConfigError(unknown_name('family', library, LIBRARIES))
    return [family for family in FAMILIES if library in (None, family.library)]


def family_of(model: nn.Module, library: str) -> Family:
    """Returns the names that `library` gives to a network of this kind.

    Raises:
      CheckpointError: It has no such network.
    """
    for family in families(library):
        if isinstance(model, family.module):
            return family
    able = sorted({f.library for f in FAMILIES if isinstance(model, f.module)})
    raise CheckpointError(
        f'{library} has no network like {type(model).__name__}; '
        f'choose {"the family " + " or ".join(able) if able else "another network"}'
    )


def recognise_model(shapes: Shapes, family: Family) -> tuple[str, dict[str, Any]]:
    """Returns the name of the network in the registry, and the options that differ from its row.

    The shapes are not compared here but when the weights are converted.

    Raises:
      CheckpointError: The file does not tell; asks for the name.
    """
    shapes = {name.removeprefix(family.prefix): shape for name, shape in shapes.items()}
    if family.module is ByobNet:
        name = _same_structure(_byobnet_structure(shapes), _byobnet_of)
        options: dict[str, Any] = {}
    elif family.module is EfficientNet:
        name, options = 'gc_efficientnetv2_rw_t', {}
    elif family.library == 'gccnn':
        name, options = 'gccnn', {}
    else:
        name = _same_structure(_resnet_structure(shapes), _resnet_of)
        if family.library == 'torchvision' and _shortcuts(shapes) == 'zero_pad':
            raise CheckpointError(
                f'the file has {SHORTCUTS["zero_pad"]}, and its names do not tell where the zeros '
                f'are: name {name} (--model) if half of them precede the channels of the input and '
                'half follow'
            )
        options = _context_options(shapes)
    if options:
        name, options = _row_with(name, options)
    classes = [shape for key, shape in shapes.items() if is_classifier(key)]
    return name, options | {'num_classes': classes[0][0] if classes else 0}


def check_shortcuts(shapes: Shapes, family: Family, model: nn.Module, name: str | None) -> None:
    """Refuses a file whose shortcuts are of the other kind than the network's.

    Args:
      shapes: The file's.
      family: Whose names it has.
      model: The network that is to take it.
      name: Its name, if it has one.

    Raises:
      CheckpointError: Names both kinds, and the network to take instead.
    """
    # One stage alone may have no shortcut that changes the shape.
    if not isinstance(model, ResNet) or len(model.stage_sizes) == 1:
        return
    shapes = {key.removeprefix(family.prefix): shape for key, shape in shapes.items()}
    theirs = _shortcuts(shapes)
    if theirs == model.shortcut:
        return
    try:
        other = _same_structure(_resnet_structure(shapes), _resnet_of)
    except CheckpointError:
        other = ''
    raise CheckpointError(
        f'the file has {SHORTCUTS[theirs]}{f", as {other} has" if other else ""}, and '
        f'{name or type(model).__name__} has {SHORTCUTS[model.shortcut]}: '
        + (f'name {other} instead' if other else f"build the network with shortcut='{theirs}'")
    )


def recognise_block(shapes: Shapes, family: Family) -> tuple[GlobalContext, int]:
    """Returns a context block that fits the file, and the width of its input."""
    shapes = {name.removeprefix(family.prefix): shape for name, shape in shapes.items()}
    options, channels = _block_options(shapes, '')
    return GlobalContext(**options), channels


def _same_structure(structure: tuple, structure_of) -> str:
    for name in list_models():
        model = create_model(name)
        is_plain = isinstance(model, ByobNet) or not getattr(model, 'context', ())
        if is_plain and structure == structure_of(model):
            return name
    raise CheckpointError(
        f'no registered network has stages of {structure[0]} blocks like this file; '
        'give the network by name, or build it and pass it to load_torch'
    )


def _stage_sizes(shapes: Shapes, pattern: str) -> tuple[int, ...]:
    found = {tuple(map(int, m.groups())) for name in shapes if (m := re.match(pattern, name))}
    stages = sorted({stage for stage, _ in found})
    return tuple(sum(stage == other for other, _ in found) for stage in stages)


def _resnet_structure(shapes: Shapes) -> tuple:
    """What tells the registered networks apart.

    That is (blocks of each stage, whether bottlenecks, inputs per group of the first 3x3, width of
    the stem, kind of the shortcuts).
    """
    sizes = _stage_sizes(shapes, r'layer(\d+)\.(\d+)\.')
    has_conv3 = 'layer1.0.conv3.weight' in shapes
    return (
        sizes,
        has_conv3,
        shapes.get('layer1.0.conv2.weight', (0, 0))[1],
        shapes['conv1.weight'][0] if 'conv1.weight' in shapes else 0,
        _shortcuts(shapes),
    )


def _shortcuts(shapes: Shapes) -> str:
    pattern = r'layer\d+\.(\d+\.)?(downsample|shortcut)\.'
    return 'projection' if any(re.match(pattern, name) for name in shapes) else 'zero_pad'


def _resnet_of(model: nn.Module) -> tuple | None:
    if not isinstance(model, ResNet) or model.block not in (BasicBlock, BottleneckBlock):
        return None
    is_bottleneck = model.block is BottleneckBlock
    width = model.widths[0]
    inner = width * model.base_width // 64 if is_bottleneck else width
    stem = width if model.stem != 'none' else 0
    return tuple(model.stage_sizes), is_bottleneck, inner, stem, model.shortcut


def _byobnet_structure(shapes: Shapes) -> tuple:
    sizes = _stage_sizes(shapes, r'stages\.(\d+)\.(\d+)\.')
    widths = tuple(
        shapes.get(f'stages.{stage}.0.conv3_1x1.conv.weight', (0,))[0]
        for stage in range(len(sizes))
    )
    grouped = shapes['stages.0.0.conv2_kxk.conv.weight']
    return sizes, widths, grouped[1] if grouped[1] != grouped[0] else 0


def _byobnet_of(model: nn.Module) -> tuple | None:
    if not isinstance(model, ByobNet):
        return None
    return tuple(model.stage_sizes), tuple(model.widths), model.group_size


def _context_options(shapes: Shapes) -> dict[str, Any]:
    """The `context` setting of a file in mmcv's names; empty where it has no context blocks."""
    pattern = r'layer(\d+)\.(\d+)\.context_block\.'
    stages = tuple(sorted({int(m[1]) for name in shapes if (m := re.match(pattern, name))}))
    if not stages:
        return {}
    place = f'layer{stages[0]}.0.'
    options, channels = _block_options(shapes, place + 'context_block.')
    hidden = options.pop('hidden_channels')
    last = 'conv3' if place + 'conv3.weight' in shapes else 'conv2'
    if shapes.get(f'{place}{last}.weight', (0,))[0] != channels:
        raise CheckpointError(
            'the context blocks are on the inner channels, and the file does not tell whether '
            'behind conv1 or conv2: give the network, with context=dict(..., position=...)'
        )
    return {
        'context': {
            'block': 'global_context',
            'stages': stages,
            'position': f'after_{last}',
            'ratio': hidden / channels,
            **options,
        }
    }


def _block_options(shapes: Shapes, place: str) -> tuple[dict[str, Any], int]:
    branches = [b for b in ('mul', 'add') if f'{place}channel_{b}_conv.0.weight' in shapes]
    if not branches:
        raise CheckpointError(f'a context block without a transform: {place}channel_add_conv.0')
    hidden, channels = shapes[f'{place}channel_{branches[0]}_conv.0.weight'][:2]
    options: dict[str, Any] = {'hidden_channels': hidden}
    if branches != ['add']:
        options['fusion'] = 'scale_add' if len(branches) == 2 else 'scale'
    if f'{place}conv_mask.weight' not in shapes:
        options['pooling'] = 'average'
    return options, channels


def _row_with(name: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The row that has these options already, or `name` with them."""
    entry = model_entry(name)
    settings = dict(entry.module.keywords) | options
    for other in list_models():
        row = model_entry(other)
        if row.module.func is entry.module.func and dict(row.module.keywords) == settings:
            return other, {}
    return name, options
