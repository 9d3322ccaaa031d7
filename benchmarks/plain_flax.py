"""ResNet-50 as Flax's ImageNet example writes it: what people start from today, to compare with."""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut."""

    width: int
    stride: int
    dtype: Dtype

    @nn.compact
    def __call__(self, features, *, train: bool):
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(
            nn.BatchNorm, not train, momentum=0.9, epsilon=1e-5, dtype=self.dtype
        )
        strides = (self.stride, self.stride)
        branch = nn.relu(norm()(conv(self.width, (1, 1))(features)))
        branch = nn.relu(norm()(conv(self.width, (3, 3), strides)(branch)))
        branch = conv(self.width * 4, (1, 1))(branch)
        branch = norm(scale_init=nn.initializers.zeros_init())(branch)
        if features.shape != branch.shape:
            features = norm()(conv(self.width * 4, (1, 1), strides)(features))
        return nn.relu(features + branch)


class ResNet(nn.Module):
    """A bottleneck network for 1,000 classes."""

    stage_sizes: Sequence[int] = (3, 4, 6, 3)
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images, *, train: bool):
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        features = conv(64, (7, 7), (2, 2), padding=[(3, 3), (3, 3)])(images)
        norm = nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, dtype=self.dtype)
        features = nn.max_pool(nn.relu(norm(features)), (3, 3), (2, 2), padding='SAME')
        for stage, size in enumerate(self.stage_sizes):
            for block in range(size):
                stride = 2 if stage > 0 and block == 0 else 1
                features = Bottleneck(64 * 2**stage, stride, self.dtype)(features, train=train)
        pooled = jnp.mean(features, axis=(1, 2))
        return jnp.asarray(nn.Dense(1000, dtype=self.dtype)(pooled), jnp.float32)
