"""Global-context networks in Flax: blocks, models, training, inference and PyTorch checkpoints."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gcnet_jax.context import (
        GlobalContext,
        NonLocal,
        SimplifiedNonLocal,
        SqueezeExcite,
        insert,
    )
    from gcnet_jax.inference.classifier import Classifier
    from gcnet_jax.inference.detector import Detector
    from gcnet_jax.inference.segmenter import Segmenter
    from gcnet_jax.models import create_model, list_models
    from gcnet_jax.porting import load_pretrained, load_torch

__version__ = '0.1.0'

__all__ = [
    'Classifier',
    'Detector',
    'GlobalContext',
    'NonLocal',
    'Segmenter',
    'SimplifiedNonLocal',
    'SqueezeExcite',
    'create_model',
    'insert',
    'list_models',
    'load_pretrained',
    'load_torch',
]


def __getattr__(name: str) -> Any:
    # Only on demand: the blocks need neither Orbax nor image decoders, and `--help` not even JAX.
    if name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    place = 'gcnet_jax.context'
    if name in ('Classifier', 'Detector', 'Segmenter'):
        place = f'gcnet_jax.inference.{name.lower()}'
    elif name in ('create_model', 'list_models'):
        place = 'gcnet_jax.models'
    elif name in ('load_pretrained', 'load_torch'):
        place = 'gcnet_jax.porting'
    return getattr(importlib.import_module(place), name)
