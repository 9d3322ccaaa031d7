"""Squeeze-and-excitation (Hu et al., arXiv 1709.01507, section 3).

output = features * sigmoid(W2 relu(W1 mean(features)))
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float

from gcnet_jax.context.common import average_pool, check_features, hidden_size
from gcnet_jax.context.global_context import ContextFusion


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate in (0, 1) that is computed from the mean over all positions.

    Attributes:
      ratio: Bottleneck width over input width, in (0, 1].
      hidden_channels: The bottleneck's width itself; takes the place of `ratio` where given.
      rounding: 'floor' or 'nearest' for `ratio * channels`; at least 1 in both.
      activation: Between the two dense layers.
      dtype: Type of the computation; None takes the input's. The gate is computed in float32.
      param_dtype: Type of the parameters.
    """

    ratio: float = 1 / 16
    hidden_channels: int | None = None
    rounding: str = 'floor'
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        features: Float[Array, 'batch *spatial channel'],
        mask: Bool[Array, 'batch *spatial'] | None = None,
    ) -> Float[Array, 'batch *spatial channel']:
        """Returns features of the same shape and type; masked positions (False) are not averaged.

        Raises:
          TypeError: `features` is not floating point or `mask` is not boolean.
          ValueError: A wrong rank or shape, or an option out of range.
        """
        check_features(features, mask, 'SqueezeExcite')
        channels = features.shape[-1]
        hidden = hidden_size(channels, self.ratio, self.hidden_channels, self.rounding)
        options = {'dtype': self.dtype or features.dtype, 'param_dtype': self.param_dtype}
        squeezed = nn.Dense(
            hidden, kernel_init=nn.initializers.he_normal(), name='reduce', **options
        )(average_pool(features, mask))
        gate = nn.Dense(channels, name='expand', **options)(self.activation(squeezed))
        return ContextFusion(name='fusion')(features, scale=gate)
