"""Max pooling, with a gradient in the form that the device it is compiled for does best.

Pooling is a primitive; with the features given, its derivative is linear: it takes from each window
the tangent at the first of its maxima. That and its transpose, which puts each window's gradient
there, are primitives too.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad
from jaxtyping import Array, Float

from gcnet_jax.ops.primitives import make_primitive

Features = Float[Array, 'batch height width channel']
Pooled = Float[Array, 'batch half_height half_width channel']

AROUND = ((0, 0), (1, 1), (1, 1), (0, 0))


def max_pool(features: Features) -> Pooled:
    """Maximum over 3x3 windows at stride 2, padded by one on each side."""
    return maximum.bind(features)


def plain_max_pool(features: Features) -> Pooled:
    """The maximum as XLA has it."""
    lowest = -jnp.inf
    return jax.lax.reduce_window(features, lowest, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), AROUND)


def _padded_max_pool(features: Features) -> Pooled:
    """The maximum without padding in it, which converters to ONNX do not take."""
    padded = jnp.pad(features, AROUND, constant_values=-jnp.inf)
    return nn.max_pool(padded, window_shape=(3, 3), strides=(2, 2), padding='VALID')


def _plain_at_maxima(features: Features, tangent: Features) -> Pooled:
    return jax.jvp(plain_max_pool, (features,), (tangent,))[1]


def _plain_gradient_at_maxima(features: Features, gradient: Pooled) -> Features:
    return jax.vjp(plain_max_pool, features)[1](gradient)[0]


def _cpu_gradient_at_maxima(features: Features, gradient: Pooled) -> Features:
    """Gives each window's gradient to the first of its maxima, as XLA does.

    The nine places of a window are compared one after the other, for all windows at once; XLA's
    scatter, which goes from window to window, takes about ten times as long.
    """
    height, width = features.shape[1:3]
    out_height, out_width = gradient.shape[1:3]
    lowest = -jnp.inf
    # As large as the windows reach, and one more so that its gradient has the same size.
    edges = [(1, 2 * out - size + 1) for out, size in ((out_height, height), (out_width, width))]
    padded = jnp.pad(features, ((0, 0), *edges, (0, 0)), constant_values=lowest)
    places = [
        padded[:, row : row + 2 * out_height - 1 : 2, column : column + 2 * out_width - 1 : 2]
        for row in range(3)
        for column in range(3)
    ]
    highest, chosen = places[0], jnp.zeros(gradient.shape, jnp.int8)
    for index, place in enumerate(places[1:], start=1):
        chosen = jnp.where(place > highest, jnp.int8(index), chosen)
        highest = jnp.maximum(highest, place)
    total = jnp.zeros_like(padded)
    zero = jnp.zeros((), gradient.dtype)
    for index in range(9):
        # Back to where the place was taken from.
        edges = [(first, 3 - first, 1) for first in divmod(index, 3)]
        share = jnp.where(chosen == index, gradient, zero)
        total += jax.lax.pad(share, zero, [(0, 0, 0), *edges, (0, 0, 0)])
    return total[:, 1 : height + 1, 1 : width + 1]


def _define_linear(primitive: Primitive, transpose: Primitive) -> None:
    """Defines the derivatives of an operation that is linear in its second input."""

    def rule(cotangent, features, values):
        if type(cotangent) is ad.Zero:
            return None, ad.Zero(values.aval)
        return None, transpose.bind(features, cotangent)

    ad.defjvp(primitive, None, lambda tangent, features, _: primitive.bind(features, tangent))
    ad.primitive_transposes[primitive] = rule


maximum = make_primitive(
    'max_pool', plain_max_pool, plain_max_pool, batched=(0,), standard=_padded_max_pool
)
at_maxima = make_primitive('max_pool_tangent', _plain_at_maxima, _plain_at_maxima, batched=(0, 1))
gradient_at_maxima = make_primitive(
    'max_pool_gradient', _plain_gradient_at_maxima, _cpu_gradient_at_maxima, batched=(0, 1)
)

# The places of the maxima do not depend on the features, but where two of them are equal.
ad.defjvp(maximum, lambda tangent, features: at_maxima.bind(features, tangent))
for one, other in ((at_maxima, gradient_at_maxima), (gradient_at_maxima, at_maxima)):
    _define_linear(one, transpose=other)
