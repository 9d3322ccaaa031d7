"""Finds the registered network that has as many blocks of the same widths as a file."""

import re
from collections.abc import Callable

import flax.linen as nn

from gcnet_jax.errors import CheckpointError
from gcnet_jax.models.registry import create_model, list_models
from gcnet_jax.porting.families.rules import Shapes


def registered_network(structure: tuple, structure_of: Callable[[nn.Module], tuple | None]) -> str:
    """Returns the name of the first registered network of this structure.

    Args:
      structure: The blocks of each stage, and whatever else distinguishes the networks.
      structure_of: Returns the same of a network; None for one that is out of the question.

    Raises:
      CheckpointError: There is none.
    """
    for name in list_models():
        if structure == structure_of(create_model(name)):
            return name
    raise CheckpointError(
        f'no registered network has stages of {structure[0]} blocks like this file; '
        'give the network by name, or build it and pass it to load_torch'
    )


def stage_sizes(shapes: Shapes, pattern: str) -> tuple[int, ...]:
    """Counts the blocks of each stage; `pattern` matches both numbers at the start of a name."""
    found = {tuple(map(int, m.groups())) for name in shapes if (m := re.match(pattern, name))}
    stages = sorted({stage for stage, _ in found})
    return tuple(sum(stage == other for other, _ in found) for stage in stages)
