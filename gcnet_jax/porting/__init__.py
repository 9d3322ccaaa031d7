"""PyTorch checkpoints in and out: reading files, a file of names per family, strict conversion."""

from gcnet_jax.porting.convert import Report
from gcnet_jax.porting.files import read_checkpoint
from gcnet_jax.porting.load import load_pretrained, load_torch, to_torch, write_safetensors
from gcnet_jax.porting.port_checkpoint import port, port_reverse

__all__ = [
    'Report',
    'load_pretrained',
    'load_torch',
    'port',
    'port_reverse',
    'read_checkpoint',
    'to_torch',
    'write_safetensors',
]
