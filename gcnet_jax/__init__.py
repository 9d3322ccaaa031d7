"""Global-context networks in Flax: blocks, models, training, inference and PyTorch checkpoints."""

from gcnet_jax.context import GlobalContext, NonLocal, SimplifiedNonLocal, SqueezeExcite, insert
from gcnet_jax.models import create_model, list_models

__version__ = '0.1.0'

__all__ = [
    'GlobalContext',
    'NonLocal',
    'SimplifiedNonLocal',
    'SqueezeExcite',
    'create_model',
    'insert',
    'list_models',
]
