"""Semantic segmenters: a backbone with fine maps, and a head that classifies every position.

GCNet's segmenters of mmsegmentation are a dilated ResNet and a head with global context.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype
from jax import lax
from jaxtyping import Array, Float

from gcnet_jax.errors import ConfigError
from gcnet_jax.models.fcn_head import FCNHead
from gcnet_jax.models.layers import BatchNorm
from gcnet_jax.ops.resize import resize_bilinear

Images = Float[Array, 'batch height width 3']
Logits = Float[Array, 'batch height width classes']


class EncoderDecoder(nn.Module):
    """A segmenter over any backbone with stages.

    Attributes:
      backbone: Has a method `outputs` that returns 'stage1', 'stage2', ...; the head reads the last
        one, and the auxiliary head the one before.
      num_classes: Number of logits of each pixel.
      channels: Width of the head.
      auxiliary_channels: Width of the auxiliary head, which only training needs; 0 for none.
      context_ratio: Of the head's context block, see `FCNHead`; None for the plain head.
      dropout_rate: Before both classifiers.
      align_corners: How logits are enlarged, see `resize_bilinear`.
      window: Height and width of the windows that an image is cut into outside of training, whose
        logits are averaged where they overlap; None computes whole images.
      window_stride: Distance between the starts of neighbouring windows, at most `window`.
      norm: Makes the heads' norms, see `layers.parse_norm`.
      dtype: Type of the computation. Logits are float32.
    """

    backbone: nn.Module
    num_classes: int = 19
    channels: int = 512
    auxiliary_channels: int = 256
    context_ratio: float | None = 1 / 4
    dropout_rate: float = 0.1
    align_corners: bool = False
    window: int | None = None
    window_stride: int | None = None
    norm: Callable[..., nn.Module] = BatchNorm
    dtype: Dtype = jnp.float32

    def __post_init__(self):
        window, stride = self.window, self.window_stride
        if (window is None) != (stride is None) or (window is not None and stride > window):
            raise ConfigError(
                f'window is {window} and window_stride {stride}: give both, and a stride of at '
                'most the window, or neither for whole images'
            )
        if self.num_classes < 1:
            raise ConfigError(
                f'num_classes is {self.num_classes}: a segmenter has a logit for each of its '
                'classes'
            )
        super().__post_init__()

    def setup(self):
        common = {'dropout_rate': self.dropout_rate, 'norm': self.norm, 'dtype': self.dtype}
        self.head = FCNHead(
            self.num_classes, self.channels, context_ratio=self.context_ratio, **common
        )
        if self.auxiliary_channels:
            self.auxiliary_head = FCNHead(
                self.num_classes,
                self.auxiliary_channels,
                convolutions=1,
                concatenate=False,
                **common,
            )

    def outputs(self, images: Images, *, train: bool) -> dict[str, Array]:
        """Returns every output by its name. Under `jax.jit` only those that are used are computed.

        Args:
          images: Normalised, floating point.
          train: Use the batch's statistics and update the running ones (make the collection
            'batch_stats' mutable), and drop with the random stream 'dropout'.

        Returns:
          The backbone's outputs; 'head_logits', the logits at the stride of the backbone's last
          map, of the whole image; 'logits', those of each pixel of `images`, from windows where the
          network has them and does not train; and 'auxiliary_logits' of each pixel, if there is an
          auxiliary head. Logits are float32.
        """
        outputs = self.backbone.outputs(images, train=train)
        last = sum(name.startswith('stage') for name in outputs)
        outputs['head_logits'] = self.head(outputs[f'stage{last}'], train=train)
        if self.auxiliary_channels:
            if last < 2:
                raise ConfigError(
                    'the auxiliary head reads the last stage but one, and the backbone has one '
                    'stage: set auxiliary_channels to 0'
                )
            auxiliary = self.auxiliary_head(outputs[f'stage{last - 1}'], train=train)
            outputs['auxiliary_logits'] = self._enlarge(auxiliary, images)
        if self.window is None or train or self.is_initializing():
            outputs['logits'] = self._enlarge(outputs['head_logits'], images)
        else:
            outputs['logits'] = self._logits_by_window(images)
        return outputs

    def __call__(self, images: Images, *, train: bool) -> Logits:
        """Returns the logits of each pixel; see `outputs`."""
        return self.outputs(images, train=train)['logits']

    def _enlarge(self, logits: Logits, images: Images) -> Logits:
        return resize_bilinear(logits, images.shape[1:3], align_corners=self.align_corners)

    def _logits_by_window(self, images: Images) -> Logits:
        # Modules cannot be called inside JAX's loops, functions of their variables can.
        module, variables = self.unbind()
        whole = module.clone(window=None, window_stride=None)
        return average_windows(
            partial(whole.apply, variables, train=False),
            images,
            self.window,
            self.window_stride,
            self.num_classes,
        )


def average_windows(
    compute: Callable[[Images], Logits], images: Images, window: int, stride: int, num_classes: int
) -> Logits:
    """Returns the logits of windows that cover the images, averaged where they overlap.

    Windows start at the top left corner, `stride` apart; the last ones are moved back to end at the
    border. Images smaller than a window are computed whole along that axis.

    Args:
      compute: Returns the logits of each pixel of a window.
      images: Of any size.
      window, stride: Height and width of the windows, and their distance, in pixels.
      num_classes: Number of logits.
    """
    batch, *sides, _ = images.shape
    size = tuple(min(window, side) for side in sides)
    rows, columns = (
        jnp.asarray(window_starts(side, window, stride)) for side in (sides[0], sides[1])
    )
    starts = jnp.stack(jnp.meshgrid(rows, columns, indexing='ij'), -1).reshape(-1, 2)

    def add(carry, start):
        total, count = carry
        place = (0, start[0], start[1], 0)
        logits = compute(lax.dynamic_slice(images, place, (batch, *size, images.shape[-1])))
        before = lax.dynamic_slice(total, place, logits.shape)
        counted = lax.dynamic_slice(count, (start[0], start[1]), size)
        total = lax.dynamic_update_slice(total, before + logits, place)
        return (total, lax.dynamic_update_slice(count, counted + 1, (start[0], start[1]))), None

    empty = (
        jnp.zeros((batch, *sides, num_classes), jnp.float32),
        jnp.zeros(sides, jnp.float32),
    )
    (total, count), _ = lax.scan(add, empty, starts)
    return total / count[None, ..., None]


def window_starts(side: int, window: int, stride: int) -> list[int]:
    """Returns where the windows along one side begin."""
    count = max(side - window + stride - 1, 0) // stride + 1
    return [max(min(index * stride, side - window), 0) for index in range(count)]
