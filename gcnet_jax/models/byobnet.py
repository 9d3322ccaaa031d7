"""The GC networks of timm's `ByobNet`: a deep stem, and the context before the last convolution.

After timm's `byobnet.py` (Wightman, 1.0.31), in the geometry of its published weights. Unlike the
paper's networks these attend on the inner channels, behind conv2, in all four stages.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float

from gcnet_jax.context.common import check_choice
from gcnet_jax.models.backbone import Backbone, Features, Map
from gcnet_jax.models.layers import (
    BatchNorm,
    Conv,
    StochasticDepth,
    linear_rates,
    max_pool,
)
from gcnet_jax.models.placement import Placement, apply_placements, check_placements

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {'relu': nn.relu, 'silu': nn.silu}


class ByobBottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut, the inner ones a quarter as wide."""

    positions = ('after_conv1', 'after_conv2', 'after_conv3', 'after_add')

    width: int
    stride: int
    has_projection: bool
    group_size: int
    activation: str
    context: tuple[Placement, ...] = ()
    stochastic_depth_rate: float = 0.0
    zero_init_residual: bool = True
    norm: Callable[..., nn.Module] = BatchNorm
    dtype: Dtype | None = None

    @nn.compact
    def __call__(
        self, features: Float[Array, 'batch height width channel'], *, train: bool
    ) -> Float[Array, 'batch out_height out_width out_channel']:
        activate = ACTIVATIONS[self.activation]
        inner = self.width // 4
        groups = inner // self.group_size if self.group_size else 1

        def conv(values, index, *arguments):
            values = Conv(*arguments, dtype=self.dtype, name=f'conv{index}')(values)
            zero = self.zero_init_residual and index == 3
            scale_init = nn.initializers.zeros if zero else nn.initializers.ones
            norm = self.norm(dtype=self.dtype, scale_init=scale_init, name=f'norm{index}')
            values = norm(values, train=train)
            values = values if index == 3 else activate(values)
            return apply_placements(values, self.context, f'after_conv{index}', self.dtype)

        shortcut = features
        if self.has_projection:
            shortcut = Conv(self.width, 1, self.stride, dtype=self.dtype, name='shortcut_conv')(
                features
            )
            shortcut = self.norm(dtype=self.dtype, name='shortcut_norm')(shortcut, train=train)
        branch = conv(features, 1, inner, 1)
        branch = conv(branch, 2, inner, 3, self.stride, groups)
        branch = conv(branch, 3, self.width, 1)
        branch = StochasticDepth(self.stochastic_depth_rate)(branch, train=train)
        return apply_placements(activate(branch + shortcut), self.context, 'after_add', self.dtype)


class ByobNet(Backbone):
    """A residual network with a stem of three convolutions.

    Attributes:
      stage_sizes: Number of residual blocks in each stage.
      widths: Width of each stage's output, divisible by four.
      num_classes: Size of the classifier; 0 leaves it out and returns the pooled features.
      stem_widths: Widths of the stem's 3x3 convolutions; the first has stride 2.
      stem_pool: Whether max pooling makes the stem's second step, or the stride of its last
        convolution.
      group_size: Channels a group in conv2; 0 is an ordinary convolution.
      head_width: Width of a 1x1 convolution before the pooling; 0 leaves it out.
      activation: 'relu' or 'silu', everywhere but in the context blocks.
      context: Context blocks, see Placement.
      dropout_rate: Before the classifier.
      stochastic_depth_rate: Of the last block; it grows linearly from 0 at the first.
      zero_init_residual: Start the last norm of each block at zero scale, as timm does.
      norm: Makes every norm, see `layers.parse_norm`.
      dtype: Type of the computation. Parameters, statistics, pooling and classifier are float32.
    """

    stage_sizes: Sequence[int]
    widths: Sequence[int] = (256, 512, 1024, 2048)
    num_classes: int = 1000
    stem_widths: Sequence[int] = (24, 32, 64)
    stem_pool: bool = False
    group_size: int = 0
    head_width: int = 0
    activation: str = 'relu'
    context: tuple[Placement, ...] = ()
    dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    zero_init_residual: bool = True
    norm: Callable[..., nn.Module] = BatchNorm
    dtype: Dtype = jnp.float32

    def __post_init__(self):
        check_choice('activation', self.activation, tuple(ACTIVATIONS))
        check_placements(self.context, self.stage_sizes, ByobBottleneck.positions)
        super().__post_init__()

    def setup(self):
        strides = [2] + [1] * (len(self.stem_widths) - 1)
        if not self.stem_pool:
            strides[-1] = 2
        self.stem_conv = [
            Conv(width, 3, stride, dtype=self.dtype)
            for width, stride in zip(self.stem_widths, strides, strict=True)
        ]
        self.stem_norm = [self.norm(dtype=self.dtype) for _ in self.stem_widths]
        rates = iter(linear_rates(self.stochastic_depth_rate, sum(self.stage_sizes)))
        self.set_up_stages(
            [
                [self._residual_block(stage, index, next(rates)) for index in range(size)]
                for stage, size in enumerate(self.stage_sizes, start=1)
            ]
        )
        if self.head_width:
            self.head_conv = Conv(self.head_width, 1, dtype=self.dtype)
            self.head_norm = self.norm(dtype=self.dtype)

    def _residual_block(self, stage: int, index: int, rate: float) -> ByobBottleneck:
        widths = (self.stem_widths[-1], *self.widths)
        stride = 2 if stage > 1 and index == 0 else 1
        return ByobBottleneck(
            width=self.widths[stage - 1],
            stride=stride,
            has_projection=index == 0 and (stride > 1 or widths[stage - 1] != widths[stage]),
            group_size=self.group_size,
            activation=self.activation,
            context=tuple(
                place
                for place in self.context
                if place.holds(stage, index, self.stage_sizes[stage - 1])
            ),
            stochastic_depth_rate=rate,
            zero_init_residual=self.zero_init_residual,
            norm=self.norm,
            dtype=self.dtype,
        )

    def _stem(self, images: Features, *, train: bool) -> tuple[Map, Map]:
        # The map is the one before the pooling: at 1/2 of the image's size where there is one.
        values, activate = images, ACTIVATIONS[self.activation]
        for conv, norm in zip(self.stem_conv, self.stem_norm, strict=True):
            values = activate(norm(conv(values), train=train))
        return values, max_pool(values) if self.stem_pool else values

    def _head(self, features: Features, *, train: bool) -> Map:
        if not self.head_width:
            return features
        features = self.head_norm(self.head_conv(features), train=train)
        return ACTIVATIONS[self.activation](features)
