"""Where context blocks go in a residual network: from plain settings to modules in order."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from gcnet_jax.context.global_context import GlobalContext
from gcnet_jax.context.nonlocal_blocks import NonLocal, SimplifiedNonLocal
from gcnet_jax.context.squeeze_excite import SqueezeExcite
from gcnet_jax.errors import ConfigError, unknown_name
from gcnet_jax.models.options import check_options, module_options

BLOCKS: dict[str, type[nn.Module]] = {
    'global_context': GlobalContext,
    'non_local': NonLocal,
    'simplified_non_local': SimplifiedNonLocal,
    'squeeze_excite': SqueezeExcite,
}
POSITIONS = ('after_conv1', 'after_conv2', 'after_conv3', 'after_add')


@dataclasses.dataclass(frozen=True)
class Placement:
    """One kind of context block, and the residual blocks that hold it.

    Attributes:
      build: Makes the module; called with `dtype` and `name`.
      stages: Stages that hold it, 1 to 4 (c2 to c5 in the paper).
      position: 'after_conv1', 'after_conv2' or 'after_conv3': behind that convolution, its norm
        and, but for the last one, its ReLU. 'after_add': behind the residual sum and its ReLU.
      blocks: Which residual blocks of each stage, 0 the first, -1 the last; None is all of them.
    """

    build: Callable[..., nn.Module]
    stages: tuple[int, ...]
    position: str
    blocks: tuple[int, ...] | None = None

    def holds(self, stage: int, block: int, stage_size: int) -> bool:
        """Whether residual block `block` (from 0) of stage `stage` (from 1) has this one."""
        if stage not in self.stages:
            return False
        return self.blocks is None or block in {index % stage_size for index in self.blocks}


def parse_context(entries: Any) -> tuple[Placement, ...]:
    """Reads the `context` setting of a network.

    Args:
      entries: None, one mapping, or a sequence of mappings, each with the keys `block` (a key of
        BLOCKS), `stages`, `position`, optionally `blocks`, and the options of that block's module.
        Several entries at one position chain in the order given.

    Raises:
      ConfigError: An unknown key, block or position, or a value of the wrong kind.
    """
    if entries is None:
        return ()
    if isinstance(entries, (Mapping, Placement)) or hasattr(entries, 'to_dict'):
        entries = (entries,)
    if isinstance(entries, str) or not isinstance(entries, Sequence):
        raise ConfigError(
            f'context must be a mapping such as dict(block="global_context", stages=(2, 3, 4), '
            f'position="after_conv3", ratio=1/16), a sequence of them, or None; got {entries!r}'
        )
    return tuple(_parse_entry(entry) for entry in entries)


def _parse_entry(entry: Any) -> Placement:
    if isinstance(entry, Placement):
        return entry
    if not isinstance(entry, Mapping) and not hasattr(entry, 'to_dict'):
        raise ConfigError(f'context: each entry must be a mapping, got {entry!r}')
    options = dict(entry.items())
    kind = options.pop('block', 'global_context')
    if not isinstance(kind, str) or kind not in BLOCKS:
        raise ConfigError(unknown_name('context block', kind, BLOCKS))
    missing = [key for key in ('stages', 'position') if key not in options]
    if missing:
        raise ConfigError(f'context: {kind} needs {" and ".join(missing)}; got {options}')
    stages = _integers('stages', options.pop('stages'))
    position = options.pop('position')
    if not isinstance(position, str) or position not in POSITIONS:
        raise ConfigError(unknown_name('context position', position, POSITIONS))
    blocks = options.pop('blocks', None)
    known = module_options(BLOCKS[kind]).keys() - {'dtype', 'param_dtype'}
    for option in options:
        if option not in known:
            known_keys = known | {'block', 'stages', 'position', 'blocks'}
            raise ConfigError(unknown_name(f'option of context block {kind}', option, known_keys))
    check_options(f'context block {kind}', BLOCKS[kind], options)
    return Placement(
        build=partial(BLOCKS[kind], **options),
        stages=stages,
        position=position,
        blocks=None if blocks is None else _integers('blocks', blocks),
    )


def _integers(key: str, value: Any) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else value
    is_list = isinstance(values, Sequence) and not isinstance(values, str)
    if not is_list or not all(isinstance(i, int) and not isinstance(i, bool) for i in values):
        raise ConfigError(f'context.{key} must be whole numbers such as (2, 3, 4), got {value!r}')
    return tuple(values)


def check_placements(
    placements: Sequence[Placement], stage_sizes: Sequence[int], positions: Sequence[str]
) -> None:
    """Raises ConfigError where a placement names a stage, block or position that is not there."""
    for placement in placements:
        if placement.position not in positions:
            raise ConfigError(
                f"context position {placement.position!r} is not in this network's blocks; "
                f'they have {", ".join(positions)}'
            )
        for stage in placement.stages:
            if not 1 <= stage <= len(stage_sizes):
                raise ConfigError(
                    f'context stage {stage} is not in this network; '
                    f'it has stages 1 to {len(stage_sizes)}'
                )
            size = stage_sizes[stage - 1]
            for block in placement.blocks or ():
                if not -size <= block < size:
                    raise ConfigError(
                        f'context block index {block} is not in stage {stage}, which has {size} '
                        f'blocks: {-size} to {size - 1}'
                    )


def apply_placements(
    features: Float[Array, 'batch height width channel'],
    placements: Sequence[Placement],
    position: str,
    dtype: Dtype | None,
) -> Float[Array, 'batch height width channel']:
    """Applies the context blocks of one position in order; call it inside a compact method.

    The modules are named `context_<position>_<index>`, counted within the position.
    """
    for module in placed_modules(placements, position, dtype):
        features = module(features)
    return features


def placed_modules(
    placements: Sequence[Placement], position: str, dtype: Dtype | None
) -> list[nn.Module]:
    """Makes the context blocks of one position, in order; call it inside a compact method."""
    here = [placement for placement in placements if placement.position == position]
    return [
        placement.build(dtype=dtype, name=f'context_{position}_{index}')
        for index, placement in enumerate(here)
    ]
