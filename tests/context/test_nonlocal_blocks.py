"""NonLocal and SimplifiedNonLocal against plain numpy, written from the papers' equations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from gcnet_jax.context.nonlocal_blocks import MODES, NonLocal, SimplifiedNonLocal
from gcnet_jax.errors import ConfigError

SPATIAL = [(7,), (3, 4), (2, 2, 3)]
CHANNELS = 6
BLOCKS = [*(NonLocal(mode=mode) for mode in MODES), SimplifiedNonLocal()]
each_block = pytest.mark.parametrize(
    'block', BLOCKS, ids=lambda block: getattr(block, 'mode', 'simplified')
)


def make_input(spatial):
    generator = np.random.default_rng(0)
    features = generator.normal(size=(2, *spatial, CHANNELS)).astype(np.float32)
    mask = generator.random((2, *spatial)) < 0.6
    mask.reshape(2, -1)[:, 0] = True
    return features, mask


def apply(block, variables, features, mask=None):
    return jax.jit(block.apply)(variables, features, mask)


def dense(parameters, x):
    return x @ np.float64(parameters['kernel']) + np.float64(parameters.get('bias', 0))


def softmax(logits):
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def nonlocal_weights(parameters, query, keys, mode, scaled):
    if mode == 'gaussian':
        return softmax(np.array([query @ key for key in keys]))
    q, k = dense(parameters['query'], query), [dense(parameters['key'], key) for key in keys]
    if mode == 'concatenation':
        pairs = [dense(parameters['concat'], np.concatenate([q, each]))[0] for each in k]
        return np.maximum(pairs, 0) / len(keys)
    products = np.array([q @ each for each in k])
    if mode == 'dot_product':
        return products / len(keys)
    return softmax(products / np.sqrt(len(q)) if scaled else products)


def numpy_nonlocal(variables, features, mask, mode, scaled=False):
    """One image and one query at a time, over the valid keys only."""
    parameters = variables['params']
    output = np.float64(features)
    for index, image in enumerate(np.float64(features)):
        keys = image.reshape(-1, CHANNELS) if mask is None else image[mask[index]]
        values = dense(parameters['value'], keys)
        for position in np.ndindex(image.shape[:-1]):
            weights = nonlocal_weights(parameters, image[position], keys, mode, scaled)
            output[(index, *position)] += dense(parameters['expand'], weights @ values)
    return output


def numpy_simplified(variables, features, mask):
    parameters = variables['params']
    output = np.float64(features)
    for index, image in enumerate(np.float64(features)):
        keys = image.reshape(-1, CHANNELS) if mask is None else image[mask[index]]
        weights = softmax(dense(parameters['pool']['logits'], keys)[:, 0])
        output[index] += dense(parameters['value'], weights @ keys)
    return output


def reference(block, variables, features, mask):
    if isinstance(block, SimplifiedNonLocal):
        return numpy_simplified(variables, features, mask)
    return numpy_nonlocal(variables, features, mask, block.mode, block.scaled)


@pytest.mark.parametrize('spatial', SPATIAL)
@each_block
def test_agrees_with_numpy(block, spatial, random_variables):
    features, mask = make_input(spatial)
    variables = random_variables(block, features)
    output = apply(block, variables, features)
    expected = reference(block, variables, features, None)
    assert output.dtype == jnp.float32
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)
    output = apply(block, variables, features, mask)
    expected = reference(block, variables, features, mask)
    np.testing.assert_allclose(output[mask], expected[mask], rtol=1e-4, atol=1e-5)


def test_scaled_divides_the_logits(random_variables):
    features, mask = make_input((3, 4))
    block = NonLocal(scaled=True)
    variables = random_variables(block, features)
    expected = numpy_nonlocal(variables, features, mask, 'embedded_gaussian', scaled=True)
    output = apply(block, variables, features, mask)
    np.testing.assert_allclose(output[mask], expected[mask], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('block', [NonLocal(), SimplifiedNonLocal()])
def test_starts_as_the_exact_identity(block):
    features, mask = make_input((3, 4))
    variables = jax.jit(block.init)(jax.random.key(0, impl='rbg'), features)
    np.testing.assert_array_equal(apply(block, variables, features, mask), features)


@pytest.mark.parametrize('block', [NonLocal(zero_init=False), SimplifiedNonLocal(zero_init=False)])
def test_without_zero_init_it_is_not_the_identity(block):
    features, _ = make_input((3, 4))
    output, _ = jax.jit(block.init_with_output)(jax.random.key(0, impl='rbg'), features)
    assert np.abs(output - features).max() > 1e-3


def test_projections_start_as_mmcvs():
    """Normal with a deviation of 0.01, so that the attention starts nearly even."""
    block = NonLocal(mode='concatenation')
    features = jnp.ones((1, 2, 64))
    params = jax.jit(block.init)(jax.random.key(0, impl='rbg'), features)['params']
    for name in ('query', 'key', 'value'):
        np.testing.assert_allclose(np.std(params[name]['kernel']), 0.01, rtol=0.1)
        np.testing.assert_allclose(np.mean(params[name]['kernel']), 0, atol=1e-3)


@each_block
def test_padded_images_give_what_each_gives_alone(block, random_variables):
    features, _ = make_input((4, 5))
    variables = random_variables(block, features)
    padded, mask = np.full_like(features, np.nan), np.zeros(features.shape[:-1], bool)
    corners = [np.s_[:3, :4], np.s_[1:, 1:]]
    for index, corner in enumerate(corners):
        padded[index][corner] = features[index][corner]
        mask[index][corner] = True

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def run(variables):
        output = block.apply(variables, padded, mask)
        return jnp.where(mask[..., None], output, 0).sum(), output

    gradients, together = jax.tree.map(np.asarray, run(variables))
    for index, corner in enumerate(corners):
        alone = apply(block, variables, features[index][corner][None])[0]
        np.testing.assert_allclose(together[index][corner], alone, rtol=1e-5, atol=1e-5)
    assert all(np.isfinite(gradient).all() for gradient in jax.tree.leaves(gradients))


@each_block
def test_gradients_agree_with_finite_differences(block, random_variables):
    features, mask = make_input((2, 3))
    variables = random_variables(block, features)
    check_grads(
        jax.jit(lambda variables, features: block.apply(variables, features, mask)),
        (variables, features),
        order=1,
        modes=['rev'],
        atol=2e-2,
        rtol=2e-2,
        eps=2e-3,
    )


@each_block
def test_bfloat16_is_near_float32(block, random_variables):
    features, mask = make_input((3, 4))
    variables = random_variables(block, features)
    exact = reference(block, variables, features, mask)
    output = apply(block, variables, features.astype(jnp.bfloat16), mask)
    assert output.dtype == jnp.bfloat16
    error = np.abs(np.float32(output) - exact)[mask]
    assert error.max() < 2e-2 * np.abs(exact[mask]).max()


@pytest.mark.parametrize('mode', ['gaussian', 'embedded_gaussian'])
def test_attention_can_be_read_out(mode, random_variables):
    features, mask = make_input((3, 4))
    block = NonLocal(mode=mode)
    variables = random_variables(block, features)
    mask[1, 2, 1] = True
    _, state = block.apply(variables, features, mask, mutable=['intermediates'])
    attention = np.asarray(state['intermediates']['attention'][0])
    assert attention.shape == (2, 3, 4, 3, 4)
    keys = np.float64(features[1][mask[1]])
    expected = nonlocal_weights(variables['params'], features[1, 2, 1], keys, mode, False)
    np.testing.assert_allclose(attention[1, 2, 1][mask[1]], expected, rtol=1e-4)
    assert not attention[1, 2, 1][~mask[1]].any()


def test_width_and_parameters():
    features = jax.ShapeDtypeStruct((1, 2, 2, 1024), jnp.float32)

    def count(block):
        variables = jax.eval_shape(block.init, jax.random.key(0, impl='rbg'), features)
        return sum(leaf.size for leaf in jax.tree.leaves(variables))

    assert count(NonLocal()) == 2_099_712
    assert 25_557_032 + count(NonLocal()) == 27_656_744  # The paper's 27.66 M: ResNet-50 + 1 NL.
    assert count(SimplifiedNonLocal()) == 1_050_625
    assert count(NonLocal(mode='gaussian')) == 2_099_712 - 2 * (1024 * 512 + 512)
    assert count(NonLocal(mode='concatenation')) == 2_099_712 + 2 * 512
    assert count(NonLocal(hidden_channels=3)) == 3 * (1024 * 3 + 3) + 3 * 1024 + 1024
    assert count(NonLocal(ratio=1 / 4)) == 3 * (1024 * 256 + 256) + 256 * 1024 + 1024


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'mode': 'embeded_gaussian'}, "did you mean 'embedded_gaussian'"),
        ({'mode': 'dot_product', 'scaled': True}, "mode='dot_product'"),
        ({'ratio': 2}, 'ratio must be in'),
        ({'hidden_channels': 0}, 'hidden_channels must be 1 or more'),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        NonLocal(**options).init(jax.random.key(0, impl='rbg'), jnp.ones((1, 2, 4)))


@pytest.mark.parametrize('block', [NonLocal(), SimplifiedNonLocal()])
def test_bad_input(block):
    with pytest.raises(TypeError, match=f'{type(block).__name__}: features must be a floating'):
        block.init(jax.random.key(0, impl='rbg'), jnp.ones((1, 2, 4), jnp.uint8))
    with pytest.raises(ValueError, match=f'{type(block).__name__}: features must be .batch'):
        block.init(jax.random.key(0, impl='rbg'), jnp.ones((2, 4)))
    with pytest.raises(ValueError, match=f'{type(block).__name__}: mask must be'):
        block.init(jax.random.key(0, impl='rbg'), jnp.ones((1, 2, 4)), jnp.ones((1, 3), bool))
