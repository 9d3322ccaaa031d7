"""The pass that moves less memory in training: the same outputs, gradients and statistics."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcnet_jax.context import GlobalContext, insert
from gcnet_jax.context.common import masked_softmax
from gcnet_jax.models import create_model
from gcnet_jax.models.layers import BatchNorm
from gcnet_jax.models.reorder import (
    ReorderedResNet,
    pool_projected,
    projected_statistics,
    reorder,
)
from gcnet_jax.models.resnet import ResNet
from gcnet_jax.training.freezing import evaluate_frozen, frozen_paths

GC = {'block': 'global_context', 'stages': (2,), 'position': 'after_conv3', 'ratio': 1 / 2}
SMALL = {'stage_sizes': (1, 2), 'widths': (4, 8), 'num_classes': 7}


def random_images(size, batch=4):
    return np.random.default_rng(0).normal(size=(batch, size, size, 3)).astype(np.float32)


def drawn(model, images, random_variables):
    """Random variables; every other scale of the stem's norm is negative."""
    variables = random_variables(model, images, train=False)
    variables['params']['stem_norm']['scale'][::2] *= -1
    return variables


def train(model, variables, images, frozen=()):
    """A loss over every output, its gradient and the new statistics."""

    def loss(params):
        chosen = frozen_paths(params, frozen)
        with nn.intercept_methods(evaluate_frozen(params, chosen)):
            output, updated = model.apply(
                variables | {'params': params}, images, train=True, mutable=['batch_stats']
            )
        weights = np.linspace(-1, 1, output.size, dtype=np.float32).reshape(output.shape)
        return jnp.sum(output * weights), updated.get('batch_stats', {})

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables['params'])


def assert_trains_alike(model, variables, images, frozen=()):
    """Compares one step of both orders; returns the new statistics."""
    (expected, expected_statistics), expected_grads = train(model, variables, images, frozen)
    (value, statistics), grads = train(reorder(model, 'tpu'), variables, images, frozen)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert jax.tree.structure(statistics) == jax.tree.structure(expected_statistics)
    for leaf, other in zip(*map(jax.tree.leaves, (statistics, expected_statistics)), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-6)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected_grads))
    for leaf, other in zip(*map(jax.tree.leaves, (grads, expected_grads)), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-3, atol=1e-4 * largest)
    return statistics


@pytest.mark.parametrize('norm', [None, {'kind': 'frozen'}])
@pytest.mark.parametrize('context', [None, GC])
def test_pooling_first_trains_as_the_plain_order_does(context, norm, random_variables):
    model = create_model('resnet50', context=context, norm=norm, **SMALL)
    images = random_images(64)
    assert_trains_alike(model, drawn(model, images, random_variables), images)


@pytest.mark.parametrize('frozen', [('stage2_1',), ('*/norm3', 'stem_norm'), ('stem*', '*/conv3')])
def test_frozen_blocks_and_norms_keep_their_statistics(frozen, random_variables):
    model = create_model('resnet50', context=GC, **SMALL)
    images = random_images(64)
    variables = drawn(model, images, random_variables)
    statistics = assert_trains_alike(model, variables, images, frozen)
    kept = (
        statistics['stage2_1']['norm3']['mean']
        == variables['batch_stats']['stage2_1']['norm3']['mean']
    )
    assert kept.all() == (frozen[0] != 'stem*')


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_stem_pooled_first_gives_the_same_maps(dtype, random_variables):
    model = create_model('resnet18', **SMALL | {'stage_sizes': (1,), 'widths': (8,)}, dtype=dtype)
    images = random_images(37)
    variables = drawn(model, images, random_variables)

    def run(model):
        options = {'train': True, 'method': 'outputs', 'mutable': ['batch_stats']}
        return jax.jit(lambda *values: model.apply(*values, **options))(variables, images)

    (maps, statistics), (plain, plain_statistics) = run(reorder(model, 'tpu')), run(model)
    tolerance = 1e-5 if dtype == 'float32' else 2e-2
    for name in ('stem', 'stage1'):
        one, other = (np.asarray(held[name], np.float32) for held in (maps, plain))
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance * np.abs(other).max())
    statistics, plain_statistics = (
        held['batch_stats']['stem_norm'] for held in (statistics, plain_statistics)
    )
    for name in ('mean', 'var'):
        one, other = statistics[name], plain_statistics[name]
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance / 10)


class Derived(ResNet):
    """Another class, whose methods the pass does not know."""


@pytest.mark.parametrize(
    'make',
    [
        lambda: create_model('gcresnext26ts'),
        lambda: create_model('gc_resnet50', norm={'kind': 'group', 'channel_groups': 4}),
        lambda: create_model('gc_resnet50', norm={'kind': 'batch', 'group_size': 2}),
        lambda: insert(create_model('resnet50'), '*/norm3', GlobalContext(ratio=1 / 4)),
        lambda: Derived(create_model('resnet50').block, (1,)),
        lambda: nn.Dense(3),
    ],
)
def test_other_networks_are_returned_as_they_are(make):
    model = make()
    assert reorder(model, 'tpu') is model


def reordered_parts(train=True, **options):
    """Whether the last norm is told its statistics, and the stem's leaves its map to pooling."""
    gc = GC | options.pop('gc', {}) if options.get('context', True) else None
    model = reorder(create_model('resnet50', **SMALL | options | {'context': gc}), 'tpu')
    assert type(model) is ReorderedResNet
    images = jnp.zeros((4, 64, 64, 3))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    told, whole_maps = [], []

    def watch(method, arguments, keywords, context):
        if context.module.path == ('stem_norm',):
            whole_maps.append(keywords.get('normalize', True))
        if context.module.path == ('stage2_1', 'norm3'):
            told.append('statistics' in keywords)
        return method(*arguments, **keywords)

    def call(held):
        rngs = {'dropout': jax.random.key(0)}
        return model.apply(held, images, train=train, mutable=['batch_stats'], rngs=rngs)

    with nn.intercept_methods(watch):
        jax.eval_shape(call, shapes)
    return told == [True], whole_maps == [False]


def test_only_what_the_pass_is_for_is_reordered():
    assert reordered_parts() == (True, True)
    assert reordered_parts(context=None) == (True, True)
    assert reordered_parts(norm={'kind': 'frozen'}) == (True, True)
    assert reordered_parts(train=False) == (False, False)
    assert reordered_parts(gc={'fusion': 'scale_add'}) == (False, True)
    assert reordered_parts(gc={'pooling': 'average'}) == (False, True)
    assert reordered_parts(stochastic_depth_rate=0.1) == (False, True)
    assert reordered_parts(stem='small') == (True, False)
    assert reordered_parts(widths=(4, 32)) == (False, True)  # Of few positions for its width.
    assert reordered_parts(stem='none') == (True, False)


def test_no_bottleneck_keeps_its_last_convolution_for_the_gradients():
    model = create_model('resnet50', context=None, **SMALL | {'stem': 'none', 'widths': (4, 16)})
    images = jnp.zeros((4, 16, 16, 3))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    arrays = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), variables)

    def saved(model):
        """Shapes of what the forward pass keeps for the gradients."""

        def loss(params):
            held = arrays | {'params': params}
            output, _ = model.apply(held, images, train=True, mutable=['batch_stats'])
            return output.sum()

        residuals = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], arrays['params'])
        return [leaf.shape for leaf in jax.tree.leaves(residuals)]

    # Of each of the two blocks, what its norm keeps and what it gives on.
    wide = (4, 8, 8, 64)
    assert saved(reorder(model, 'tpu')).count(wide) == saved(model).count(wide) - 2 * 2


@pytest.mark.parametrize('platform', ['cpu', 'gpu', 'tpu'])
def test_a_cpu_computes_in_the_order_written(platform):
    model = create_model('gc_resnet50')
    assert (reorder(model, platform) is model) == (platform == 'cpu')


@pytest.mark.parametrize('options', [{}, {'stem': 'deep'}, {'context': None, 'num_classes': 0}])
def test_variables_are_those_of_the_model(options):
    model = create_model('resnet50', **{'context': GC} | SMALL | options)
    images = random_images(32)
    one, other, third = (
        jax.eval_shape(partial(net.init, train=train), jax.random.key(0), images)
        for net, train in (
            (model, False),
            (reorder(model, 'tpu'), False),
            (reorder(model, 'tpu'), True),
        )
    )
    assert one == other == third


def test_the_model_itself_calls_every_layer_in_training():
    """Whoever intercepts methods or captures outputs sees what the text says."""
    model = create_model('resnet50', context=GC, **SMALL)
    images = jnp.zeros((4, 64, 64, 3))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    seen = {}

    def watch(method, arguments, keywords, context):
        output = method(*arguments, **keywords)
        if context.method_name == '__call__':
            seen['/'.join(context.module.path)] = jax.tree.map(jnp.shape, output)
        return output

    with nn.intercept_methods(watch):
        jax.eval_shape(
            lambda held: model.apply(held, images, train=True, mutable=['batch_stats']), shapes
        )
    assert seen['stem_norm'] == (4, 32, 32, 4)
    assert seen['stage2_0/norm3'] == seen['stage2_0/context_after_conv3_0'] == (4, 8, 8, 32)
    assert seen['stage2_0/context_after_conv3_0/pool/logits'] == (4, 64, 1)


def projection(dtype=np.float32, channels=8):
    generator = np.random.default_rng(5)
    inner = np.maximum(generator.normal(size=(2, 5, 4, 3)), 0).astype(dtype)
    kernel, shift, weights = (
        generator.normal(size=shape).astype(np.float32)
        for shape in ((3, channels), channels, channels)
    )
    return inner, kernel, shift, weights


def pool_after(inner, kernel, shift, weights):
    features = (inner @ kernel + shift).reshape(2, 20, -1)
    attention = masked_softmax(features @ weights, None)
    return (attention[..., None] * features).sum(axis=1)


def test_pooling_before_a_projection_is_pooling_after_it():
    parts = projection()
    cotangent = np.random.default_rng(6).normal(size=(2, 8)).astype(np.float32)

    def gradient(pool):
        return jax.jit(jax.value_and_grad(lambda parts: jnp.sum(pool(*parts) * cotangent)))(parts)

    (expected, expected_grads), (value, grads) = gradient(pool_after), gradient(pool_projected)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected_grads))
    for leaf, other in zip(*map(jax.tree.leaves, (grads, expected_grads)), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-4, atol=1e-5 * largest)


def test_pooling_before_a_projection_in_bfloat16():
    inner, kernel, *rest = projection(jnp.bfloat16)
    pooled = pool_projected(inner, kernel.astype(jnp.bfloat16), *rest)
    assert pooled.dtype == jnp.bfloat16
    expected = pool_after(inner.astype(np.float32), kernel, *rest)
    np.testing.assert_allclose(
        pooled.astype(np.float32), expected, atol=2e-2 * np.abs(expected).max()
    )


@pytest.mark.parametrize('dtype', [np.float32, jnp.bfloat16])
def test_statistics_of_a_projection_are_those_of_its_output(dtype):
    inner, kernel, *_ = projection(dtype)
    kernel = kernel.astype(dtype)
    mean, variance = jax.jit(projected_statistics)(inner, kernel)
    output = (inner.astype(np.float64) @ kernel.astype(np.float64)).reshape(-1, 8)
    assert mean.dtype == variance.dtype == np.float32
    np.testing.assert_allclose(mean, output.mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(variance, output.var(axis=0), rtol=1e-5)


def test_the_variance_of_a_constant_is_not_negative():
    """It is a difference of sums: rounding must not bring the square root of a negative value."""
    inner = np.full((2, 9, 7, 3), 1000.1, np.float32)
    _, variance = jax.jit(projected_statistics)(inner, projection()[1])
    assert (variance >= 0).all()


def test_a_norm_that_is_not_ours_is_left_alone():
    model = create_model('resnet50', norm=lambda **options: BatchNorm(group_size=2, **options))
    assert reorder(model, 'tpu') is model
