"""The non-local block (Wang et al., arXiv 1711.07971) and its simplification (GCNet, section 3.2).

    NonLocal             output_i = features_i + W (sum over j of weight_ij * value_j)
    SimplifiedNonLocal   output_i = features_i + W (sum over j of weight_j * features_j)

`NonLocal` has an attention map for every query position, and so costs the square of the number of
positions. GCNet found these maps to be nearly the same, and kept one for all queries.
The modes have the names and the meaning they have in mmcv's `NonLocal2d`, without sub-sampling.
"""

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float

from gcnet_jax.context.common import (
    check_choice,
    check_features,
    flatten_positions,
    hidden_size,
    masked_softmax,
)
from gcnet_jax.context.global_context import AttentionPool, ContextFusion
from gcnet_jax.errors import ConfigError

MODES = ('gaussian', 'embedded_gaussian', 'dot_product', 'concatenation')


class NonLocal(nn.Module):
    """The non-local block: each position is updated from all positions.

    The weight of position j for position i, by mode (q, k: the query and key layers):

        gaussian            softmax over j of x_i . x_j
        embedded_gaussian   softmax over j of q(x_i) . k(x_j)
        dot_product         q(x_i) . k(x_j) / number of positions
        concatenation       relu(w . [q(x_i), k(x_j)]) / number of positions

    Sown into the collection `intermediates`: `input` and `update`, what comes in and what is added
    to it, both `[batch, *spatial, channel]`; and by the two softmax modes `attention`,
    `[batch, *spatial, *spatial]` in float32 (first the queries, then the keys).

    Attributes:
      mode: How a pair of positions is weighted.
      ratio: Width of query, key and value over input width, in (0, 1].
      hidden_channels: That width itself; takes the place of `ratio` where given.
      rounding: 'floor' (mmcv) or 'nearest' for `ratio * channels`; at least 1 in both.
      scaled: Divide embedded_gaussian's logits by sqrt(width): mmcv's `use_scale`, on by default
        there, absent from the paper.
      zero_init: Start the last layer at zero, weight and bias: the block is then the identity.
      dtype: Type of the computation; None takes the input's. The weights are float32 always.
      param_dtype: Type of the parameters.
    """

    mode: str = 'embedded_gaussian'
    ratio: float = 1 / 2
    hidden_channels: int | None = None
    rounding: str = 'floor'
    scaled: bool = False
    zero_init: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        features: Float[Array, 'batch *spatial channel'],
        mask: Bool[Array, 'batch *spatial'] | None = None,
    ) -> Float[Array, 'batch *spatial channel']:
        """Returns features of the same shape and type.

        Args:
          features: Floating point, with any number of spatial dimensions.
          mask: True where a position is valid. The others get no weight and are not counted; what
            they return has no meaning.

        Raises:
          TypeError: `features` is not floating point or `mask` is not boolean.
          ValueError: A wrong rank or shape, or an option out of range.
        """
        check_features(features, mask, 'NonLocal')
        check_choice('mode', self.mode, MODES)
        if self.scaled and self.mode != 'embedded_gaussian':
            raise ConfigError(
                f"scaled=True is for mode='embedded_gaussian', got mode={self.mode!r}; "
                'leave it False'
            )
        batch, *spatial, channels = features.shape
        hidden = hidden_size(channels, self.ratio, self.hidden_channels, self.rounding)
        dtype = self.dtype or features.dtype
        positions, valid = flatten_positions(features, mask)
        positions = positions.astype(dtype)

        def project(name: str) -> Float[Array, 'batch position hidden']:
            kernel_init = nn.initializers.normal(0.01)
            return self._dense(hidden, name, dtype, kernel_init=kernel_init)(positions)

        if self.mode == 'gaussian':
            queries = keys = positions
        else:
            queries, keys = project('query'), project('key')
        weights = self._weights(queries, keys, valid)
        if 'gaussian' in self.mode:
            self.sow('intermediates', 'attention', weights.reshape(batch, *spatial, *spatial))

        update = jnp.einsum(
            'bqk,bkc->bqc',
            weights.astype(dtype),
            project('value'),
            preferred_element_type=jnp.float32,
        ).astype(dtype)
        kernel_init = nn.initializers.zeros if self.zero_init else nn.initializers.he_normal()
        update = self._dense(channels, 'expand', dtype, kernel_init=kernel_init)(update)
        update = update.reshape(features.shape).astype(features.dtype)
        self.sow('intermediates', 'input', features)
        self.sow('intermediates', 'update', update)
        return features + update

    def _weights(
        self,
        queries: Float[Array, 'batch query hidden'],
        keys: Float[Array, 'batch key hidden'],
        valid: Bool[Array, 'batch key'] | None,
    ) -> Float[Array, 'batch query key']:
        """Returns the weight of each key for each query in float32; zero where it is not valid."""
        if valid is not None:
            valid = valid[:, None, :]
        if self.mode == 'concatenation':
            weights = self._concatenation(queries, keys)
        else:
            weights = jnp.einsum('bqc,bkc->bqk', queries, keys, preferred_element_type=jnp.float32)
        if 'gaussian' in self.mode:
            scale = queries.shape[-1] ** -0.5 if self.scaled else 1.0
            return masked_softmax(weights * scale, valid)
        if valid is None:
            return weights / keys.shape[1]
        count = jnp.maximum(valid.sum(-1, keepdims=True, dtype=jnp.float32), 1.0)
        return jnp.where(valid, weights, 0.0) / count

    def _concatenation(
        self, queries: Float[Array, 'batch query hidden'], keys: Float[Array, 'batch key hidden']
    ) -> Float[Array, 'batch query key']:
        """Returns relu(w . [query, key]) of each pair, without building the pairs: w is linear."""
        dense = self._dense(1, 'concat', queries.dtype, use_bias=False)
        of_queries = dense(jnp.concatenate([queries, jnp.zeros_like(queries)], axis=-1))
        of_keys = dense(jnp.concatenate([jnp.zeros_like(keys), keys], axis=-1))
        return nn.relu(of_queries + of_keys[..., 0][:, None, :]).astype(jnp.float32)

    def _dense(self, features: int, name: str, dtype: Dtype, **options) -> nn.Dense:
        return nn.Dense(features, dtype=dtype, param_dtype=self.param_dtype, name=name, **options)


class SimplifiedNonLocal(nn.Module):
    """The non-local block with one attention map for all queries (GCNet, equation 3).

    Attributes:
      zero_init: Start the value layer at zero, weight and bias: the block is then the identity.
      dtype: Type of the computation; None takes the input's. The softmax runs in float32 always.
      param_dtype: Type of the parameters.
    """

    zero_init: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        features: Float[Array, 'batch *spatial channel'],
        mask: Bool[Array, 'batch *spatial'] | None = None,
    ) -> Float[Array, 'batch *spatial channel']:
        """Returns features of the same shape and type; masked positions (False) get no attention.

        Raises:
          TypeError: `features` is not floating point or `mask` is not boolean.
          ValueError: A wrong rank or shape.
        """
        check_features(features, mask, 'SimplifiedNonLocal')
        options = {'dtype': self.dtype or features.dtype, 'param_dtype': self.param_dtype}
        context = AttentionPool(name='pool', **options)(features, mask)
        kernel_init = nn.initializers.zeros if self.zero_init else nn.initializers.he_normal()
        update = nn.Dense(features.shape[-1], kernel_init=kernel_init, name='value', **options)(
            context
        )
        return ContextFusion(name='fusion')(features, add=update)
