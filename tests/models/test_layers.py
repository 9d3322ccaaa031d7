"""The kinds of norm, against numpy, and that every network takes them everywhere."""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcnet_jax.errors import ConfigError
from gcnet_jax.models import create_model
from gcnet_jax.models.efficientnet import EfficientStage
from gcnet_jax.models.layers import (
    BatchNorm,
    Conv,
    GroupNorm,
    StochasticDepth,
    check_images,
    global_average_pool,
    parse_norm,
)

SMALL = {
    'gccnn': {'widths': (8, 16), 'stage_sizes': (1, 1), 'context': None},
    'resnet50': {'widths': (8, 8, 8, 8), 'stage_sizes': (1, 1, 1, 1)},
    'gcresnet50t': {
        'widths': (32, 32),
        'stage_sizes': (1, 1),
        'stem_widths': (8, 8),
        'context': None,
    },
    'gcresnet33ts': {'widths': (32, 32), 'stage_sizes': (1, 1), 'head_width': 8, 'context': None},
    'gc_efficientnetv2_rw_t': {
        'stages': [
            EfficientStage('conv', 1, 8, 1),
            EfficientStage('edge', 1, 16, 2, 4),
            EfficientStage('inverted', 1, 16, 1, 4),
        ],
        'stem_width': 8,
        'head_width': 8,
    },
}


def values(*shape, seed=0):
    return np.random.default_rng(seed).normal(1.5, 2, shape).astype(np.float32)


def variables(channels=6):
    rng = np.random.default_rng(1)
    draw = {name: rng.uniform(0.5, 2, channels) for name in ('scale', 'bias', 'mean', 'var')}
    draw = {name: value.astype(np.float32) for name, value in draw.items()}
    return {
        'params': {name: draw[name] for name in ('scale', 'bias')},
        'batch_stats': {name: draw[name] for name in ('mean', 'var')},
    }


def normalized(features, axes, held, epsilon=1e-5):
    """The formula of every norm in float64; the last axis is the channel."""
    features = features.astype(np.float64)
    mean, var = features.mean(axes, keepdims=True), features.var(axes, keepdims=True)
    scale, bias = held['params']['scale'], held['params']['bias']
    return (features - mean) / np.sqrt(var + epsilon) * scale + bias


@pytest.mark.parametrize('spatial', [(5, 4), (7,)])
@pytest.mark.parametrize('size', [2, 4, 8])
def test_groups_of_the_batch_have_their_own_statistics(spatial, size):
    features, held = values(8, *spatial, 6), variables()
    model = BatchNorm(group_size=size)
    actual, changed = model.apply(held, features, train=True, mutable=['batch_stats'])
    parts = [features[start : start + size] for start in range(0, 8, size)]
    axes = tuple(range(len(spatial) + 1))
    expected = np.concatenate([normalized(part, axes, held) for part in parts])
    np.testing.assert_allclose(actual, expected, atol=2e-5)
    new, old = changed['batch_stats'], held['batch_stats']
    mean = np.mean([part.mean(axes, dtype=np.float64) for part in parts], axis=0)
    var = np.mean([part.var(axes, dtype=np.float64) for part in parts], axis=0)
    np.testing.assert_allclose(new['mean'], 0.9 * old['mean'] + 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(new['var'], 0.9 * old['var'] + 0.1 * var, rtol=1e-5)


def test_one_group_of_the_whole_batch_is_ordinary_batch_normalization():
    features, held = values(8, 3, 3, 6), variables()
    one, two = (
        BatchNorm(group_size=size).apply(held, features, train=True, mutable=['batch_stats'])
        for size in (8, None)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), one, two)


def test_evaluation_uses_the_running_statistics_whatever_the_groups():
    features, held = values(3, 4, 4, 6), variables()
    stats = held['batch_stats']
    expected = (features - stats['mean']) / np.sqrt(stats['var'] + 1e-5)
    expected = expected * held['params']['scale'] + held['params']['bias']
    for model in (BatchNorm(group_size=2), BatchNorm(frozen=True), BatchNorm()):
        actual = model.apply(held, features, train=False)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_frozen_statistics_are_used_and_kept_in_training_while_scale_and_bias_learn():
    features, held = values(4, 3, 3, 6), variables()
    stats, size = held['batch_stats'], features.size / 6

    def loss(params):
        output, changed = BatchNorm(frozen=True).apply(
            held | {'params': params}, features, train=True, mutable=['batch_stats']
        )
        return output.sum(), (output, changed)

    (_, (output, changed)), gradient = jax.value_and_grad(loss, has_aux=True)(held['params'])
    plain = (features.astype(np.float64) - stats['mean']) / np.sqrt(stats['var'] + 1e-5)
    expected = plain * held['params']['scale'] + held['params']['bias']
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, changed['batch_stats'], stats)
    np.testing.assert_allclose(gradient['scale'], plain.sum((0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(gradient['bias'], np.full(6, size), rtol=1e-6)


@pytest.mark.parametrize('frozen', [False, True])
def test_statistics_that_are_not_there_are_told_by_flax(frozen):
    features = np.ones((4, 6), np.float32)
    params = {'params': {'scale': np.ones(6), 'bias': np.zeros(6)}}
    with pytest.raises(flax.errors.ScopeCollectionNotFound, match='mean'):
        BatchNorm(frozen=frozen).apply(params, features, train=frozen)


@pytest.mark.parametrize('frozen', [False, True])
@pytest.mark.parametrize('train', [False, True])
def test_the_normalisation_can_be_left_to_the_caller(frozen, train, random_variables):
    norm = BatchNorm(frozen=frozen)
    features = np.random.default_rng(0).normal(3.0, 2.0, (4, 3, 5, 6)).astype(np.float32)
    variables = random_variables(norm, features, train=False)
    options = {'train': train, 'mutable': ['batch_stats']}
    expected, expected_statistics = norm.apply(variables, features, **options)
    (mean, scale, shift), statistics = norm.apply(variables, features, normalize=False, **options)
    assert mean.shape == scale.shape == shift.shape == (6,)
    np.testing.assert_allclose((features - mean) * scale + shift, expected, rtol=1e-5, atol=1e-6)
    for leaf, other in zip(*map(jax.tree.leaves, (statistics, expected_statistics)), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-6)


@pytest.mark.parametrize('groups', [1, 2, 6])
@pytest.mark.parametrize('train', [True, False])
def test_group_normalization_sees_one_image_at_a_time(groups, train):
    features, held = values(3, 4, 5, 6), variables()
    held = {'params': held['params']}
    split = features.reshape(3, 4, 5, groups, 6 // groups)
    ones = {'params': {'scale': 1.0, 'bias': 0.0}}
    plain = normalized(split, (1, 2, 4), ones).reshape(features.shape)
    expected = plain * held['params']['scale'] + held['params']['bias']
    actual = GroupNorm(num_groups=groups).apply(held, features, train=train)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize('model', [BatchNorm(group_size=2), GroupNorm(2), BatchNorm(frozen=True)])
def test_statistics_are_float32_whatever_the_type_of_the_computation(model):
    narrow = model.clone(dtype=jnp.bfloat16)
    features = values(4, 6, 6, 6) + 100  # Squares of these have too few digits in bfloat16.
    held = jax.tree.map(np.asarray, narrow.init(jax.random.key(0), features, train=True))
    assert {leaf.dtype for leaf in jax.tree.leaves(held)} == {np.dtype('float32')}
    output, _ = narrow.apply(held, features, train=True, mutable=['batch_stats'])
    assert output.dtype == jnp.bfloat16
    whole, _ = model.apply(held, features, train=True, mutable=['batch_stats'])
    np.testing.assert_allclose(output.astype(np.float32), whole, rtol=1e-2, atol=1e-2)


def norms_of(name, norm, **options):
    """The variables' shapes, and every norm that a training step of a network calls."""
    model = create_model(name, norm=norm, num_classes=3, **SMALL[name], **options)
    found = {}  # By path: super().__call__ comes by a second time.

    def watch(call, arguments, keywords, context):
        if isinstance(context.module, (nn.BatchNorm, nn.GroupNorm)):
            found[context.module.path] = context.module
        return call(*arguments, **keywords)

    images = jnp.zeros((4, 32, 32, 3))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    with nn.intercept_methods(watch):
        jax.eval_shape(
            lambda held: model.apply(held, images, train=True, mutable=['batch_stats']), shapes
        )
    return shapes, list(found.values())


@pytest.mark.parametrize('name', SMALL)
def test_every_norm_of_a_network_is_the_one_that_was_asked_for(name):
    plain, norms = norms_of(name, None)
    assert {(norm.group_size, norm.frozen) for norm in norms} == {(None, False)}
    assert len(norms) >= 3
    for norm, expected in (
        ({'kind': 'batch', 'group_size': 2}, (2, False)),
        ({'kind': 'frozen', 'group_size': None}, (None, True)),
    ):
        shapes, found = norms_of(name, norm)
        assert {(norm.group_size, norm.frozen) for norm in found} == {expected}
        assert len(found) == len(norms)
        assert shapes == plain  # What a checkpoint holds does not depend on it.
    shapes, found = norms_of(name, {'kind': 'group', 'channel_groups': 4})
    assert {(type(norm), norm.num_groups) for norm in found} == {(GroupNorm, 4)}
    assert len(found) == len(norms)
    assert 'batch_stats' not in shapes
    assert jax.tree.structure(shapes['params']) == jax.tree.structure(plain['params'])


@pytest.mark.parametrize('kind', ['batch', 'group', 'frozen'])
def test_zero_initialisation_reaches_every_kind(kind):
    options = {'channel_groups': 4} if kind == 'group' else {}
    _, norms = norms_of('gccnn', {'kind': kind, **options}, zero_init_residual=True)
    zero = {norm.name: norm.scale_init is nn.initializers.zeros for norm in norms}
    assert zero == {'norm1': False, 'norm2': True, 'shortcut_norm': False}


def test_the_default_is_batch_normalization_over_the_whole_batch():
    assert create_model('resnet50', norm={'kind': 'batch'}) == create_model('resnet50')
    assert parse_norm({'kind': 'group', 'channel_groups': None})().num_groups == 32


@pytest.mark.parametrize(
    ('norm', 'message'),
    [
        ({'kind': 'bach'}, "unknown norm.kind 'bach'; did you mean 'batch'"),
        ({'size': 3}, "unknown option of norm 'size'"),
        ({'group_size': 0}, r'norm.group_size is 0; it must be a whole number from 1'),
        ({'group_size': 2.0}, r'norm.group_size is 2.0; it must be a whole number from 1'),
        ({'channel_groups': 4}, "channel_groups is 4, but norm.kind is 'batch'; .*'group'"),
        ({'kind': 'frozen', 'group_size': 4}, "but norm.kind is 'frozen'; .* choose 'batch'"),
        ('group', "norm must be a mapping .* got 'group'"),
    ],
)
def test_wrong_norms_are_refused(norm, message):
    with pytest.raises(ConfigError, match=message):
        create_model('resnet50', norm=norm)


def test_groups_that_do_not_come_out_even_are_refused():
    features = values(6, 3, 3, 6)
    with pytest.raises(ConfigError, match=r'norm.group_size is 4; it must divide the 6 images'):
        BatchNorm(group_size=4).apply(variables(), features, train=True, mutable=['batch_stats'])
    model = create_model('gccnn', norm={'kind': 'group'}, **SMALL['gccnn'])
    with pytest.raises(ConfigError, match=r'must divide the 8 channels of stage1_0/.*norm'):
        model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False)


def test_stochastic_depth_drops_whole_images_at_its_rate_and_keeps_the_mean():
    features = np.ones((4000, 3, 2), np.float32)
    output = StochasticDepth(0.3).apply(
        {}, features, train=True, rngs={'dropout': jax.random.key(0)}
    )
    images = np.asarray(output).reshape(4000, -1)
    kept = images[:, 0] > 0
    np.testing.assert_allclose(images, np.where(kept, 1 / 0.7, 0)[:, None].repeat(6, 1), rtol=1e-6)
    # Four standard deviations of the binomial distribution.
    assert abs(kept.mean() - 0.7) < 4 * np.sqrt(0.3 * 0.7 / 4000)
    np.testing.assert_array_equal(StochasticDepth(0.3).apply({}, features, train=False), features)


@pytest.mark.parametrize(
    ('name', 'sizes', 'expected'),
    [
        ('resnet50', (1, 2, 2), [0, 0.1, 0.2, 0.3, 0.4]),
        ('resnet18', (2, 1), [0, 0.2, 0.4]),
        ('gcresnet50t', (1, 2, 2), [0, 0.1, 0.2, 0.3, 0.4]),
    ],
)
def test_the_rate_of_stochastic_depth_grows_linearly_to_the_last_block(name, sizes, expected):
    options = SMALL.get(name, SMALL['gccnn']) | {'stage_sizes': sizes, 'widths': (32,) * len(sizes)}
    assert depth_rates(create_model(name, stochastic_depth_rate=0.4, **options)) == pytest.approx(
        expected
    )


def test_the_rate_of_an_efficientnet_stops_one_block_short_of_the_end():
    """timm's rule; the third block of four has no shortcut that could be dropped."""
    stages = [EfficientStage('conv', 2, 24, 1), EfficientStage('inverted', 2, 8, 2, 2)]
    options = SMALL['gc_efficientnetv2_rw_t'] | {'stages': stages, 'stem_width': 24}
    model = create_model('gc_efficientnetv2_rw_t', stochastic_depth_rate=0.4, **options)
    assert depth_rates(model) == pytest.approx([0, 0.1, 0.3])


def depth_rates(model):
    """The rate of every StochasticDepth that a training step calls, in order."""
    rates = []

    def watch(method, args, keywords, context):
        if isinstance(context.module, StochasticDepth) and context.method_name == '__call__':
            rates.append(context.module.rate)
        return method(*args, **keywords)

    rngs = {'params': jax.random.key(0), 'dropout': jax.random.key(1)}
    with nn.intercept_methods(watch):
        jax.eval_shape(lambda: model.init(rngs, jnp.ones((1, 32, 32, 3)), train=True))
    return rates


@pytest.mark.parametrize('group_size', [None, 2])
def test_features_of_little_variance_are_normalized_by_their_own(group_size):
    features, held = values(2, 5, 4, 6) / 50, variables()
    model = BatchNorm(group_size=group_size)
    actual, _ = model.apply(held, features, train=True, mutable=['batch_stats'])
    expected = normalized(features, (0, 1, 2), held)
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('groups', [1, 2])
def test_kernels_start_as_torchvisions(groups):
    """Kaiming's normal distribution by fan-out: a variance of 2 / (height * width * features)."""
    conv = Conv(64, 3, groups=groups)
    kernel = conv.init(jax.random.key(0), jnp.zeros((1, 4, 4, 32)))['params']['kernel']
    np.testing.assert_allclose(np.std(kernel), np.sqrt(2 / (9 * 64)), rtol=0.03)
    np.testing.assert_allclose(np.mean(kernel), 0, atol=3e-3)


def test_the_mean_over_all_positions_keeps_batch_and_channel():
    features = values(2, 3, 4, 5)
    np.testing.assert_allclose(
        global_average_pool(features), features.reshape(2, 12, 5).mean(axis=1), rtol=1e-6
    )


@pytest.mark.parametrize('shape', [(8, 8, 3), (1, 1, 8, 8, 3), (1, 0, 8, 3)])
def test_images_are_a_batch_of_maps(shape):
    with pytest.raises(ValueError, match=r'net: images must be .*got shape'):
        check_images(np.zeros(shape, np.float32), 'net')
