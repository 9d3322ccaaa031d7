"""ResNets in plain `flax.linen`, as in Flax's ImageNet example, with the context written naively.

What a user would write without this package: `nn.Conv`, `nn.BatchNorm`, `nn.max_pool`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float

Features = Float[Array, 'batch height width channel']


class GlobalContext(nn.Module):
    """Attention over all positions, a bottleneck with LayerNorm, and a sum."""

    ratio: float
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Features) -> Features:
        """Adds the same update to every position."""
        conv = partial(nn.Conv, kernel_size=(1, 1), dtype=self.dtype)
        channels = features.shape[-1]
        weights = nn.softmax(conv(1)(features), axis=(1, 2))
        context = jnp.sum(features * weights, axis=(1, 2), keepdims=True)
        hidden = nn.LayerNorm(dtype=self.dtype)(conv(int(channels * self.ratio))(context))
        return features + conv(channels)(nn.relu(hidden))


class SqueezeExcite(nn.Module):
    """A gate for each channel, from the mean over all positions."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Features) -> Features:
        """Scales the channels."""
        dense, channels = partial(nn.Dense, dtype=self.dtype), features.shape[-1]
        squeezed = nn.relu(dense(channels // 16)(features.mean((1, 2))))
        return features * nn.sigmoid(dense(channels)(squeezed))[:, None, None]


class Block(nn.Module):
    """Convolutions of the given sizes, the contexts, and a shortcut; the stride is on a 3x3."""

    widths: tuple[int, ...]
    sizes: tuple[int, ...]
    stride: int
    contexts: tuple[Callable[..., nn.Module], ...]
    norm: Callable[..., nn.Module]
    dtype: Dtype

    @nn.compact
    def __call__(self, features: Features) -> Features:
        """Returns the sum of branch and shortcut."""
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype)
        branch, stride, last = features, self.stride, len(self.sizes) - 1
        for index, (width, size) in enumerate(zip(self.widths, self.sizes, strict=True)):
            step = stride if size == 3 else 1
            stride = 1 if size == 3 else stride
            branch = self.norm()(conv(width, (size, size), (step, step))(branch))
            branch = branch if index == last else nn.relu(branch)
        for context in self.contexts:
            branch = context(dtype=self.dtype)(branch)
        if features.shape != branch.shape:
            strides = (self.stride, self.stride)
            features = self.norm()(conv(self.widths[-1], (1, 1), strides)(features))
        return nn.relu(branch + features)


class PlainResNet(nn.Module):
    """A residual network; `contexts` are put into the blocks of `context_stages`."""

    stage_sizes: tuple[int, ...]
    widths: tuple[int, ...]
    bottleneck: bool
    stem: str
    num_classes: int
    contexts: tuple[Callable[..., nn.Module], ...] = ()
    context_stages: tuple[int, ...] = ()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Features, *, train: bool) -> Float[Array, 'batch classes']:
        """Returns the logits."""
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype)
        if self.stem == 'imagenet':
            stem = conv(self.widths[0], (7, 7), (2, 2), padding=[(3, 3), (3, 3)])
            images = nn.relu(norm()(stem(images)))
            images = nn.max_pool(images, (3, 3), strides=(2, 2), padding='SAME')
        elif self.stem == 'small':
            images = nn.relu(norm()(conv(self.widths[0], (3, 3))(images)))
        sizes = (1, 3, 1) if self.bottleneck else (3, 3)
        for stage, (size, width) in enumerate(
            zip(self.stage_sizes, self.widths, strict=True), start=1
        ):
            widths = (width, width, 4 * width) if self.bottleneck else (width, width)
            contexts = self.contexts if stage in self.context_stages else ()
            for index in range(size):
                stride = 2 if stage > 1 and index == 0 else 1
                images = Block(widths, sizes, stride, contexts, norm, self.dtype)(images)
        logits = nn.Dense(self.num_classes, dtype=self.dtype)(images.mean((1, 2)))
        return logits.astype(jnp.float32)

    def outputs(self, images: Features, *, train: bool) -> dict[str, Any]:
        """Returns what the training step asks of a network."""
        return {'logits': self(images, train=train)}


_resnet50 = partial(
    PlainResNet, (3, 4, 6, 3), (64, 128, 256, 512), True, 'imagenet', num_classes=1000
)
NETWORKS = {
    'resnet50': _resnet50(),
    'gc_resnet50': _resnet50(contexts=(partial(GlobalContext, 1 / 16),), context_stages=(2, 3, 4)),
    'gc_resnet20': PlainResNet(
        (3, 3, 3), (16, 32, 64), False, 'small', 10, (partial(GlobalContext, 1 / 4),), (1, 2, 3)
    ),
    'gccnn': PlainResNet(
        (1, 1, 1),
        (64, 128, 256),
        False,
        'none',
        10,
        (partial(GlobalContext, 1 / 16), SqueezeExcite),
        (1, 2, 3),
    ),
}
