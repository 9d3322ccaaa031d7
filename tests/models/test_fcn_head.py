"""The heads of segmenters against the same sums in numpy, and their dropout."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcnet_jax.models.fcn_head import FCNHead
from gcnet_jax.models.layers import BatchNorm

pytestmark = pytest.mark.usefixtures('quick_compilation')
FEATURES = np.random.default_rng(0).normal(size=(2, 5, 7, 6)).astype(np.float32)


def conv_norm_relu(values, params, stats):
    """A 3x3 convolution with zeros around the map, the norm of a network in use, and ReLU."""
    padded = np.pad(values, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    values = np.einsum('bhwcyx,yxco->bhwo', windows, params['conv']['kernel'])
    norm, running = params['norm'], stats['norm']
    values = (values - running['mean']) / np.sqrt(running['var'] + 1e-5)
    return np.maximum(values * norm['scale'] + norm['bias'], 0)


def global_context(values, params):
    """The paper's block: attention over all positions, and a bottleneck that is added."""
    logits = values @ params['pool']['logits']['kernel']
    shares = np.exp(logits - logits.max((1, 2), keepdims=True))
    context = (values * shares / shares.sum((1, 2), keepdims=True)).sum((1, 2))
    add = params['add']
    hidden = context @ add['reduce']['kernel'] + add['reduce']['bias']
    hidden = hidden - hidden.mean(-1, keepdims=True)
    hidden = hidden / np.sqrt(np.square(hidden).mean(-1, keepdims=True) + 1e-5)
    hidden = np.maximum(hidden * add['norm']['scale'] + add['norm']['bias'], 0)
    return values + (hidden @ add['expand']['kernel'] + add['expand']['bias'])[:, None, None]


@pytest.mark.parametrize('context_ratio', [None, 1 / 2])
@pytest.mark.parametrize(('convolutions', 'concatenate'), [(2, True), (1, False), (3, False)])
def test_as_in_numpy(random_variables, context_ratio, convolutions, concatenate):
    head = FCNHead(
        4, 8, convolutions=convolutions, concatenate=concatenate, context_ratio=context_ratio
    )
    variables = random_variables(head, FEATURES, train=False)
    params, stats = variables['params'], variables['batch_stats']
    names = [f'conv{number}' for number in range(1, convolutions + 1)]
    names += ['conv_cat'] if concatenate else []
    assert {*params} == {*names, 'logits'} | ({'context'} if context_ratio else set())
    values = conv_norm_relu(FEATURES, params['conv1'], stats['conv1'])
    if context_ratio:
        assert params['context']['add']['reduce']['kernel'].shape == (8, 4)
        values = global_context(values, params['context'])
    for name in names[1:]:
        if name == 'conv_cat':
            values = np.concatenate([FEATURES, values], -1)
        values = conv_norm_relu(values, params[name], stats[name])
    expected = values @ params['logits']['kernel'] + params['logits']['bias']
    found = head.apply(variables, FEATURES, train=False)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def seen_through(random_variables, **options):
    """A head whose logits are the channels that its classifier reads, and variables of it."""
    head = FCNHead(
        16, 16, convolutions=1, concatenate=False, norm=partial(BatchNorm, frozen=True), **options
    )
    variables = random_variables(head, FEATURES, train=False)
    variables['params']['logits'] = {'kernel': np.eye(16, dtype=np.float32), 'bias': np.zeros(16)}
    # Nothing is zero for another reason.
    variables['params']['conv1']['norm']['bias'] = np.full(16, 9.0, np.float32)
    return head, variables


def test_whole_channels_are_dropped(random_variables):
    head, variables = seen_through(random_variables, dropout_rate=0.25)
    kept = np.asarray(head.apply(variables, FEATURES, train=False))
    assert kept.min() > 0
    dropped_in_all = []
    for seed in range(20):
        rngs = {'dropout': jax.random.key(seed)}
        found = np.asarray(head.apply(variables, FEATURES, train=True, rngs=rngs))
        is_dropped = (found == 0).all(axis=(1, 2))
        expected = np.where(is_dropped[:, None, None], 0, kept / 0.75)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        dropped_in_all.append(is_dropped)
    rate = np.mean(dropped_in_all)
    assert 0.2 < rate < 0.3
    # Images are drawn for each by itself.
    assert any((first != second).any() for first, second in dropped_in_all)


def test_without_a_rate_nothing_is_drawn(random_variables):
    head, variables = seen_through(random_variables, dropout_rate=0.0)
    np.testing.assert_array_equal(
        head.apply(variables, FEATURES, train=True), head.apply(variables, FEATURES, train=False)
    )


def test_bfloat16_keeps_parameters_and_logits_in_float32(random_variables):
    head = FCNHead(4, 8, context_ratio=1 / 2)
    variables = random_variables(head, FEATURES, train=False)
    half = FCNHead(4, 8, context_ratio=1 / 2, dtype=jnp.bfloat16)
    new = jax.eval_shape(lambda: half.init(jax.random.key(0), FEATURES, train=False))
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.float32.dtype}
    found, expected = (
        np.asarray(model.apply(variables, FEATURES, train=False)) for model in (half, head)
    )
    assert found.dtype == np.float32
    assert 0 < np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
