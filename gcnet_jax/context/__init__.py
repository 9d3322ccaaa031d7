"""Global context and its relatives: linen modules that see every position of a feature map."""

from gcnet_jax.context.global_context import (
    AttentionPool,
    ContextFusion,
    ContextTransform,
    GlobalContext,
)
from gcnet_jax.context.insert import insert
from gcnet_jax.context.nonlocal_blocks import NonLocal, SimplifiedNonLocal
from gcnet_jax.context.squeeze_excite import SqueezeExcite

__all__ = [
    'AttentionPool',
    'ContextFusion',
    'ContextTransform',
    'GlobalContext',
    'NonLocal',
    'SimplifiedNonLocal',
    'SqueezeExcite',
    'insert',
]
