"""timm's GC variant of EfficientNet-V2 tiny: the context block in place of squeeze-excitation.

After timm's `efficientnet.py` (Wightman, 1.0.31) for `gc_efficientnetv2_rw_t`, in the geometry of
its published weights; EfficientNet-V2 is Tan and Le's (arXiv 2104.00298).
"""

import dataclasses
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from gcnet_jax.context.common import check_choice
from gcnet_jax.context.global_context import GlobalContext
from gcnet_jax.models.backbone import Backbone, Features, Map
from gcnet_jax.models.layers import (
    BatchNorm,
    Conv,
    StochasticDepth,
)

KINDS = ('conv', 'edge', 'inverted')


@dataclasses.dataclass(frozen=True)
class EfficientStage:
    """A row of the network's table.

    Attributes:
      kind: 'conv' (one 3x3), 'edge' (3x3 that widens, then 1x1), or 'inverted' (1x1 that widens,
        3x3 depthwise, context block, 1x1).
      size: Number of blocks.
      width: Width of each block's output.
      stride: Of the first block.
      expansion: Inner width over the width of the block's input.
    """

    kind: str
    size: int
    width: int
    stride: int
    expansion: int = 1

    def __post_init__(self):
        check_choice('kind of stage', self.kind, KINDS)


EFFICIENTNETV2_TINY = (
    EfficientStage('conv', 2, 24, 1),
    EfficientStage('edge', 4, 40, 2, 4),
    EfficientStage('edge', 4, 48, 2, 4),
    EfficientStage('inverted', 6, 104, 2, 4),
    EfficientStage('inverted', 9, 128, 1, 6),
    EfficientStage('inverted', 14, 208, 2, 6),
)


def normal_fan_out(groups: int = 1) -> Initializer:
    """Normal of variance 2 over the outputs that one input position of a group feeds."""
    return nn.initializers.variance_scaling(2.0 * groups, 'fan_out', 'normal')


class EfficientBlock(nn.Module):
    """One block of a stage; the input is added where its shape is the output's."""

    kind: str
    width: int
    stride: int
    expansion: int
    context_ratio: float
    stochastic_depth_rate: float = 0.0
    norm: Callable[..., nn.Module] = BatchNorm
    dtype: Dtype | None = None

    @nn.compact
    def __call__(
        self, features: Float[Array, 'batch height width channel'], *, train: bool
    ) -> Float[Array, 'batch out_height out_width out_channel']:
        channels = features.shape[-1]
        inner = channels * self.expansion

        def conv(values, name, width, size, stride=1, groups=1, activate=True):
            init = normal_fan_out(groups)
            values = Conv(
                width, size, stride, groups, dtype=self.dtype, kernel_init=init, name=f'{name}_conv'
            )(values)
            values = self.norm(dtype=self.dtype, name=f'{name}_norm')(values, train=train)
            return nn.silu(values) if activate else values

        if self.kind == 'conv':
            branch = conv(features, 'expand', self.width, 3, self.stride)
        elif self.kind == 'edge':
            branch = conv(features, 'expand', inner, 3, self.stride)
            branch = conv(branch, 'project', self.width, 1, activate=False)
        else:
            branch = conv(features, 'expand', inner, 1)
            branch = conv(branch, 'depthwise', inner, 3, self.stride, inner)
            branch = GlobalContext(
                hidden_channels=max(1, int(channels * self.context_ratio + 0.5)),
                fusion='scale',
                norm_epsilon=1e-6,
                activation=nn.silu,
                zero_init=False,
                dtype=self.dtype,
                name='context',
            )(branch)
            branch = conv(branch, 'project', self.width, 1, activate=False)
        if self.stride == 1 and channels == self.width:
            drop = StochasticDepth(self.stochastic_depth_rate)
            branch = drop(branch, train=train) + features
        return branch


class EfficientNet(Backbone):
    """EfficientNet-V2 with global context in its inverted residuals.

    Attributes:
      stages: The table of stages.
      num_classes: Size of the classifier; 0 leaves it out and returns the pooled features.
      stem_width: Width of the 3x3 convolution at stride 2 that reads the image.
      head_width: Width of the 1x1 convolution before the pooling.
      context_ratio: Bottleneck of the context blocks over the width of their residual's input.
      dropout_rate: Before the classifier.
      stochastic_depth_rate: Grows linearly over the blocks from 0 towards this, as in timm: block k
        of n gets `k / n` of it.
      norm: Makes every norm, see `layers.parse_norm`.
      dtype: Type of the computation. Parameters, statistics, pooling and classifier are float32.
    """

    stages: Sequence[EfficientStage] = EFFICIENTNETV2_TINY
    num_classes: int = 1000
    stem_width: int = 24
    head_width: int = 1024
    context_ratio: float = 0.25
    dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    norm: Callable[..., nn.Module] = BatchNorm
    dtype: Dtype = jnp.float32

    def setup(self):
        init = normal_fan_out()
        self.stem_conv = Conv(self.stem_width, 3, 2, dtype=self.dtype, kernel_init=init)
        self.stem_norm = self.norm(dtype=self.dtype)
        total, done = sum(stage.size for stage in self.stages), 0
        stages = []
        for stage in self.stages:
            blocks = []
            for index in range(stage.size):
                rate = self.stochastic_depth_rate * done / total
                blocks.append(self._block(stage, stage.stride if index == 0 else 1, rate))
                done += 1
            stages.append(blocks)
        self.set_up_stages(stages)
        self.head_conv = Conv(self.head_width, 1, dtype=self.dtype, kernel_init=init)
        self.head_norm = self.norm(dtype=self.dtype)

    def _block(self, stage: EfficientStage, stride: int, rate: float) -> EfficientBlock:
        return EfficientBlock(
            kind=stage.kind,
            width=stage.width,
            stride=stride,
            expansion=stage.expansion,
            context_ratio=self.context_ratio,
            stochastic_depth_rate=rate,
            norm=self.norm,
            dtype=self.dtype,
        )

    def _stem(self, images: Features, *, train: bool) -> tuple[Map, Map]:
        values = nn.silu(self.stem_norm(self.stem_conv(images), train=train))
        return values, values

    def _head(self, features: Features, *, train: bool) -> Map:
        return nn.silu(self.head_norm(self.head_conv(features), train=train))
