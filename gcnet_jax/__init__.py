"""Global-context networks in Flax: blocks, models, training, inference and PyTorch checkpoints."""

from typing import TYPE_CHECKING, Any

from gcnet_jax.context import GlobalContext, NonLocal, SimplifiedNonLocal, SqueezeExcite, insert
from gcnet_jax.models import create_model, list_models

if TYPE_CHECKING:
    from gcnet_jax.inference.predictor import Classifier

__version__ = '0.1.0'

__all__ = [
    'Classifier',
    'GlobalContext',
    'NonLocal',
    'SimplifiedNonLocal',
    'SqueezeExcite',
    'create_model',
    'insert',
    'list_models',
]


def __getattr__(name: str) -> Any:
    # Only on demand: it brings Orbax and the image decoders, which the blocks do not need.
    if name == 'Classifier':
        from gcnet_jax.inference.predictor import Classifier

        return Classifier
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
