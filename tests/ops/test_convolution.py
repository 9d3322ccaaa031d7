"""The CPU's forms of convolution and max pooling against XLA's own, in every way they are used."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gcnet_jax.ops import convolution_forms
from gcnet_jax.ops.convolution import convolve
from gcnet_jax.ops.pooling import max_pool

# Image size, input channels, output channels, kernel size, stride, groups.
CONVOLUTIONS = [
    (7, 6, 6, 3, 1, 6),
    (8, 5, 5, 5, 2, 5),
    (6, 64, 96, 3, 1, 2),
    (7, 24, 12, 3, 2, 12),
    (7, 32, 48, 3, 1, 16),
    (8, 6, 6, 1, 1, 3),
    (8, 6, 10, 1, 1, 1),
    (2, 5, 7, 3, 1, 1),
    (4, 5, 7, 3, 2, 1),
    (1, 4, 3, 3, 1, 1),
    (8, 66, 4, 3, 1, 1),
    (9, 6, 4, 1, 2, 1),
    (8, 5, 7, 3, 1, 1),
    (8, 6, 4, 3, 2, 1),
    (7, 3, 4, 3, 2, 1),
    (7, 8, 4, 3, 1, 2),
    (16, 3, 4, 7, 2, 1),
    (6, 5, 7, 3, 2, 1),
    (6, 5, 17, 3, 2, 1),
]
POOLED = [(8, 8, 3), (7, 9, 2), (2, 5, 1), (1, 1, 4)]


def values(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def case(size, inner, outer, kernel, stride, groups, batch=3, dtype=np.float32):
    features = values(batch, size, size + 2, inner, dtype=dtype)
    weights = values(kernel, kernel, inner // groups, outer, seed=1, dtype=dtype)
    return features, weights


def reference(features, weights, stride, groups):
    return jax.lax.conv_general_dilated(
        features,
        weights,
        (stride, stride),
        [((weights.shape[0] - 1) // 2,) * 2] * 2,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=groups,
    )


def pooled_reference(features):
    return nn.max_pool(features, (3, 3), (2, 2), ((1, 1), (1, 1)))


def value_and_gradients(function, *arguments):
    """The output, and the gradients of a sum of it with weights that are all different."""

    def weighted(*arguments):
        output = function(*arguments)
        return (output.astype(jnp.float32) * values(*output.shape, seed=2)).sum(), output

    numbers = tuple(range(len(arguments)))
    gradients, output = jax.jit(jax.grad(weighted, numbers, has_aux=True))(*arguments)
    return output, gradients


def assert_close(actual, expected, tolerance):
    expected = np.asarray(expected, np.float64)
    largest = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, atol=tolerance * largest)


@pytest.mark.parametrize('shapes', CONVOLUTIONS)
def test_convolutions_and_their_gradients_are_those_of_xla(shapes):
    *_, stride, groups = shapes
    features, weights = case(*shapes)
    output, gradients = value_and_gradients(
        lambda *pair: convolve(*pair, stride, groups), features, weights
    )
    expected, expected_gradients = value_and_gradients(
        lambda *pair: reference(*pair, stride, groups), features, weights
    )
    assert output.shape == expected.shape
    assert_close(output, expected, 1e-5)
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        assert actual.shape == wanted.shape
        assert_close(actual, wanted, 1e-4)


@pytest.mark.parametrize('shapes', CONVOLUTIONS[:15])
def test_bfloat16_stays_bfloat16_and_accumulates_in_float32(shapes):
    *_, stride, groups = shapes
    features, weights = case(*shapes)
    narrow = [jnp.asarray(array, jnp.bfloat16) for array in (features, weights)]
    output, gradients = value_and_gradients(lambda *pair: convolve(*pair, stride, groups), *narrow)
    assert {array.dtype for array in (output, *gradients)} == {jnp.dtype('bfloat16')}
    wide = [array.astype(np.float32) for array in narrow]
    expected, expected_gradients = value_and_gradients(
        lambda *pair: reference(*pair, stride, groups), *wide
    )
    for actual, wanted in zip((output, *gradients), (expected, *expected_gradients), strict=True):
        assert_close(actual, wanted, 2e-2)


def test_a_depthwise_gradient_is_accumulated_in_float32():
    features, weights = case(16, 4, 4, 7, 1, 4)
    narrow = [jnp.asarray(array, jnp.bfloat16) for array in (features, weights)]
    actual = value_and_gradients(lambda *pair: convolve(*pair, 1, 4), *narrow)
    wide = [array.astype(np.float32) for array in narrow]
    expected = value_and_gradients(lambda *pair: reference(*pair, 1, 4), *wide)
    # Sums in bfloat16 are off by three times as much.
    jax.tree.map(lambda a, b: assert_close(a, b, 5e-3), actual, expected)


@pytest.mark.slow
def test_float64_stays_float64(float64):
    for shapes in CONVOLUTIONS[:14]:
        *_, stride, groups = shapes
        pair = case(*shapes, dtype=np.float64)
        results = jax.vjp(lambda *pair, s=stride, g=groups: convolve(*pair, s, g), *pair)
        expected = jax.vjp(lambda *pair, s=stride, g=groups: reference(*pair, s, g), *pair)
        for actual, wanted in zip(
            (results[0], *results[1](results[0])),
            (expected[0], *expected[1](expected[0])),
            strict=True,
        ):
            assert actual.dtype == np.float64
            assert_close(actual, wanted, 1e-13)
    features = values(2, 6, 6, 3, dtype=np.float64)
    output, backward = jax.vjp(max_pool, features)
    assert output.dtype == backward(output)[0].dtype == np.float64


@pytest.mark.parametrize('shapes', CONVOLUTIONS[:14])
def test_convolutions_can_be_mapped(shapes):
    *_, stride, groups = shapes
    features, weights = case(*shapes)
    features, weights = np.stack([features, -2 * features]), np.stack([weights, weights[::-1]])

    def gradients(function):
        return lambda *pair: value_and_gradients(lambda *two: function(*two, stride, groups), *pair)

    actual = jax.vmap(gradients(convolve))(features, weights)
    expected = jax.vmap(gradients(reference))(features, weights)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-4), actual, expected)


@pytest.mark.parametrize('shape', POOLED)
@pytest.mark.parametrize('kind', ['different', 'ties', 'rectified'])
def test_pooling_gives_the_gradient_to_the_first_maximum(shape, kind):
    features = values(2, *shape)
    if kind != 'different':
        features = np.round(features)
    if kind == 'rectified':
        features = np.maximum(features, 0)
    output, (gradient,) = value_and_gradients(max_pool, features)
    expected, (expected_gradient,) = value_and_gradients(pooled_reference, features)
    np.testing.assert_array_equal(output, expected)
    assert_close(gradient, expected_gradient, 1e-6)


def test_pooling_can_be_mapped_and_takes_bfloat16():
    features = jnp.round(2 * values(3, 2, 6, 6, 4)).astype(jnp.bfloat16)
    actual = jax.vmap(lambda one: value_and_gradients(max_pool, one))(features)
    expected = jax.vmap(lambda one: value_and_gradients(pooled_reference, one))(features)
    assert actual[1][0].dtype == jnp.bfloat16
    jax.tree.map(lambda a, b: assert_close(a, b, 2e-2), actual, expected)


def network(features, first, second):
    """Every form, one after the other: 3x3, pooling, depthwise and grouped, 1x1."""
    values = max_pool(convolve(features, first))
    for groups in (8, 2):
        values = convolve(values, first[:, :, :1] * np.ones((8 // groups, 1)), groups=groups)
    return convolve(values, second, 2)


@pytest.mark.parametrize('axes', [('data',), ('data', 'spatial')])
def test_gradients_are_the_same_over_a_mesh(axes):
    features, first = case(16, 3, 8, 3, 1, 1, batch=4)
    second = values(1, 1, 8, 6, seed=3)
    expected = value_and_gradients(network, features, first, second)
    shape = (4,) if len(axes) == 1 else (2, 2)
    devices = jax.devices('cpu')[:4]
    mesh = jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(axes), devices=devices)
    placed = jax.device_put(features, NamedSharding(mesh, PartitionSpec(*axes)))
    rest = jax.device_put((first, second), NamedSharding(mesh, PartitionSpec()))
    actual = value_and_gradients(network, placed, *rest)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-4), actual, expected)


def lowered(platform):
    """The training computation of a platform, as text; that platform need not be here."""
    features, first = case(8, 3, 8, 3, 1, 1)
    gradients = jax.jit(jax.grad(lambda *three: network(*three).sum(), (0, 1, 2)))
    arguments = (features, first, values(1, 1, 8, 6))
    return gradients.trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(('channels', 'groups', 'count'), [(64, 32, 4), (64, 2, 2), (8, 8, 0)])
def test_grouped_convolutions_are_split_on_a_cpu_only(channels, groups, count):
    features, weights = case(8, channels, channels, 3, 1, groups)
    traced = jax.jit(lambda *pair: convolve(*pair, 1, groups)).trace(features, weights)
    cpu, tpu = (
        traced.lower(lowering_platforms=(platform,)).as_text() for platform in ('cpu', 'tpu')
    )
    assert cpu.count('stablehlo.convolution') == count
    assert f'feature_group_count = {groups} ' not in cpu
    assert tpu.count('stablehlo.convolution') == 1
    assert f'feature_group_count = {groups} ' in tpu


def test_images_are_taken_in_parts_where_they_are_many(monkeypatch):
    monkeypatch.setattr(convolution_forms, 'WINDOWS_AT_ONCE', 100)
    features, weights = case(8, 5, 7, 3, 1, 1, batch=6)
    actual = value_and_gradients(convolve, features, weights)
    expected = value_and_gradients(lambda *pair: reference(*pair, 1, 1), features, weights)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), actual, expected)


def test_other_platforms_get_the_plain_forms():
    assert 'dot_general' in lowered('cpu')
    assert 'select_and_scatter' not in lowered('cpu')
    for platform in ('tpu', 'cuda'):
        assert 'dot_general' not in lowered(platform)
        assert 'select_and_scatter' in lowered(platform)


def test_one_export_serves_all_platforms_and_any_batch():
    _, first = case(8, 3, 8, 3, 1, 1)
    second = values(1, 1, 8, 6)
    batch = export.symbolic_shape('batch')
    exported = export.export(
        jax.jit(lambda features: network(features, first, second)),
        platforms=('cpu', 'cuda', 'tpu'),
    )(jax.ShapeDtypeStruct((*batch, 8, 10, 3), jnp.float32))
    for size in (1, 3):
        features = values(size, 8, 10, 3)
        expected = jax.jit(network)(features, first, second)
        assert_close(exported.call(features), expected, 1e-6)


@pytest.mark.parametrize(
    ('shape', 'dilation'),
    [
        ((8, 66, 4, 3, 1, 1), 1),
        ((8, 66, 4, 3, 1, 1), 2),
        ((16, 3, 4, 7, 2, 1), 1),
        ((6, 64, 96, 3, 1, 2), 1),
    ],
)
def test_in_a_loop_every_gradient_has_the_order_that_the_cpu_computes_fast(shape, dilation):
    """XLA puts dimensions in order outside of loops alone, and was forty times as slow inside."""
    features, weights = case(*shape)
    stride, groups = shape[-2:]

    def loss(weights, features):
        total = convolve(features, weights, stride, groups, dilation).sum()
        return total**2

    def loop(weights, features):
        return jax.lax.map(lambda part: jax.grad(loss, argnums=(0, 1))(weights, part), features)

    with jax.default_device(jax.devices('cpu')[0]):
        compiled = jax.jit(loop).lower(weights, np.stack([features] * 3)).compile()
    convolutions = [line for line in compiled.as_text().splitlines() if ' convolution(' in line]
    assert convolutions
    assert all('dim_labels=b01f_01io->b01f' in line for line in convolutions)
