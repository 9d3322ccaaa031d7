"""Networks for classification and as backbones, plain and with context blocks."""

from gcnet_jax.models.registry import (
    ModelEntry,
    Preprocessing,
    create_model,
    list_models,
    model_entry,
)

__all__ = ['ModelEntry', 'Preprocessing', 'create_model', 'list_models', 'model_entry']
