"""Heads of segmenters: mmsegmentation's GCHead, and the FCNHead that it is without context."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float

from gcnet_jax.context.global_context import GlobalContext
from gcnet_jax.models.layers import BatchNorm, Conv


class ConvNormReLU(nn.Module):
    """A convolution, its norm and ReLU.

    Attributes:
      features: Width of the output.
      kernel_size: Height and width of the kernel, odd.
      norm: Makes the norm, see `layers.parse_norm`.
    """

    features: int
    kernel_size: int = 3
    norm: Callable[..., nn.Module] = BatchNorm
    dtype: Dtype | None = None

    @nn.compact
    def __call__(
        self, features: Float[Array, 'batch height width channel'], *, train: bool
    ) -> Float[Array, 'batch height width {self.features}']:
        values = Conv(self.features, self.kernel_size, dtype=self.dtype, name='conv')(features)
        return nn.relu(self.norm(dtype=self.dtype, name='norm')(values, train=train))


class FCNHead(nn.Module):
    """Convolutions and a classifier for each position (Long et al., arXiv 1411.4038).

    With global context behind the first convolution it is the head of GCNet's segmenters.

    Attributes:
      num_classes: Number of logits.
      channels: Width of the convolutions.
      convolutions: Number of 3x3 convolutions.
      concatenate: Whether one more convolution reads the head's input beside their output.
      context_ratio: Width of the context block's bottleneck over `channels`; None for no block.
      dropout_rate: Rate at which whole channels are dropped before the classifier.
      norm: Makes every norm, see `layers.parse_norm`.
      dtype: Type of the computation. Logits are float32.
    """

    num_classes: int
    channels: int = 512
    convolutions: int = 2
    concatenate: bool = True
    context_ratio: float | None = None
    dropout_rate: float = 0.1
    norm: Callable[..., nn.Module] = BatchNorm
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, features: Float[Array, 'batch height width channel'], *, train: bool
    ) -> Float[Array, 'batch height width {self.num_classes}']:
        def conv(name: str) -> ConvNormReLU:
            return ConvNormReLU(self.channels, norm=self.norm, dtype=self.dtype, name=name)

        values = conv('conv1')(features, train=train)
        if self.context_ratio is not None:
            values = GlobalContext(self.context_ratio, dtype=self.dtype, name='context')(values)
        for index in range(2, self.convolutions + 1):
            values = conv(f'conv{index}')(values, train=train)
        if self.concatenate:
            values = conv('conv_cat')(jnp.concatenate([features, values], -1), train=train)
        drop = nn.Dropout(self.dropout_rate, broadcast_dims=(1, 2))
        values = drop(values, deterministic=not train)
        classifier = nn.Dense(
            self.num_classes, kernel_init=nn.initializers.normal(0.01), name='logits'
        )
        return classifier(values.astype(jnp.float32))
