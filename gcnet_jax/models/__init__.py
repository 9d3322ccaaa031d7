"""Networks for classification, as backbones and for detection, plain and with context blocks."""

from gcnet_jax.data.preprocessing import KeepRatio, Preprocessing
from gcnet_jax.models.entry import ModelEntry
from gcnet_jax.models.registry import create_model, list_models, model_entry

__all__ = [
    'KeepRatio',
    'ModelEntry',
    'Preprocessing',
    'create_model',
    'list_models',
    'model_entry',
]
