"""ResNet and ResNeXt in torchvision's geometry, with context blocks wherever the settings put them.

He et al. (arXiv 1512.03385), Xie et al. (arXiv 1611.05431); the stride is on the 3x3 convolution
("v1.5"). The paper's GC networks are these with a global context block behind conv3's norm, before
the residual sum, in every block of stages 2 to 4 (c3 to c5).
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float

from gcnet_jax.context.common import check_choice
from gcnet_jax.errors import ConfigError
from gcnet_jax.models.backbone import Backbone, Features, Map, stage_strides
from gcnet_jax.models.deformable import DeformableConv
from gcnet_jax.models.layers import (
    BatchNorm,
    Conv,
    StochasticDepth,
    linear_rates,
    max_pool,
)
from gcnet_jax.models.placement import (
    Placement,
    apply_placements,
    check_placements,
    placed_modules,
)

STEMS = ('imagenet', 'deep', 'small', 'none')
SHORTCUTS = ('projection', 'zero_pad')


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (ResNet-18 and -34, CIFAR networks, GC-CNN)."""

    positions = ('after_conv1', 'after_conv2', 'after_add')
    expansion = 1

    width: int
    stride: int = 1
    dilation: int = 1
    context: tuple[Placement, ...] = ()
    stochastic_depth_rate: float = 0.0
    zero_init_residual: bool = False
    shortcut: str = 'projection'
    norm: Callable[..., nn.Module] = BatchNorm
    dtype: Dtype | None = None

    @nn.compact
    def __call__(
        self, features: Float[Array, 'batch height width channel'], *, train: bool
    ) -> Float[Array, 'batch out_height out_width out_channel']:
        def place(values, position):
            return apply_placements(values, self.context, position, self.dtype)

        shortcut = _shortcut(self, features, self.width, train)
        conv1 = Conv(
            self.width, 3, self.stride, dilation=self.dilation, dtype=self.dtype, name='conv1'
        )
        branch = conv1(features)
        branch = nn.relu(self.norm(dtype=self.dtype, name='norm1')(branch, train=train))
        branch = place(branch, 'after_conv1')
        branch = Conv(self.width, 3, dtype=self.dtype, name='conv2')(branch)
        branch = _last_norm(self, 'norm2')(branch, train=train)
        branch = place(branch, 'after_conv2')
        branch = StochasticDepth(self.stochastic_depth_rate)(branch, train=train)
        return place(nn.relu(branch + shortcut), 'after_add')


class BottleneckBlock(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; grouped, it is ResNeXt's."""

    positions = ('after_conv1', 'after_conv2', 'after_conv3', 'after_add')
    expansion = 4

    width: int
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    base_width: int = 64
    deformable: bool = False
    context: tuple[Placement, ...] = ()
    stochastic_depth_rate: float = 0.0
    zero_init_residual: bool = False
    shortcut: str = 'projection'
    norm: Callable[..., nn.Module] = BatchNorm
    dtype: Dtype | None = None

    @nn.compact
    def __call__(
        self, features: Float[Array, 'batch height width channel'], *, train: bool
    ) -> Float[Array, 'batch out_height out_width out_channel']:
        def place(values, position):
            return apply_placements(values, self.context, position, self.dtype)

        out_channels = self.width * self.expansion
        inner = self.width * self.base_width // 64 * self.groups
        shortcut = _shortcut(self, features, out_channels, train)
        branch = Conv(inner, 1, dtype=self.dtype, name='conv1')(features)
        branch = nn.relu(self.norm(dtype=self.dtype, name='norm1')(branch, train=train))
        branch = place(branch, 'after_conv1')
        geometry = (inner, 3, self.stride, self.groups)
        if self.deformable:
            conv2 = DeformableConv(*geometry, dtype=self.dtype, name='conv2')
        else:
            conv2 = Conv(*geometry, self.dilation, dtype=self.dtype, name='conv2')
        branch = conv2(branch)
        branch = nn.relu(self.norm(dtype=self.dtype, name='norm2')(branch, train=train))
        branch = place(branch, 'after_conv2')
        conv3 = Conv(out_channels, 1, dtype=self.dtype, name='conv3')
        norm3 = _last_norm(self, 'norm3')
        context = placed_modules(self.context, 'after_conv3', self.dtype)
        branch = self._expand_and_add(branch, shortcut, conv3, norm3, context, train=train)
        return place(nn.relu(branch), 'after_add')

    @nn.nowrap
    def _expand_and_add(
        self,
        branch: Float[Array, 'batch height width inner_channel'],
        shortcut: Float[Array, 'batch height width channel'],
        conv3: nn.Module,
        norm3: nn.Module,
        context: Sequence[nn.Module],
        *,
        train: bool,
    ) -> Float[Array, 'batch height width channel']:
        """The last convolution, its norm and its context blocks, and the residual sum."""
        branch = norm3(conv3(branch), train=train)
        for module in context:
            branch = module(branch)
        return StochasticDepth(self.stochastic_depth_rate)(branch, train=train) + shortcut


def _shortcut(block: BasicBlock | BottleneckBlock, features, out_channels: int, train: bool):
    """The input itself where the shapes agree, else what `block.shortcut` makes of it."""
    if block.stride == 1 and features.shape[-1] == out_channels:
        return features
    if block.shortcut == 'zero_pad':
        return zero_pad_shortcut(features, block.stride, out_channels)
    conv = Conv(out_channels, 1, block.stride, dtype=block.dtype, name='shortcut_conv')
    return block.norm(dtype=block.dtype, name='shortcut_norm')(conv(features), train=train)


def zero_pad_shortcut(
    features: Float[Array, 'batch height width channel'], stride: int, out_channels: int
) -> Float[Array, 'batch out_height out_width out_channel']:
    """The parameter-free shortcut: every `stride`-th position, between channels of zeros.

    He et al., section 4.2, option A. The paper does not say where the zeros are: here half of the
    new channels precede the input's and half follow them (an odd one follows), as in
    akamaster/pytorch_resnet_cifar10, whose weights need it so.

    Raises:
      ConfigError: The output is narrower than the input.
    """
    new = out_channels - features.shape[-1]
    if new < 0:
        raise ConfigError(
            f"shortcut 'zero_pad' cannot take {features.shape[-1]} channels to {out_channels}: "
            "choose widths that do not shrink, or shortcut 'projection'"
        )
    features = features[:, ::stride, ::stride]
    return jnp.pad(features, ((0, 0), (0, 0), (0, 0), (new // 2, new - new // 2)))


def _last_norm(block: BasicBlock | BottleneckBlock, name: str) -> nn.Module:
    """The norm before the sum; at zero scale the whole residual block starts as the identity."""
    zero = block.zero_init_residual
    scale_init = nn.initializers.zeros if zero else nn.initializers.ones
    return block.norm(dtype=block.dtype, scale_init=scale_init, name=name)


class ResNet(Backbone):
    """A residual network for classification, or a backbone through the method `outputs`.

    Attributes:
      block: BasicBlock or BottleneckBlock.
      stage_sizes: Number of residual blocks in each stage.
      widths: Width of each stage, before the bottleneck's expansion.
      num_classes: Size of the classifier; 0 leaves it out and returns the pooled features.
      stem: 'imagenet' (7x7 at stride 2 and max pooling), 'deep' (three 3x3, the first at stride 2
        and half as wide, and max pooling: ResNet-C of arXiv 1812.01187), 'small' (3x3 at stride 1,
        for 32-pixel images) or 'none' (the first residual block reads the image).
      output_stride: Size of the image over that of the last map, where that is less than the
        strides make it: 8 or 16 for segmentation, see `stage_strides`. None leaves the strides.
      groups, base_width: ResNeXt's cardinality and width: 32 and 4 for 32x4d.
      deformable_stages: Stages, from 1, whose blocks have a deformable 3x3 convolution (bottlenecks
        only, without dilation).
      context: Context blocks, see Placement.
      dropout_rate: Before the classifier.
      stochastic_depth_rate: Of the last block; it grows linearly from 0 at the first.
      zero_init_residual: Start the last norm of each block at zero scale (arXiv 1706.02677, 5.1).
      shortcut: Where a block changes the shape: 'projection' (a 1x1 convolution and its norm; He et
        al.'s option B) or 'zero_pad' (no parameters, option A; see `zero_pad_shortcut`).
      norm: Makes every norm, see `layers.parse_norm`.
      dtype: Type of the computation. Parameters, statistics, pooling and classifier are float32.
    """

    block: type[nn.Module]
    stage_sizes: Sequence[int]
    widths: Sequence[int] = (64, 128, 256, 512)
    num_classes: int = 1000
    stem: str = 'imagenet'
    output_stride: int | None = None
    groups: int = 1
    base_width: int = 64
    deformable_stages: Sequence[int] = ()
    context: tuple[Placement, ...] = ()
    dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    zero_init_residual: bool = False
    shortcut: str = 'projection'
    norm: Callable[..., nn.Module] = BatchNorm
    dtype: Dtype = jnp.float32

    def __post_init__(self):
        check_choice('stem', self.stem, STEMS)
        check_choice('shortcut', self.shortcut, SHORTCUTS)
        check_placements(self.context, self.stage_sizes, self.block.positions)
        self._check_deformable()
        super().__post_init__()

    @nn.nowrap
    def _check_deformable(self) -> None:
        if not self.deformable_stages:
            return
        if not set(self.deformable_stages) <= set(range(1, len(self.stage_sizes) + 1)):
            raise ConfigError(
                f'deformable_stages must be among 1 to {len(self.stage_sizes)}, got '
                f'{tuple(self.deformable_stages)}'
            )
        if not issubclass(self.block, BottleneckBlock) or self.output_stride is not None:
            raise ConfigError(
                f'deformable_stages is {tuple(self.deformable_stages)}; only networks of '
                'bottlenecks without an output_stride have deformable convolutions'
            )

    def setup(self):
        if self.stem == 'deep':
            width = self.widths[0]
            self.stem_conv = [
                Conv(features, 3, stride, dtype=self.dtype)
                for features, stride in ((width // 2, 2), (width // 2, 1), (width, 1))
            ]
            self.stem_norm = [self.norm(dtype=self.dtype) for _ in self.stem_conv]
        elif self.stem != 'none':
            size, stride = (7, 2) if self.stem == 'imagenet' else (3, 1)
            self.stem_conv = Conv(self.widths[0], size, stride, dtype=self.dtype)
            self.stem_norm = self.norm(dtype=self.dtype)
        strides = stage_strides(
            [1] + [2] * (len(self.stage_sizes) - 1), self._stem_stride, self.output_stride
        )
        rates = iter(linear_rates(self.stochastic_depth_rate, sum(self.stage_sizes)))
        stages = []
        for stage, geometry in enumerate(strides, start=1):
            indices = range(self.stage_sizes[stage - 1])
            stages.append([self._residual_block(stage, i, *geometry, next(rates)) for i in indices])
        self.set_up_stages(stages)

    @property
    def _stem_stride(self) -> int:
        return 4 if self.stem in ('imagenet', 'deep') else 1

    def _residual_block(
        self, stage: int, index: int, stride: int, dilation_before: int, dilation: int, rate: float
    ) -> nn.Module:
        size, grouped = self.stage_sizes[stage - 1], {}
        if issubclass(self.block, BottleneckBlock):
            grouped = {
                'groups': self.groups,
                'base_width': self.base_width,
                'deformable': stage in self.deformable_stages,
            }
        return self.block(
            width=self.widths[stage - 1],
            stride=stride if index == 0 else 1,
            dilation=dilation_before if index == 0 else dilation,
            **grouped,
            context=tuple(place for place in self.context if place.holds(stage, index, size)),
            stochastic_depth_rate=rate,
            zero_init_residual=self.zero_init_residual,
            shortcut=self.shortcut,
            norm=self.norm,
            dtype=self.dtype,
        )

    def _stem(self, images: Features, *, train: bool) -> tuple[Map | None, Map]:
        if self.stem == 'none':
            return None, images
        values = images
        layers = (
            zip(self.stem_conv, self.stem_norm, strict=True)
            if self.stem == 'deep'
            else [(self.stem_conv, self.stem_norm)]
        )
        for conv, norm in layers:
            values = nn.relu(norm(conv(values), train=train))
        return values, values if self.stem == 'small' else max_pool(values)
