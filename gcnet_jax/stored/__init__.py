"""A network on disk: its variables, and beside them all that is needed to build it again.

A checkpoint of a training run and a ported directory are the same thing here:
`DIR/checkpoints/STEP/` with the Orbax items `variables` (what evaluation uses: {'params',
'batch_stats'}), `description` and `checksums` (JSON). Training adds further items. Porting,
inference and training meet here and import nothing of each other.
"""

from gcnet_jax.stored.description import ModelDescription
from gcnet_jax.stored.places import find_checkpoint, read_item, step_directories
from gcnet_jax.stored.variables import load_variables, read_model_description, write_ported

__all__ = [
    'ModelDescription',
    'find_checkpoint',
    'load_variables',
    'read_item',
    'read_model_description',
    'step_directories',
    'write_ported',
]
