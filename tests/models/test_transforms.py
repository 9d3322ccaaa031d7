"""JAX's transformations of whole networks, in training and evaluation, with nothing to be set."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gcnet_jax.models import create_model
from gcnet_jax.models.efficientnet import EfficientStage
from gcnet_jax.ops.primitives import standard_primitives

GC = {'block': 'global_context', 'stages': 1, 'position': 'after_conv2', 'ratio': 1 / 2}
SMALL = {'stage_sizes': (1,), 'widths': (8,), 'num_classes': 3}
STAGES = (EfficientStage('edge', 1, 8, 2, 2), EfficientStage('inverted', 1, 8, 2, 2))
NETWORKS = {
    'resnet50': SMALL | {'context': GC | {'position': 'after_conv3'}},
    'resnext50_32x4d': SMALL | {'groups': 2, 'base_width': 64, 'context': GC},
    'gcresnet50t': SMALL | {'stem_widths': (4, 4, 8), 'stem_pool': True, 'context': GC},
    'gc_efficientnetv2_rw_t': {
        'stages': STAGES,
        'stem_width': 4,
        'head_width': 8,
        'num_classes': 3,
    },
}
IMAGES = np.random.default_rng(0).normal(size=(8, 16, 16, 3)).astype(np.float32)
every_network = pytest.mark.parametrize('name', NETWORKS)
# What takes the compiler long: one network in the ordinary tests, the others in the long ones.
every_network_slowly = pytest.mark.parametrize(
    'name',
    [
        name if name == 'resnet50' else pytest.param(name, marks=pytest.mark.slow)
        for name in NETWORKS
    ],
)


@pytest.fixture(scope='module')
def network(random_variables):
    """A function from a name to the network's logits: a function of variables and images."""

    @functools.cache
    def make(name, train=False):
        model = create_model(name, **NETWORKS[name])
        variables = random_variables(model, IMAGES, train=False)
        variables = jax.tree.map(jnp.asarray, variables)

        def logits(params, images):
            held = variables | {'params': params}
            return model.apply(held, images, train=train, mutable=['batch_stats'])[0]

        return logits, variables['params']

    return make


def assert_close(actual, expected, tolerance=1e-3):
    """Compares two trees; the tolerance is relative to the largest value of the whole tree."""
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for one, other in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * largest)


def direction(tree, seed):
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: generator.normal(size=leaf.shape).astype(np.float32), tree)


def inner(one, other):
    products = jax.tree.map(lambda a, b: jnp.sum(a * b), one, other)
    return sum(jax.tree.leaves(products))


@pytest.mark.parametrize(
    ('name', 'train'),
    [
        *((name, True) for name in NETWORKS),
        ('resnet50', False),
        *(
            pytest.param(name, False, marks=pytest.mark.slow)
            for name in NETWORKS
            if name != 'resnet50'
        ),
    ],
)
def test_forward_mode_and_reverse_mode_agree(name, train, network):
    logits, params = network(name, train)
    point = (params, IMAGES)
    moved, weights = direction(point, 1), direction(np.zeros((8, 3)), 2)
    jitted = jax.jit(logits)
    jitted(*point)  # What was compiled before changes nothing.
    _, tangent = jax.jvp(jitted, point, moved)
    backward = jax.jit(lambda point: jax.vjp(logits, *point)[1](weights))(point)
    assert_close(inner(backward, moved), inner(weights, tangent), 1e-3)


def test_a_linearization_is_forward_mode(network):
    logits, params = network('resnet50', True)
    moved = direction(params, 1)
    _, linear = jax.linearize(jax.jit(lambda params: logits(params, IMAGES)), params)
    forward = jax.jit(lambda *point: jax.jvp(lambda p: logits(p, IMAGES), *point)[1])
    assert_close(linear(moved), forward((params,), (moved,)), 1e-4)


@every_network_slowly
def test_second_derivatives_agree_in_both_orders(name, network):
    logits, params = network(name, True)
    moved = direction(params, 1)

    def loss(params):
        return jnp.sum(jnp.sin(logits(params, IMAGES)))

    def forward_over_reverse(params):
        return jax.jvp(jax.grad(loss), (params,), (moved,))[1]

    def reverse_over_reverse(params):
        return jax.grad(lambda params: inner(jax.grad(loss)(params), moved))(params)

    # jax 0.7.2 computes such a product of XLA's own convolution wrongly under jit.
    jit = jax.jit if jax.__version_info__ >= (0, 10) else lambda function: function
    assert_close(jit(reverse_over_reverse)(params), jit(forward_over_reverse)(params))


@pytest.mark.slow
def test_a_hessian(network):
    logits, params = network('resnet50')
    bias = params['classifier']['bias']
    kernel = params['stage1_0']['conv2']['kernel']

    def loss(row):
        changed = params | {'stage1_0': params['stage1_0'] | {'conv2': {'kernel': kernel + row}}}
        return jnp.sum(jnp.sin(logits(changed, IMAGES) + bias[None]))

    row = np.zeros((1, 1, 1, 8), np.float32)
    found = jax.hessian(loss)(row).reshape(8, 8)
    expected = jax.jacrev(jax.grad(loss))(row).reshape(8, 8)
    assert_close(found, expected)
    assert_close(found, found.T)


@every_network_slowly
def test_images_and_parameters_can_be_mapped(name, network):
    logits, params = network(name)
    plain = jax.jit(logits)
    expected = plain(params, IMAGES)
    one_by_one = jax.jit(jax.vmap(lambda image: logits(params, image[None])[0]))(IMAGES)
    assert_close(one_by_one, expected, 1e-4)
    two = jax.tree.map(lambda leaf: jnp.stack([leaf, 1.5 * leaf]), params)
    mapped = jax.jit(jax.vmap(logits, (0, None)))(two, IMAGES)
    assert_close(mapped[0], expected, 1e-4)
    scaled = jax.tree.map(lambda leaf: 1.5 * leaf, params)
    assert_close(mapped[1], plain(scaled, IMAGES), 1e-4)

    def gradient(params, image):
        return jax.grad(lambda params: jnp.sum(jnp.sin(logits(params, image[None]))))(params)

    per_example = jax.jit(jax.vmap(gradient, (None, 0)))(params, IMAGES)
    last = jax.tree.map(lambda leaf: leaf[-1], per_example)
    assert_close(last, jax.jit(gradient)(params, IMAGES[-1]))


@every_network_slowly
def test_rematerialised_and_sharded_gradients_are_the_same(name, network):
    logits, params = network(name, True)

    def gradient(function):
        return jax.jit(jax.grad(lambda *point: jnp.sum(jnp.sin(function(*point)))))

    expected = gradient(logits)(params, IMAGES)
    assert_close(gradient(jax.checkpoint(logits))(params, IMAGES), expected)
    mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
    placed = jax.device_put(IMAGES, NamedSharding(mesh, PartitionSpec('data')))
    whole = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    assert_close(gradient(logits)(whole, placed), expected)


@every_network_slowly
def test_one_export_serves_all_platforms_with_its_gradient(name, network):
    logits, params = network(name)
    batch = export.symbolic_shape('batch')
    exported = export.export(
        jax.jit(functools.partial(logits, params)), platforms=('cpu', 'tpu', 'cuda')
    )(jax.ShapeDtypeStruct((*batch, 16, 16, 3), jnp.float32))
    stored = export.deserialize(exported.serialize(vjp_order=1))
    assert_close(stored.call(IMAGES[:3]), jax.jit(logits)(params, IMAGES[:3]), 1e-4)
    gradient = jax.grad(lambda images: stored.call(images).sum())(IMAGES[:3])
    expected = jax.jit(jax.grad(lambda images: logits(params, images).sum()))(IMAGES[:3])
    assert_close(gradient, expected)


@every_network
def test_a_network_in_standard_primitives_is_the_same_network(name, network):
    logits, params = network(name)
    plain = standard_primitives(jax.jit(logits))
    names = str(jax.make_jaxpr(plain)(params, IMAGES))
    assert 'conv_general_dilated' in names
    assert ' convolution[' not in names
    assert ' max_pool' not in names
    assert_close(jax.jit(plain)(params, IMAGES), jax.jit(logits)(params, IMAGES), 1e-4)


def test_without_jit_it_computes_the_same(network):
    logits, params = network('resnet50')
    expected = jax.jit(logits)(params, IMAGES)
    with jax.disable_jit():
        assert_close(logits(params, IMAGES), expected, 1e-4)
