"""Convolution, normalisation and pooling with PyTorch's geometry, and what every network shares.

A strided convolution pads `(k - 1) // 2` on both sides here, as in PyTorch. JAX's 'SAME' pads less
on the left than on the right, which shifts every feature map of a ported network.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from gcnet_jax.context.common import check_choice, float32_or_wider
from gcnet_jax.errors import ConfigError, unknown_name
from gcnet_jax.ops.convolution import convolve
from gcnet_jax.ops.pooling import max_pool as max_pool

# The initialisation of torchvision's and the official GCNet's networks.
he_normal_fan_out = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


class Conv(nn.Module):
    """Two-dimensional convolution over `[batch, height, width, channel]`, padded as PyTorch pads.

    Attributes:
      features: Width of the output.
      kernel_size: Height and width of the kernel, odd.
      stride: Step in both directions; the output is `ceil(size / stride)`.
      groups: Number of groups that input and output channels are split into.
      dilation: Distance of neighbouring elements of the kernel in the input.
    """

    features: int
    kernel_size: int
    stride: int = 1
    groups: int = 1
    dilation: int = 1
    use_bias: bool = False
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = he_normal_fan_out

    @nn.compact
    def __call__(
        self, features: Float[Array, 'batch height width channel']
    ) -> Float[Array, 'batch out_height out_width features']:
        size = self.kernel_size
        kernel = self.param(
            'kernel',
            self.kernel_init,
            (size, size, features.shape[-1] // self.groups, self.features),
            self.param_dtype,
        )
        bias = None
        if self.use_bias:
            bias = self.param('bias', nn.initializers.zeros, (self.features,), self.param_dtype)
        features, kernel, bias = nn.dtypes.promote_dtype(features, kernel, bias, dtype=self.dtype)
        output = convolve(features, kernel, self.stride, self.groups, self.dilation)
        return output if bias is None else output + bias[None, None, None]


class BatchNorm(nn.BatchNorm):
    """Batch normalisation with the defaults of PyTorch's (momentum 0.1 there is 0.9 here).

    The running variance is the biased one, PyTorch's the unbiased; at 100 or more values a channel
    the two differ by less than 1%.

    Attributes:
      group_size: Number of images whose statistics are taken together in training: the first
        `group_size` of the batch, the next, and so on. The running statistics follow the mean over
        the groups. None takes the whole batch, over all devices.
      frozen: Use the running statistics in training too and leave them as they are, while scale and
        bias are trained (the paper's fixBN).
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    group_size: int | None = None
    frozen: bool = False

    @nn.compact
    def __call__(
        self,
        features: Float[Array, 'batch *spatial channel'],
        *,
        train: bool,
        normalize: bool = True,
        statistics: tuple[Float[Array, ' channel'], Float[Array, ' channel']] | None = None,
    ) -> Float[Array, 'batch *spatial channel'] | tuple[Float[Array, ' channel'], ...]:
        """Returns the normalised features.

        Args:
          features: What the statistics are of.
          train: Use the statistics of the batch, and let the running ones follow.
          normalize: False leaves the normalising `(features - mean) * scale + shift` to the caller,
            and returns mean, scale and shift in float32; not with a group size.
          statistics: Mean and biased variance of the features over the batch, where the caller has
            them; they are not computed then. Not with a group size either.
        """
        running = self.frozen or not train
        if self.group_size is not None and not running and not self.is_initializing():
            return self._by_group(features)
        mean, scale, shift = self._affine(features, running, statistics)
        if not normalize:
            return mean, scale, shift
        # Not `(features - mean) * scale + shift`: for the gradient of the scale a CPU would store
        # the difference beside the features.
        dtype = self.dtype or float32_or_wider(features.dtype)
        shift = shift - mean * scale
        scale, shift = (x.reshape((1,) * (features.ndim - 1) + (-1,)) for x in (scale, shift))
        return (features.astype(scale.dtype) * scale + shift).astype(dtype)

    @nn.nowrap
    def _affine(
        self,
        features: Float[Array, 'batch *spatial channel'],
        running: bool,
        statistics: tuple[Float[Array, ' channel'], Float[Array, ' channel']] | None,
    ) -> tuple[Float[Array, ' channel'], ...]:
        """Returns mean, scale and shift, of the batch or the running ones."""
        if running:
            mean, variance = (kept.value for kept in self._running(features.shape[-1]))
        else:
            axes = tuple(range(features.ndim - 1))
            mean, variance = statistics or self._statistics(features, axes)
            self._follow(mean, variance)
        scale, shift = self._parameters(features.shape[-1])
        return mean, jax.lax.rsqrt(variance + self.epsilon) * scale, shift

    @nn.nowrap
    def _statistics(
        self, features: Float[Array, '*any channel'], axes: tuple[int, ...]
    ) -> tuple[Array, Array]:
        """Mean and biased variance over axes, which stay where they are not all but the last."""
        values = jnp.asarray(features, float32_or_wider(features.dtype))
        keep = len(axes) < features.ndim - 1
        mean = values.mean(axes, keepdims=keep)
        return mean, jnp.maximum(0.0, jnp.square(values).mean(axes, keepdims=keep) - mean**2)

    @nn.nowrap
    def _follow(self, mean: Array, variance: Array) -> None:
        """Moves the running statistics towards the mean over all groups."""
        kept = self._running(mean.shape[-1])
        if self.is_initializing():
            return  # A new network starts with a mean of 0 and a variance of 1.
        for running, new in zip(kept, (mean, variance), strict=True):
            new = new.reshape(-1, new.shape[-1]).mean(axis=0)
            running.value = self.momentum * running.value + (1 - self.momentum) * new

    @nn.nowrap
    def _running(self, channels: int) -> tuple[nn.Variable, nn.Variable]:
        """The running mean and variance, as flax's own makes them; its error if there are none."""
        mean = self.variable('batch_stats', 'mean', jnp.zeros, (channels,), jnp.float32)
        return mean, self.variable('batch_stats', 'var', jnp.ones, (channels,), jnp.float32)

    @nn.nowrap
    def _parameters(self, channels: int) -> tuple[Array, Array]:
        scale = self.param('scale', self.scale_init, (channels,), self.param_dtype)
        return scale, self.param('bias', self.bias_init, (channels,), self.param_dtype)

    @nn.nowrap
    def _by_group(
        self, features: Float[Array, 'batch *spatial channel']
    ) -> Float[Array, 'batch *spatial channel']:
        """Normalises each group with its own statistics; flax has this for pmap's axes only."""
        images, channels = features.shape[0], features.shape[-1]
        if images % self.group_size:
            raise ConfigError(
                f'norm.group_size is {self.group_size}; it must divide the {images} images that '
                'are computed at a time'
            )
        grouped = features.reshape(-1, self.group_size, *features.shape[1:])
        mean, variance = self._statistics(grouped, tuple(range(1, grouped.ndim - 1)))
        self._follow(mean, variance)
        scale, bias = self._parameters(channels)
        output = (grouped - mean) * (jax.lax.rsqrt(variance + self.epsilon) * scale) + bias
        dtype = nn.dtypes.canonicalize_dtype(features, scale, bias, dtype=self.dtype)
        return output.reshape(features.shape).astype(dtype)


class GroupNorm(nn.GroupNorm):
    """Group normalisation (arXiv 1803.08494): over groups of channels of each image by itself.

    Attributes:
      num_groups: Number of groups that the channels are split into; must divide their number.
    """

    num_groups: int = 32
    epsilon: float = 1e-5

    @nn.compact
    def __call__(
        self, features: Float[Array, 'batch *spatial channel'], *, train: bool
    ) -> Float[Array, 'batch *spatial channel']:
        if features.shape[-1] % self.num_groups:
            raise ConfigError(
                f'norm.channel_groups is {self.num_groups}; it must divide the '
                f'{features.shape[-1]} channels of {"/".join(self.path)}'
            )
        return super().__call__(features.astype(float32_or_wider(features.dtype)))


# The kinds of norm, and the options that each of them takes with the attribute that it sets.
NORMS: dict[str, tuple[Callable[..., nn.Module], dict[str, str]]] = {
    'batch': (BatchNorm, {'group_size': 'group_size'}),
    'group': (GroupNorm, {'channel_groups': 'num_groups'}),
    'frozen': (partial(BatchNorm, frozen=True), {}),
}
NORM_OPTIONS = sorted({option for _, options in NORMS.values() for option in options})


def parse_norm(entry: Any) -> Callable[..., nn.Module]:
    """Reads the `norm` setting of a network.

    Args:
      entry: None for batch normalisation over the whole batch; or a mapping with the key `kind`:
        'batch' with the option `group_size` (images, None for all: see BatchNorm), 'group' with the
        option `channel_groups` (default 32), or 'frozen'. An option that is None is its default.

    Returns:
      What makes the module: a function of `dtype`, `name` and `scale_init`.

    Raises:
      ConfigError: An unknown key or kind, an option that this kind does not have, or a value of the
        wrong kind.
    """
    if entry is None:
        return BatchNorm
    if callable(entry):
        return entry
    if not hasattr(entry, 'items'):
        raise ConfigError(f"norm must be a mapping such as {{'kind': 'group'}}, got {entry!r}")
    given = {key: value for key, value in entry.items() if value is not None}
    kind = given.pop('kind', 'batch')
    check_choice('norm.kind', kind, tuple(NORMS))
    module, known = NORMS[kind]
    for option, value in given.items():
        if option not in NORM_OPTIONS:
            raise ConfigError(unknown_name('option of norm', option, ('kind', *NORM_OPTIONS)))
        if option not in known:
            kinds = ' or '.join(
                repr(name) for name, (_, options) in NORMS.items() if option in options
            )
            raise ConfigError(
                f'norm.{option} is {value!r}, but norm.kind is {kind!r}; '
                f'leave it unset, or choose {kinds}'
            )
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f'norm.{option} is {value!r}; it must be a whole number from 1')
    attributes = {known[option]: value for option, value in given.items()}
    return partial(module, **attributes) if attributes else module


class StochasticDepth(nn.Module):
    """Drops a residual branch for a whole image with probability `rate` (arXiv 1603.09382).

    What is kept is scaled by `1 / (1 - rate)`. Draws from the random stream 'dropout'.
    """

    rate: float

    @nn.compact
    def __call__(
        self, features: Float[Array, 'batch *spatial channel'], *, train: bool
    ) -> Float[Array, 'batch *spatial channel']:
        if not train or self.rate == 0.0:
            return features
        keep = 1.0 - self.rate
        shape = (features.shape[0],) + (1,) * (features.ndim - 1)
        kept = jax.random.bernoulli(self.make_rng('dropout'), keep, shape)
        return jnp.where(kept, features / jnp.asarray(keep, features.dtype), 0)


def global_average_pool(
    features: Float[Array, 'batch height width channel'],
) -> Float[Array, 'batch channel']:
    """The mean over all positions, in float32."""
    return features.mean(axis=(1, 2), dtype=jnp.float32)


def linear_rates(final: float, count: int) -> list[float]:
    """Stochastic depth rates: linear from 0 at the first block to `final` at the last."""
    return [final * index / max(1, count - 1) for index in range(count)]


def check_images(images: Any, network: str) -> None:
    """Raises unless `images` is a floating-point `[batch, height, width, channel]`."""
    dtype = getattr(images, 'dtype', None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f'{network}: images must be a floating-point array, got '
            f'{dtype or type(images).__name__}; scale to 0..1 and normalise with the mean and std '
            'of model_entry(name).preprocessing'
        )
    if images.ndim != 4 or 0 in images.shape[1:]:
        raise ValueError(
            f'{network}: images must be [batch, height, width, channel], got shape {images.shape}; '
            'for one image add a batch dimension with images[None]'
        )
