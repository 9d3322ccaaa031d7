"""Using a network: what its context blocks look at."""

from gcnet_jax.inference.attention_maps import attention_maps
from gcnet_jax.inference.pictures import draw_attention, draw_queries, save_figure
from gcnet_jax.inference.query_distances import query_distances

__all__ = ['attention_maps', 'draw_attention', 'draw_queries', 'query_distances', 'save_figure']
