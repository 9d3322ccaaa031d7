"""Looking into networks and runs: attention maps, query distances, training curves."""

from gcnet_jax.analysis.attention_maps import attention_maps
from gcnet_jax.analysis.pictures import draw_attention, draw_queries, save_figure
from gcnet_jax.analysis.query_distances import query_distances

__all__ = ['attention_maps', 'draw_attention', 'draw_queries', 'query_distances', 'save_figure']
