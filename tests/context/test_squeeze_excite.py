"""SqueezeExcite against plain numpy, written from the paper's equations."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from gcnet_jax.context.squeeze_excite import SqueezeExcite
from gcnet_jax.errors import ConfigError

SPATIAL = [(7,), (3, 4), (2, 2, 3)]
CHANNELS = 8
BLOCK = SqueezeExcite(ratio=1 / 2)


def make_input(spatial):
    generator = np.random.default_rng(0)
    features = generator.normal(size=(2, *spatial, CHANNELS)).astype(np.float32)
    mask = generator.random((2, *spatial)) < 0.6
    mask.reshape(2, -1)[:, 0] = True
    return features, mask


def apply(variables, features, mask=None):
    return jax.jit(BLOCK.apply)(variables, features, mask)


def numpy_squeeze_excite(variables, features, mask):
    reduce, expand = (
        jax.tree.map(np.float64, variables['params'][name]) for name in ('reduce', 'expand')
    )
    output = np.float64(features)
    for index, image in enumerate(np.float64(features)):
        seen = image.reshape(-1, CHANNELS) if mask is None else image[mask[index]]
        hidden = np.maximum(seen.mean(0) @ reduce['kernel'] + reduce['bias'], 0)
        output[index] *= 1 / (1 + np.exp(-(hidden @ expand['kernel'] + expand['bias'])))
    return output


@pytest.mark.parametrize('spatial', SPATIAL)
def test_agrees_with_numpy(spatial, random_variables):
    features, mask = make_input(spatial)
    variables = random_variables(BLOCK, features)
    for given in (None, mask):
        expected = numpy_squeeze_excite(variables, features, given)
        output = apply(variables, features, given)
        np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)


def test_padded_images_give_what_each_gives_alone(random_variables):
    features, _ = make_input((4, 5))
    variables = random_variables(BLOCK, features)
    padded, mask = features.copy(), np.ones(features.shape[:-1], bool)
    padded[:, 3:], mask[:, 3:] = np.nan, False
    together = apply(variables, padded, mask)[:, :3]
    np.testing.assert_allclose(together, apply(variables, features[:, :3]), rtol=1e-5)


def test_gradients_agree_with_finite_differences(random_variables):
    features, mask = make_input((2, 3))
    variables = random_variables(BLOCK, features)
    check_grads(
        jax.jit(lambda variables, features: BLOCK.apply(variables, features, mask)),
        (variables, features),
        order=1,
        modes=['rev'],
        atol=2e-2,
        rtol=2e-2,
        eps=1e-2,
    )


def test_bfloat16_is_near_float32(random_variables):
    features, mask = make_input((3, 4))
    variables = random_variables(BLOCK, features)
    output = apply(variables, features.astype(jnp.bfloat16), mask)
    assert output.dtype == jnp.bfloat16
    exact = numpy_squeeze_excite(variables, features, mask)
    assert np.abs(np.float32(output) - exact).max() < 2e-2 * np.abs(exact).max()


@pytest.mark.parametrize(
    ('options', 'hidden'),
    [
        ({}, 2),
        ({'rounding': 'nearest'}, 3),
        ({'ratio': 1 / 4}, 10),
        ({'hidden_channels': 7}, 7),
        ({'ratio': 1 / 100}, 1),
    ],
)
def test_width_of_the_bottleneck(options, hidden):
    features = jnp.ones((1, 2, 40))
    variables = jax.eval_shape(SqueezeExcite(**options).init, jax.random.key(0), features)
    assert variables['params']['reduce']['kernel'].shape == (40, hidden)
    assert variables['params']['expand']['kernel'].shape == (hidden, 40)


def test_activation_is_used(random_variables):
    features, _ = make_input((3, 4))
    variables = random_variables(BLOCK, features)
    other = SqueezeExcite(ratio=1 / 2, activation=nn.silu).apply(variables, features)
    assert np.abs(other - apply(variables, features)).max() > 1e-3


def test_bad_options_and_input():
    with pytest.raises(ConfigError, match='did you mean 1/16'):
        SqueezeExcite(ratio=16).init(jax.random.key(0), jnp.ones((1, 2, 4)))
    with pytest.raises(TypeError, match='SqueezeExcite: features must be a floating'):
        BLOCK.init(jax.random.key(0), jnp.ones((1, 2, 4), jnp.int32))
    with pytest.raises(TypeError, match='SqueezeExcite: mask must be a boolean'):
        BLOCK.init(jax.random.key(0), jnp.ones((1, 2, 4)), jnp.ones((1, 2)))


def test_defaults_are_a_sixteenth_of_the_channels_in_the_type_of_the_features():
    features = jnp.ones((1, 3, 64), jnp.bfloat16)
    output, variables = SqueezeExcite().init_with_output(jax.random.key(0), features)
    assert variables['params']['reduce']['kernel'].shape == (64, 4)
    assert output.dtype == jnp.bfloat16
    traced = str(jax.make_jaxpr(SqueezeExcite().apply)(variables, features))
    products = [line for line in traced.splitlines() if 'dot_general' in line]
    assert len(products) == 2
    assert all(':bf16[' in line for line in products)
