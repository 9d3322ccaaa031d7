"""Deformable convolution as a layer (Dai et al., arXiv 1703.06211): a drop-in for a 3x3 `Conv`."""

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from gcnet_jax.models.layers import Conv, he_normal_fan_out
from gcnet_jax.ops.deformable import deformable_convolution


class DeformableConv(nn.Module):
    """A convolution whose taps are moved by offsets that another convolution predicts.

    The offsets start at zero, so that a new layer is an ordinary convolution (DCN version 1,
    without modulation, one field of offsets for all channels).

    Attributes:
      features: Width of the output.
      kernel_size: Height and width of the kernel, odd.
      stride: Step in both directions.
      groups: Number of groups that input and output channels are split into; the offsets are
        predicted from all channels.
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    groups: int = 1
    dtype: Dtype | None = None
    kernel_init: Initializer = he_normal_fan_out

    @nn.compact
    def __call__(
        self, features: Float[Array, 'batch height width channel']
    ) -> Float[Array, 'batch out_height out_width {self.features}']:
        size = self.kernel_size
        offsets = Conv(
            2 * size * size,
            size,
            self.stride,
            use_bias=True,
            dtype=self.dtype,
            kernel_init=nn.initializers.zeros,
            name='offset',
        )(features)
        shape = (size, size, features.shape[-1] // self.groups, self.features)
        kernel = self.param('kernel', self.kernel_init, shape, jnp.float32)
        features, kernel = nn.dtypes.promote_dtype(features, kernel, dtype=self.dtype)
        return deformable_convolution(
            features, kernel, offsets, stride=self.stride, groups=self.groups
        )
