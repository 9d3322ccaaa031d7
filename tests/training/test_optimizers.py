import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gcnet_jax.errors import ConfigError
from gcnet_jax.training.optimizers import (
    OPTIMIZERS,
    decay_mask,
    make_optimizer,
    warmup_cosine,
    warmup_milestones,
    warmup_poly,
)

RNG = np.random.default_rng(0)
PARAMS = {
    'conv': {'kernel': RNG.normal(size=(3, 3, 2, 4))},
    'context': {'reduce': {'kernel': RNG.normal(size=(4, 2)), 'bias': RNG.normal(size=2)}},
    'norm': {'scale': RNG.normal(size=4), 'bias': RNG.normal(size=4)},
}
PARAMS = jax.tree.map(lambda leaf: leaf.astype(np.float32), PARAMS)
GRADIENTS = [
    jax.tree.map(lambda leaf: RNG.normal(size=leaf.shape).astype(np.float32), PARAMS)
    for _ in range(3)
]


def run(optimizer, gradients=GRADIENTS):
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_schedule_is_a_line_and_half_a_cosine():
    schedule = warmup_cosine(0.4, warmup_steps=4, total_steps=20, end_factor=0.1)
    for step in range(25):
        if step < 4:
            expected = 0.4 * (step + 1) / 5
        else:
            cosine = 0.5 * (1 + np.cos(np.pi * min(1, (step - 4) / 16)))
            expected = 0.4 * (0.1 + 0.9 * cosine)
        np.testing.assert_allclose(schedule(step), expected, rtol=1e-5)
    assert schedule(0) > 0
    np.testing.assert_allclose(schedule(4), 0.4)
    np.testing.assert_allclose(schedule(20), 0.04, rtol=1e-5)


def test_milestones_are_optaxs_piecewise_constant_schedule_after_the_warm_up():
    schedule = warmup_milestones(0.02, warmup_steps=4, milestones=(8, 11), factor=0.1)
    expected = optax.piecewise_constant_schedule(0.02, {8: 0.1, 11: 0.1})
    rates = [float(schedule(step)) for step in range(15)]
    np.testing.assert_allclose(rates[:4], [0.02 * (step + 1) / 5 for step in range(4)], rtol=1e-6)
    np.testing.assert_allclose(
        rates[4:], [float(expected(step)) for step in range(4, 15)], rtol=1e-6
    )
    assert rates[7] == pytest.approx(0.02)
    assert rates[8] == pytest.approx(0.002)
    assert rates[11] == pytest.approx(0.0002)


def test_decay_spares_norms_and_biases_but_not_context_kernels():
    assert decay_mask(PARAMS) == {
        'conv': {'kernel': True},
        'context': {'reduce': {'kernel': True, 'bias': False}},
        'norm': {'scale': False, 'bias': False},
    }


@pytest.mark.parametrize('nesterov', [True, False])
def test_sgd_is_the_textbook(nesterov):
    result = run(make_optimizer('sgd', 0.1, weight_decay=0.01, momentum=0.8, nesterov=nesterov))
    for path, start in jax.tree_util.tree_leaves_with_path(PARAMS):
        value, velocity = start.astype(np.float64), 0.0
        for step in range(3):
            gradient = dict(jax.tree_util.tree_leaves_with_path(GRADIENTS[step]))[path]
            gradient = gradient + 0.01 * value * (start.ndim > 1)
            velocity = 0.8 * velocity + gradient
            value = value - 0.1 * (gradient + 0.8 * velocity if nesterov else velocity)
        actual = dict(jax.tree_util.tree_leaves_with_path(result))[path]
        np.testing.assert_allclose(actual, value, rtol=1e-4, atol=1e-6)


def test_adamw_is_the_textbook():
    result = run(
        make_optimizer('adamw', 0.1, weight_decay=0.01, beta1=0.8, beta2=0.9, epsilon=1e-3)
    )
    for path, start in jax.tree_util.tree_leaves_with_path(PARAMS):
        value, first, second = start.astype(np.float64), 0.0, 0.0
        for step in range(3):
            gradient = dict(jax.tree_util.tree_leaves_with_path(GRADIENTS[step]))[path]
            first = 0.8 * first + 0.2 * gradient
            second = 0.9 * second + 0.1 * gradient**2
            corrected = first / (1 - 0.8 ** (step + 1))
            scale = np.sqrt(second / (1 - 0.9 ** (step + 1))) + 1e-3
            value = value - 0.1 * (corrected / scale + 0.01 * value * (start.ndim > 1))
        actual = dict(jax.tree_util.tree_leaves_with_path(result))[path]
        np.testing.assert_allclose(actual, value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ('name', 'reference'),
    [
        ('sgd', optax.sgd(0.1, momentum=0.9, nesterov=True)),
        ('adamw', optax.adamw(0.1, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)),
        ('lamb', optax.lamb(0.1, b1=0.9, b2=0.999, eps=1e-6)),
        (
            'lars',
            optax.lars(0.1, momentum=0.9, trust_coefficient=1e-3, trust_ratio_mask=decay_mask),
        ),
    ],
)
def test_defaults_are_those_of_the_papers_and_optax(name, reference):
    results = run(make_optimizer(name, 0.1)), run(reference)
    jax.tree.map(lambda *leaves: np.testing.assert_allclose(*leaves, rtol=1e-6), *results)


def test_lars_scales_by_the_ratio_of_norms_for_kernels_only():
    options = {'weight_decay': 0.01, 'momentum': 0.0, 'trust_coefficient': 0.02}
    result = run(make_optimizer('lars', 0.1, **options), GRADIENTS[:1])
    for path, start in jax.tree_util.tree_leaves_with_path(PARAMS):
        gradient = dict(jax.tree_util.tree_leaves_with_path(GRADIENTS[0]))[path]
        rate = 0.1
        if start.ndim > 1:
            gradient = gradient + 0.01 * start
            rate *= 0.02 * np.linalg.norm(start) / np.linalg.norm(gradient)
        actual = dict(jax.tree_util.tree_leaves_with_path(result))[path]
        np.testing.assert_allclose(actual, start - rate * gradient, rtol=1e-4, atol=1e-6)


def test_lamb_moves_a_leaf_by_its_own_norm():
    result = run(make_optimizer('lamb', 0.1, weight_decay=0.0), GRADIENTS[:1])
    for path, start in jax.tree_util.tree_leaves_with_path(PARAMS):
        moved = dict(jax.tree_util.tree_leaves_with_path(result))[path] - start
        np.testing.assert_allclose(np.linalg.norm(moved), 0.1 * np.linalg.norm(start), rtol=1e-4)


@pytest.mark.parametrize('name', sorted(OPTIMIZERS))
def test_decay_changes_kernels_only_whatever_the_optimizer(name):
    zero = [jax.tree.map(np.zeros_like, PARAMS)]
    result = run(make_optimizer(name, 0.1, weight_decay=0.1), zero)
    for path, start in jax.tree_util.tree_leaves_with_path(PARAMS):
        same = np.array_equal(dict(jax.tree_util.tree_leaves_with_path(result))[path], start)
        assert same == (start.ndim == 1)


def test_clipping_bounds_the_norm_of_the_whole_gradient():
    norm = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(GRADIENTS[0])))
    options = {'momentum': 0.0, 'nesterov': False}
    clipped = run(make_optimizer('sgd', 1.0, clip_norm=0.5, **options), GRADIENTS[:1])
    kernel = PARAMS['conv']['kernel'] - GRADIENTS[0]['conv']['kernel'] * 0.5 / norm
    np.testing.assert_allclose(clipped['conv']['kernel'], kernel, rtol=1e-5)
    free = run(make_optimizer('sgd', 1.0, clip_norm=2 * norm, **options), GRADIENTS[:1])
    kernel = PARAMS['conv']['kernel'] - GRADIENTS[0]['conv']['kernel']
    np.testing.assert_allclose(free['conv']['kernel'], kernel, rtol=1e-5)


def test_an_unknown_optimizer_or_option_is_refused():
    with pytest.raises(ConfigError, match="'adamw'"):
        make_optimizer('adam', 0.1)
    with pytest.raises(ConfigError, match='it takes momentum, nesterov'):
        make_optimizer('sgd', 0.1, beta1=0.5)
    make_optimizer('sgd', 0.1, beta1=None)


NETWORK = {
    'stem_conv': {'kernel': PARAMS['conv']['kernel']},
    'stage1_0': {'conv1': {'kernel': PARAMS['context']['reduce']['kernel']}},
    'stage2_0': {'norm1': PARAMS['norm']},
    'classifier': {'bias': PARAMS['norm']['bias']},
}
RATES = {'stem_conv': 0.125, 'stage1_0': 0.25, 'stage2_0': 0.5, 'classifier': 1.0}


def run_network(name, rate, steps=3, **options):
    optimizer = make_optimizer(name, rate, weight_decay=0.1, **options)
    params = jax.tree.map(jnp.asarray, NETWORK)
    state = optimizer.init(params)
    for step in range(steps):
        gradient = jax.tree.map(lambda leaf, step=step: jnp.cos(step + 3 * leaf), NETWORK)
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize('name', sorted(OPTIMIZERS))
def test_layer_decay_gives_each_layer_the_rate_of_its_depth(name):
    """Each layer against a run of the whole network at that layer's rate."""
    decayed, _ = run_network(name, 0.2, layer_decay=0.5, clip_norm=1.0)
    for module, rate in RATES.items():
        alone, _ = run_network(name, 0.2 * rate, clip_norm=1.0)
        for one, two in zip(
            jax.tree.leaves(decayed[module]), jax.tree.leaves(alone[module]), strict=True
        ):
            np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-7)


def test_layers_of_a_backbone_have_the_rates_they_have_without_a_head():
    heads = dict.fromkeys(('head', 'auxiliary_head'), NETWORK['classifier'])
    network = {'backbone': {k: v for k, v in NETWORK.items() if k != 'classifier'}, **heads}
    updates = {}
    for decay in (None, 0.5):
        optimizer = make_optimizer('sgd', 0.1, momentum=0.0, nesterov=False, layer_decay=decay)
        updates[decay] = optimizer.update(network, optimizer.init(network), network)[0]
    for path, one in jax.tree_util.tree_leaves_with_path(updates[0.5]):
        rate = RATES.get(path[1].key, 1.0)
        whole = dict(jax.tree_util.tree_leaves_with_path(updates[None]))[path]
        np.testing.assert_allclose(one, rate * whole, rtol=1e-6)


@pytest.mark.parametrize('name', ['sgd', 'adamw'])
def test_layer_decay_is_a_smaller_rate_in_the_textbook(name):
    options = {'momentum': 0.0, 'nesterov': False} if name == 'sgd' else {'epsilon': 1e-3}
    decayed, _ = run_network(name, 0.2, steps=1, layer_decay=0.5, **options)
    for module, rate in RATES.items():
        for one, start in zip(
            jax.tree.leaves(decayed[module]), jax.tree.leaves(NETWORK[module]), strict=True
        ):
            gradient = np.cos(3 * start)
            decay = 0.1 * start * (start.ndim > 1)
            step = gradient if name == 'sgd' else gradient / (np.abs(gradient) + 1e-3)
            np.testing.assert_allclose(one, start - 0.2 * rate * (step + decay), atol=1e-5)


@pytest.mark.parametrize('name', sorted(OPTIMIZERS))
def test_frozen_parameters_have_no_update_and_no_state(name):
    frozen = ('stem*', 'stage1_0', 'classifier/bias')
    params, state = run_network(name, 0.2, frozen=frozen, layer_decay=0.5)
    for module in ('stem_conv', 'stage1_0', 'classifier'):
        jax.tree.map(np.testing.assert_array_equal, params[module], NETWORK[module])
    assert not np.array_equal(params['stage2_0']['norm1']['scale'], PARAMS['norm']['scale'])
    assert all(leaf.shape in ((), (4,)) for leaf in jax.tree.leaves(state))
    with pytest.raises(ConfigError, match="'stage9', which matches no parameter"):
        run_network(name, 0.2, frozen='stage9')
    # The gradient is clipped by the norm of what is trained.
    free, _ = run_network(name, 0.2, frozen=frozen, clip_norm=1e9, layer_decay=0.5)
    jax.tree.map(np.testing.assert_array_equal, free, params)


@pytest.mark.parametrize('power', [0.9, 2.0])
def test_poly_is_mmsegmentations_recursion_after_the_warm_up(power):
    """mmengine's PolyLR steps from one rate to the next; over one step less, as it counts them."""
    schedule = warmup_poly(0.01, warmup_steps=5, total_steps=40, power=power, end_factor=0.01)
    rates = [float(schedule(step)) for step in range(45)]
    np.testing.assert_allclose(rates[:5], [0.01 * (step + 1) / 6 for step in range(5)], rtol=1e-6)
    rate, end, steps = 0.01, 1e-4, 35
    for step in range(5, 41):
        np.testing.assert_allclose(rates[step], rate, rtol=1e-4)
        left = steps - (step - 5)
        if left:
            rate = (rate - end) * (1 - 1 / left) ** power + end
    np.testing.assert_allclose(rates[40:], 1e-4, rtol=1e-5)
