"""Tells from the names and shapes in a file whose network it is, and which."""

import re
from collections.abc import Iterable
from typing import Any

import flax.linen as nn

from gcnet_jax.context.global_context import GlobalContext
from gcnet_jax.errors import CheckpointError, ConfigError, unknown_name
from gcnet_jax.models.registry import list_models, model_entry
from gcnet_jax.models.resnet import ResNet
from gcnet_jax.porting.families import FAMILIES, LIBRARIES, mmcv_context
from gcnet_jax.porting.families.resnet import SHORTCUTS, plain_network, shortcuts
from gcnet_jax.porting.families.rules import Family, Shapes


def recognise_family(
    names: Iterable[str], library: str | None = None, module: type[nn.Module] | None = None
) -> Family:
    """Returns the family whose names these are.

    Args:
      names: Of the tensors in a file.
      library: Whose names they must be; None for whoever's they are.
      module: What is to be read. A file may hold several: a detector, and its backbone in it.

    Raises:
      CheckpointError: Nobody's, or not that library's.
    """
    names = list(names)
    found = [
        family
        for family in families(library)
        if all(any(re.fullmatch(p, name) for name in names) for p in family.recognise)
    ]
    if found:
        fitting = (family for family in found if module and issubclass(module, family.module))
        return next(fitting, found[0])
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
    name, options = family.network(shapes)
    if options:
        name, options = _row_with(name, options)
    return name, options | {'num_classes': class_count(shapes, family)}


def class_count(shapes: Shapes, family: Family) -> int:
    """Returns the number of classes that a file has; 0 without a classifier."""
    if family.num_classes is not None:
        return family.num_classes(shapes)
    classes = [shape for name, shape in shapes.items() if family.is_classifier(name)]
    return classes[0][0] if classes and classes[0] else 0


def told_options(shapes: Shapes, family: Family) -> dict[str, Any]:
    """Returns the options that a file tells of whatever network is named for it."""
    if family.told is None:
        return {}
    return family.told({name.removeprefix(family.prefix): shape for name, shape in shapes.items()})


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
    theirs = shortcuts(shapes)
    if theirs == model.shortcut:
        return
    try:
        other = plain_network(shapes)
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
    options, channels = mmcv_context.block_options(shapes, '')
    return GlobalContext(**options), channels


def _row_with(name: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The row that has these options already, or `name` with them."""
    entry = model_entry(name)
    settings = dict(entry.module.keywords) | options
    for other in list_models():
        row = model_entry(other)
        if row.module.func is entry.module.func and dict(row.module.keywords) == settings:
            return other, {}
    return name, options
