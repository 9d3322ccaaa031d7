"""The global context block (Cao et al., GCNet, arXiv 1904.11492, section 3.3).

    context = sum over positions of softmax(features . w) * features     AttentionPool
    update  = W2 relu(layer_norm(W1 context))                            ContextTransform
    output  = features + update                                         ContextFusion

The computation is that of the official code and of mmcv's `ContextBlock`; timm's `GlobalContext`
is reached through `rounding='nearest'` and `norm_epsilon=1e-6`. The 1x1 convolutions are dense
layers over the channel dimension, so that one set of parameters serves a sequence, an image or a
video.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float

from gcnet_jax.context.common import (
    average_pool,
    check_choice,
    check_features,
    flatten_positions,
    float32_or_wider,
    hidden_size,
    masked_softmax,
    over_positions,
    weighted_sum,
)

POOLINGS = ('attention', 'average')
FUSIONS = ('add', 'scale', 'scale_add')


class AttentionPool(nn.Module):
    """Pools all positions into one vector, weighted by a softmax over one logit per position.

    The attention of a call is sown as `attention`, `[batch, *spatial]` in float32, into the
    collection `intermediates`. The bias cancels in the softmax; it is a parameter because published
    checkpoints hold it.
    """

    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        features: Float[Array, 'batch *spatial channel'],
        mask: Bool[Array, 'batch *spatial'] | None = None,
    ) -> Float[Array, 'batch channel']:
        """Returns the context; a masked position (False) has exactly zero weight."""
        check_features(features, mask, 'AttentionPool')
        positions, valid = flatten_positions(features, mask)
        logits = nn.Dense(
            1,
            dtype=self.dtype or features.dtype,
            param_dtype=self.param_dtype,
            kernel_init=nn.initializers.he_normal(),
            name='logits',
        )(positions)
        attention = masked_softmax(logits[..., 0], valid)
        self.sow('intermediates', 'attention', attention.reshape(features.shape[:-1]))
        return weighted_sum(positions, attention)


class ContextTransform(nn.Module):
    """The bottleneck from context to update: 1x1 -> LayerNorm -> activation -> 1x1.

    Attributes:
      features: Width of the output.
      hidden_channels: Width of the bottleneck.
      norm_epsilon: 1e-5 in the paper's code, 1e-6 in timm.
      activation: Between the normalisation and the last convolution.
      zero_init: Start the last convolution at zero, weight and bias: adding is then the identity.
    """

    features: int
    hidden_channels: int
    norm_epsilon: float = 1e-5
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    zero_init: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, context: Float[Array, 'batch channel']) -> Float[Array, 'batch features']:
        options = {'dtype': self.dtype or context.dtype, 'param_dtype': self.param_dtype}
        hidden = nn.Dense(
            self.hidden_channels, kernel_init=nn.initializers.he_normal(), name='reduce', **options
        )(context)
        # All of it in float32, as flax computes it in any case.
        norm = nn.LayerNorm(self.norm_epsilon, param_dtype=self.param_dtype, name='norm')
        hidden = norm(hidden.astype(float32_or_wider(hidden.dtype))).astype(hidden.dtype)
        kernel_init = nn.initializers.zeros if self.zero_init else nn.initializers.he_normal()
        return nn.Dense(self.features, kernel_init=kernel_init, name='expand', **options)(
            self.activation(hidden)
        )


class ContextFusion(nn.Module):
    """Gives every position the same update: `features * sigmoid(scale)`, then `+ add`.

    Without parameters. Either update may be absent; scale comes first, as in the paper's code.
    """

    @nn.compact
    def __call__(
        self,
        features: Float[Array, 'batch *spatial channel'],
        *,
        scale: Float[Array, 'batch channel'] | None = None,
        add: Float[Array, 'batch channel'] | None = None,
    ) -> Float[Array, 'batch *spatial channel']:
        """Returns the fused features, in the type of `features`."""
        check_features(features, None, 'ContextFusion')
        if scale is not None:
            gate = nn.sigmoid(scale.astype(jnp.float32)).astype(features.dtype)
            features = features * over_positions(gate, features.ndim)
        if add is not None:
            features = features + over_positions(add.astype(features.dtype), features.ndim)
        return features


class GlobalContext(nn.Module):
    """The global context block: one context for all positions, transformed, and fused into each.

    With `zero_init`, `fusion='add'` starts as the exact identity, `'scale'` at half the input.

    Attributes:
      ratio: Bottleneck width over input width, in (0, 1].
      hidden_channels: The bottleneck's width itself; takes the place of `ratio` where given.
      rounding: 'floor' (mmcv) or 'nearest' (timm) for `ratio * channels`; at least 1 in both.
      pooling: 'attention' (the paper's) or 'average' (the plain mean, as in squeeze-excitation).
      fusion: 'add' (the paper's choice), 'scale', or 'scale_add': both, with a transform each.
      norm_epsilon, activation, zero_init: See ContextTransform.
      dtype: Type of the computation; None takes the input's. The softmax runs in float32 always.
      param_dtype: Type of the parameters.
    """

    ratio: float = 1 / 16
    hidden_channels: int | None = None
    rounding: str = 'floor'
    pooling: str = 'attention'
    fusion: str = 'add'
    norm_epsilon: float = 1e-5
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    zero_init: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        features: Float[Array, 'batch *spatial channel'],
        mask: Bool[Array, 'batch *spatial'] | None = None,
    ) -> Float[Array, 'batch *spatial channel']:
        """Returns features of the same shape.

        Args:
          features: Floating point, with any number of spatial dimensions.
          mask: True where a position is valid. The others get no attention, so that padding never
            changes an image's context.

        Raises:
          TypeError: `features` is not floating point or `mask` is not boolean.
          ValueError: A wrong rank or shape, or an option out of range.
        """
        check_choice('pooling', self.pooling, POOLINGS)
        check_choice('fusion', self.fusion, FUSIONS)
        check_features(features, mask, 'GlobalContext')
        if self.pooling == 'attention':
            pool = AttentionPool(dtype=self.dtype, param_dtype=self.param_dtype, name='pool')
            context = pool(features, mask)
        else:
            context = average_pool(features, mask)
        updates = {
            name: self.transform(features.shape[-1], name=name)(context)
            for name in ('scale', 'add')
            if name in self.fusion
        }
        return ContextFusion(name='fusion')(features, **updates)

    @nn.nowrap
    def transform(self, channels: int, **place: Any) -> ContextTransform:
        """Makes a transform of contexts `[batch, channels]`."""
        return ContextTransform(
            channels,
            hidden_size(channels, self.ratio, self.hidden_channels, self.rounding),
            norm_epsilon=self.norm_epsilon,
            activation=self.activation,
            zero_init=self.zero_init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            **place,
        )
