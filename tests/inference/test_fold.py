"""Folded networks compute the same, and nothing is folded that must not be."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from gcnet_jax.context import GlobalContext, insert
from gcnet_jax.inference.fold import fold_batch_norms, folded_batch_norm
from gcnet_jax.models import create_model
from gcnet_jax.models.efficientnet import EfficientStage
from gcnet_jax.models.layers import BatchNorm, Conv

PLACE = {'stages': (1, 2), 'ratio': 1 / 2}
CHAIN = (
    {'block': 'global_context', 'position': 'after_conv1', **PLACE},
    {'block': 'global_context', 'position': 'after_conv2', 'fusion': 'scale_add', **PLACE},
    {'block': 'squeeze_excite', 'position': 'after_conv2', **PLACE},
    {'block': 'non_local', 'position': 'after_add', 'stages': (2,)},
)
SMALL = {'num_classes': 5, 'stage_sizes': (1, 2)}
NETWORKS = {
    'basic': ('resnet18', {**SMALL, 'widths': (8, 16), 'context': CHAIN}),
    'grouped': (
        'gc_resnext50_32x4d',
        {**SMALL, 'widths': (8, 16), 'groups': 2, 'base_width': 32, 'context': CHAIN},
    ),
    'byobnet': (
        'gcresnet33ts',
        {
            **SMALL,
            'widths': (16, 32),
            'stem_widths': (4, 4, 8),
            'head_width': 24,
            'context': {**PLACE, 'position': 'after_conv2', 'norm_epsilon': 1e-6},
        },
    ),
    'efficientnet': (
        'gc_efficientnetv2_rw_t',
        {
            'num_classes': 5,
            'stem_width': 8,
            'head_width': 24,
            'stages': (
                EfficientStage('conv', 1, 8, 1),
                EfficientStage('edge', 2, 8, 2, 2),
                EfficientStage('inverted', 2, 8, 1, 2),
            ),
        },
    ),
}


def outputs(model, variables, images):
    """The logits and every feature map."""
    maps = model.apply(variables, images, train=False, method='outputs')
    return maps | {'logits': model.apply(variables, images, train=False)}


def run(model, variables, images, folded):
    compute = jax.jit(functools.partial(outputs, model))
    if not folded:
        return compute(variables, images)
    with folded_batch_norm():
        return compute(variables, images)


def fold(model, variables, images):
    return fold_batch_norms(
        model, variables, jax.ShapeDtypeStruct(images.shape, jnp.float32), train=False
    )


def pixels(size=33):
    return np.random.default_rng(1).normal(size=(2, size, size, 3)).astype(np.float32)


@pytest.mark.parametrize('family', NETWORKS)
def test_a_folded_network_computes_the_same(family, random_variables):
    name, options = NETWORKS[family]
    model, images = create_model(name, **options), pixels()
    variables = random_variables(model, images, train=False)
    folded = fold(model, variables, images)
    assert folded['batch_stats'] == {}
    expected = run(model, variables, images, folded=False)
    actual = run(model, folded, images, folded=True)
    assert set(actual) == set(expected)
    for layer, values in expected.items():
        error = np.abs(actual[layer] - values).max() / np.abs(values).max()
        assert error < 1e-5, (layer, error)


def test_only_kernels_before_a_norm_and_the_norms_change(random_variables):
    name, options = NETWORKS['basic']
    model, images = create_model(name, **options), pixels()
    variables = random_variables(model, images, train=False)
    before = flatten_dict(variables['params'], sep='/')
    after = flatten_dict(fold(model, variables, images)['params'], sep='/')
    changed = {key for key in after if not np.array_equal(after[key], before[key])}
    assert {key.split('/')[-2].rstrip('123') for key in changed} == {
        *('stem_conv', 'stem_norm', 'conv', 'norm', 'shortcut_conv', 'shortcut_norm')
    }
    assert not [key for key in changed if 'context' in key or 'classifier' in key]
    assert {key.split('/')[-1] for key in before.keys() - after.keys()} == {'scale'}
    assert all(after[key].shape == before[key].shape for key in after)
    assert all(after[key].dtype == np.float32 for key in after)


@pytest.mark.parametrize(
    'name',
    [
        *('gccnn', 'gc_resnet18', 'gcresnext26ts'),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ('nl_resnet50_c4', 'gc_resnext50_32x4d', 'gc_efficientnetv2_rw_t')
        ),
    ],
)
def test_every_norm_of_the_registrys_networks_is_folded(name):
    model = create_model(name)
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    shapes = jax.eval_shape(
        lambda images: model.init(jax.random.key(0), images, train=False), images
    )
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    assert len(jax.tree.leaves(zeros['batch_stats'])) > 6
    assert fold_batch_norms(model, zeros, images, train=False)['batch_stats'] == {}


def test_the_formula(random_variables):
    class Network(nn.Module):
        @nn.compact
        def __call__(self, images, *, train):
            features = nn.Conv(4, (1, 1), name='conv')(images)  # With a bias of its own.
            return nn.BatchNorm(use_running_average=not train, epsilon=0.3, name='norm')(features)

    images = pixels(3)
    variables = random_variables(Network(), images, train=False)
    conv, norm = variables['params']['conv'], variables['params']['norm']
    statistics = variables['batch_stats']['norm']
    factor = norm['scale'] / np.sqrt(statistics['var'] + 0.3)
    values = images @ conv['kernel'][0, 0] + conv['bias']
    expected = (values - statistics['mean']) * factor + norm['bias']
    folded = fold(Network(), variables, images)
    np.testing.assert_allclose(
        folded['params']['conv']['kernel'], conv['kernel'] * factor, rtol=1e-6
    )
    with folded_batch_norm():
        actual = Network().apply(folded, images, train=False)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


class Special(nn.Module):
    """Norms that cannot be folded, each for a reason, and one that can."""

    kind: str

    @nn.compact
    def __call__(self, images, *, train):
        conv, norm = Conv(3, 3, name='conv'), BatchNorm(name='norm')
        if self.kind == 'norm first':
            return conv(norm(images, train=train))
        if self.kind == 'something between':
            return norm(nn.relu(conv(images)), train=train)
        if self.kind == 'convolution twice':
            return norm(conv(conv(images)), train=train)
        if self.kind == 'convolution elsewhere':
            return norm(conv(images), train=train) + conv(2 * images)
        if self.kind == 'norm twice':
            return norm(norm(conv(images), train=train), train=train)
        if self.kind == 'two norms':
            features = conv(images)
            return norm(features, train=train) + BatchNorm(name='other')(features, train=train)
        return norm(conv(images), train=train)


@pytest.mark.parametrize(
    ('kind', 'left'),
    [
        ('norm first', 1),
        ('something between', 1),
        ('convolution twice', 1),
        ('convolution elsewhere', 1),
        ('norm twice', 1),
        ('two norms', 2),
        ('plain', 0),
    ],
)
def test_what_does_not_directly_follow_a_convolution_is_left(kind, left, random_variables):
    model, images = Special(kind), pixels(5)
    variables = random_variables(model, images, train=False)
    folded = fold(model, variables, images)
    assert len(folded['batch_stats']) == left
    with folded_batch_norm():
        actual = model.apply(folded, images, train=False)
    np.testing.assert_allclose(
        actual, model.apply(variables, images, train=False), rtol=1e-5, atol=1e-5
    )


def test_an_inserted_block_between_keeps_the_norm(random_variables):
    model, images = insert(Special('plain'), 'conv', GlobalContext(hidden_channels=4)), pixels(5)
    variables = random_variables(model, images, train=False)
    folded = fold(model, variables, images)
    assert list(folded['batch_stats']) == ['norm']
    with folded_batch_norm():
        actual = model.apply(folded, images, train=False)
    np.testing.assert_array_equal(actual, model.apply(variables, images, train=False))


def test_the_variables_given_are_not_changed(random_variables):
    model, images = Special('plain'), pixels(5)
    variables = random_variables(model, images, train=False)
    copy = jax.tree.map(np.copy, variables)
    fold(model, variables, images)
    jax.tree.map(np.testing.assert_array_equal, variables, copy)


def test_the_type_of_the_computation_stays(random_variables):
    options = {'stage_sizes': (1,), 'widths': (8,), 'context': None}
    model, images = create_model('gccnn', dtype='bfloat16', **options), pixels(9)
    variables = random_variables(model, images, train=False)
    expected = run(model, variables, images, folded=False)
    actual = run(model, fold(model, variables, images), images, folded=True)
    assert {layer: values.dtype for layer, values in actual.items()} == {
        layer: values.dtype for layer, values in expected.items()
    }
    error = np.abs(actual['logits'] - expected['logits']).max()
    assert error < 0.03 * np.abs(expected['logits']).max()


def test_a_folded_network_is_trained_too(random_variables):
    """As for dropout at inference: a norm that is folded has no statistics to follow."""
    options = {'stage_sizes': (1, 1), 'widths': (8, 8), 'num_classes': 3}
    context = {'block': 'global_context', 'position': 'after_conv3', **PLACE}
    model = create_model('resnet50', context=context, **options)
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    variables = random_variables(model, images, train=False)
    folded = fold_batch_norms(model, variables, images, train=False)
    expected = model.apply(variables, images, train=False)
    with folded_batch_norm():
        logits, _ = model.apply(folded, images, train=True, mutable=['batch_stats'])
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_a_norm_without_a_scale_is_folded(random_variables):
    class Network(nn.Module):
        @nn.compact
        def __call__(self, images, train):
            features = Conv(4, 3, name='conv')(images)
            return nn.BatchNorm(not train, use_scale=False, name='norm')(features)

    images = pixels()
    variables = random_variables(Network(), images, train=False)
    assert 'scale' not in variables['params']['norm']
    folded = fold(Network(), variables, images)
    assert folded['batch_stats'] == {}
    with folded_batch_norm():
        actual = Network().apply(folded, images, train=False)
    expected = Network().apply(variables, images, train=False)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
