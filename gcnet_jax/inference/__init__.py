"""Using a network: what its context blocks look at."""

from gcnet_jax.inference.attention_maps import attention_maps

__all__ = ['attention_maps']
