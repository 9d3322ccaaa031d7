"""The neck of a detector: a feature pyramid (Lin et al., arXiv 1612.03144), as in mmdetection."""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jaxtyping import Array, Float

from gcnet_jax.models.layers import Conv


class FeaturePyramid(nn.Module):
    """Maps of equal width at every stride, each with what the coarser ones know.

    Attributes:
      channels: Width of every map.
      dtype: Type of the computation.
    """

    channels: int = 256
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, maps: Sequence[Float[Array, 'batch _ _ _']]
    ) -> list[Float[Array, 'batch _ _ {self.channels}']]:
        """Returns a map for each of `maps` (the finest first), and one at twice the last stride."""

        def conv(name: str, size: int) -> Conv:
            return Conv(self.channels, size, use_bias=True, dtype=self.dtype, name=name)

        laterals = [
            conv(f'lateral{level}', 1)(features) for level, features in enumerate(maps, start=1)
        ]
        for level in reversed(range(len(laterals) - 1)):
            laterals[level] += upsample_nearest(laterals[level + 1], laterals[level].shape[1:3])
        pyramid = [
            conv(f'output{level}', 3)(lateral) for level, lateral in enumerate(laterals, start=1)
        ]
        return [*pyramid, pyramid[-1][:, ::2, ::2]]


def upsample_nearest(
    features: Float[Array, 'batch height width channel'], size: tuple[int, int]
) -> Float[Array, 'batch new_height new_width channel']:
    """Enlarges by repetition: output `i` is input `floor(i * old / new)`, as in PyTorch."""
    height, width = features.shape[1:3]
    if size == (2 * height, 2 * width):
        return features.repeat(2, axis=1).repeat(2, axis=2)
    rows, columns = (
        np.arange(new) * old // new for old, new in zip((height, width), size, strict=True)
    )
    return features[:, rows][:, :, columns]
