"""Convolution, normalisation and pooling with PyTorch's geometry, and what every network shares.

A strided convolution pads `(k - 1) // 2` on both sides here, as in PyTorch. JAX's 'SAME' pads less
on the left than on the right, which shifts every feature map of a ported network.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

# The initialisation of torchvision's and the official GCNet's networks.
he_normal_fan_out = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


class Conv(nn.Module):
    """Two-dimensional convolution over `[batch, height, width, channel]`, padded as PyTorch pads.

    Attributes:
      features: Width of the output.
      kernel_size: Height and width of the kernel, odd.
      stride: Step in both directions; the output is `ceil(size / stride)`.
      groups: Number of groups that input and output channels are split into.
    """

    features: int
    kernel_size: int
    stride: int = 1
    groups: int = 1
    use_bias: bool = False
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = he_normal_fan_out

    @nn.compact
    def __call__(
        self, features: Float[Array, 'batch height width channel']
    ) -> Float[Array, 'batch out_height out_width features']:
        size, padding = self.kernel_size, (self.kernel_size - 1) // 2
        kernel = self.param(
            'kernel',
            self.kernel_init,
            (size, size, features.shape[-1] // self.groups, self.features),
            self.param_dtype,
        )
        bias = None
        if self.use_bias:
            bias = self.param('bias', nn.initializers.zeros, (self.features,), self.param_dtype)
        features, kernel, bias = nn.dtypes.promote_dtype(features, kernel, bias, dtype=self.dtype)
        output = jax.lax.conv_general_dilated(
            features,
            kernel,
            window_strides=(self.stride, self.stride),
            padding=((padding, padding), (padding, padding)),
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
            feature_group_count=self.groups,
        )
        return output if bias is None else output + bias


class BatchNorm(nn.BatchNorm):
    """Batch normalisation with the defaults of PyTorch's (momentum 0.1 there is 0.9 here).

    The running variance is the biased one, PyTorch's the unbiased; at 100 or more values a channel
    the two differ by less than 1%.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(
        self, features: Float[Array, 'batch *spatial channel'], *, train: bool
    ) -> Float[Array, 'batch *spatial channel']:
        return super().__call__(features, use_running_average=not train)


class StochasticDepth(nn.Module):
    """Drops a residual branch for a whole image with probability `rate` (arXiv 1603.09382).

    What is kept is scaled by `1 / (1 - rate)`. Draws from the random stream 'dropout'.
    """

    rate: float

    @nn.compact
    def __call__(
        self, features: Float[Array, 'batch *spatial channel'], *, train: bool
    ) -> Float[Array, 'batch *spatial channel']:
        if not train or self.rate == 0.0:
            return features
        keep = 1.0 - self.rate
        shape = (features.shape[0],) + (1,) * (features.ndim - 1)
        kept = jax.random.bernoulli(self.make_rng('dropout'), keep, shape)
        return jnp.where(kept, features / jnp.asarray(keep, features.dtype), 0)


def max_pool(
    features: Float[Array, 'batch height width channel'],
) -> Float[Array, 'batch half_height half_width channel']:
    """Maximum over 3x3 windows at stride 2, padded by one on each side."""
    return nn.max_pool(features, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


def global_average_pool(
    features: Float[Array, 'batch height width channel'],
) -> Float[Array, 'batch channel']:
    """The mean over all positions, in float32."""
    return features.mean(axis=(1, 2), dtype=jnp.float32)


def linear_rates(final: float, count: int) -> list[float]:
    """Stochastic depth rates: linear from 0 at the first block to `final` at the last."""
    return [final * index / max(1, count - 1) for index in range(count)]


def check_images(images: Any, network: str) -> None:
    """Raises unless `images` is a floating-point `[batch, height, width, channel]`."""
    dtype = getattr(images, 'dtype', None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f'{network}: images must be a floating-point array, got '
            f'{dtype or type(images).__name__}; scale to 0..1 and normalise with the mean and std '
            'of model_entry(name).preprocessing'
        )
    if images.ndim != 4 or 0 in images.shape[1:]:
        raise ValueError(
            f'{network}: images must be [batch, height, width, channel], got shape {images.shape}; '
            'for one image add a batch dimension with images[None]'
        )
