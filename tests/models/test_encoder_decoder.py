"""Segmenters: what is computed of which map, windows against a plain loop, and what is refused."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcnet_jax.errors import ConfigError
from gcnet_jax.models import create_model
from gcnet_jax.models.encoder_decoder import average_windows, window_starts
from gcnet_jax.ops.resize import resize_bilinear

pytestmark = pytest.mark.usefixtures('quick_compilation')
SMALL = {
    'backbone': 'resnet18',
    'widths': (8, 8, 8, 8),
    'stage_sizes': (1, 1, 1, 1),
    'num_classes': 5,
    # The norm in the context's bottleneck of a quarter would amplify rounding over two values.
    'channels': 32,
    'auxiliary_channels': 4,
}


def network(name='gc_resnet50_d8_cityscapes', **options):
    return create_model(name, **SMALL | options)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def run(model, variables, images):
    return jax.jit(partial(model.apply, train=False, method='outputs'))(variables, images)


@pytest.mark.parametrize('align_corners', [False, True])
def test_every_output_is_of_the_map_that_it_should_be_of(random_variables, align_corners):
    model, images = network(align_corners=align_corners), draw(2, 33, 47, 3)
    variables = random_variables(model, images, train=False)
    outputs = run(model, variables, images)
    # The deep stem halves twice, and of the strides behind it one is left.
    assert [outputs[f'stage{k}'].shape for k in range(1, 5)] == [
        *((2, 9, 12, 8), (2, 5, 6, 8), (2, 5, 6, 8), (2, 5, 6, 8))
    ]
    assert {
        name: outputs[name].shape for name in ('head_logits', 'logits', 'auxiliary_logits')
    } == {
        'head_logits': (2, 5, 6, 5),
        'logits': (2, 33, 47, 5),
        'auxiliary_logits': (2, 33, 47, 5),
    }
    bound = model.bind(variables)
    small = bound.head(outputs['stage4'], train=False)
    np.testing.assert_allclose(outputs['head_logits'], small, atol=1e-5)
    for given, found in (
        (outputs['head_logits'], 'logits'),
        (bound.auxiliary_head(outputs['stage3'], train=False), 'auxiliary_logits'),
    ):
        expected = resize_bilinear(given, (33, 47), align_corners=align_corners)
        np.testing.assert_allclose(outputs[found], expected, atol=1e-5)


def test_without_auxiliary_head_and_context(random_variables):
    images = draw(1, 32, 32, 3)
    whole = random_variables(network(), images, train=False)['params']
    assert 'context' in whole['head']
    assert 'context' not in whole['auxiliary_head']
    model = network(auxiliary_channels=0, context_ratio=None)
    variables = random_variables(model, images, train=False)
    assert {*variables['params']} == {'backbone', 'head'}
    assert {*variables['params']['head']} == {*whole['head']} - {'context'}
    assert 'auxiliary_logits' not in run(model, variables, images)


def test_any_backbone_and_output_stride(random_variables):
    images = draw(1, 64, 64, 3)
    model = create_model(
        'fcn_resnet50_d8_voc',
        **SMALL | {'backbone': 'gc_resnet18', 'output_stride': 16, 'stem': 'imagenet'},
    )
    variables = random_variables(model, images, train=False)
    assert 'context_after_conv2_0' in variables['params']['backbone']['stage4_0']
    assert run(model, variables, images)['head_logits'].shape == (1, 4, 4, 5)


# Windows ------------------------------------------------------------------------------------------


def by_window(compute, images, window, stride, classes):
    """mmsegmentation's `slide_inference`, a window at a time."""
    batch, height, width, _ = images.shape
    total, count = np.zeros((batch, height, width, classes)), np.zeros((height, width, 1))
    rows = max(height - window + stride - 1, 0) // stride + 1
    columns = max(width - window + stride - 1, 0) // stride + 1
    for row in range(rows):
        for column in range(columns):
            bottom = min(row * stride + window, height)
            right = min(column * stride + window, width)
            top, left = max(bottom - window, 0), max(right - window, 0)
            total[:, top:bottom, left:right] += compute(images[:, top:bottom, left:right])
            count[top:bottom, left:right] += 1
    assert count.min() > 0
    return total / count


@pytest.mark.parametrize(
    ('size', 'window', 'stride'),
    [
        ((33, 47), 16, 9),
        ((33, 47), 16, 16),
        ((20, 50), 32, 24),
        ((17, 19), 32, 32),
        ((32, 33), 32, 1),
    ],
)
def test_windows_are_those_of_a_plain_loop(size, window, stride):
    images = draw(2, *size, 3)

    def compute(crop):
        # Depends on the whole window, as a network with global context does.
        return crop[..., :2] * crop.mean(axis=(1, 2, 3), keepdims=True) + crop[:, :1, :1, 2:]

    found = average_windows(compute, jnp.asarray(images), window, stride, 2)
    expected = by_window(compute, images, window, stride, 2)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize('align_corners', [False, True])
def test_a_network_with_windows(random_variables, align_corners):
    images = draw(2, 33, 47, 3)
    model = network(align_corners=align_corners, window=24, window_stride=13)
    whole = network(align_corners=align_corners)
    variables = random_variables(whole, images, train=False)
    assert jax.tree.structure(variables) == jax.tree.structure(
        random_variables(model, images, train=False)
    )
    compute = jax.jit(partial(whole.apply, variables, train=False))
    outputs = run(model, variables, images)
    expected = by_window(compute, images, 24, 13, 5)
    assert np.abs(outputs['logits'] - expected).max() < 1e-5 * np.abs(expected).max()
    # All other outputs are of the whole image, and so is training.
    np.testing.assert_allclose(
        outputs['head_logits'], run(whole, variables, images)['head_logits'], atol=1e-5
    )
    options = {'train': True, 'mutable': 'batch_stats', 'rngs': {'dropout': jax.random.key(0)}}
    trained = [each.apply(variables, images, **options)[0] for each in (model, whole)]
    np.testing.assert_array_equal(*trained)


def test_the_windows_of_cityscapes():
    """Eight windows of 769 pixels in an image of 1025 x 2049."""
    assert window_starts(1025, 769, 513) == [0, 256]
    assert window_starts(2049, 769, 513) == [0, 513, 1026, 1280]
    assert window_starts(500, 769, 513) == window_starts(769, 769, 513) == [0]


# Training and types -------------------------------------------------------------------------------


def test_the_gradient_is_finite_and_reaches_every_parameter(random_variables):
    model, images = network(), draw(2, 33, 40, 3)
    variables = random_variables(model, images, train=False)

    @jax.jit
    def gradient(params):
        def loss(params):
            outputs, updated = model.apply(
                variables | {'params': params},
                images,
                train=True,
                method='outputs',
                mutable='batch_stats',
                rngs={'dropout': jax.random.key(0)},
            )
            both = outputs['logits'] ** 2 + 0.4 * outputs['auxiliary_logits'] ** 2
            return both.mean(), updated

        return jax.grad(loss, has_aux=True)(params)

    gradients, updated = gradient(variables['params'])
    for path, leaf in jax.tree.leaves_with_path(gradients):
        assert np.isfinite(leaf).all(), path
        # The bias of the attention's logits cancels in the softmax.
        is_bias = jax.tree_util.keystr(path).endswith("['pool']['logits']['bias']")
        assert is_bias or np.abs(leaf).max() > 0, path
    before = variables['batch_stats']
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max() > 0, before, updated['batch_stats'])
    assert all(jax.tree.leaves(moved))


def test_bfloat16(random_variables):
    images = draw(1, 32, 40, 3)
    model = network(dtype='bfloat16', window=24, window_stride=16)
    variables = random_variables(network(), images, train=False)
    new = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.float32.dtype}
    outputs = run(model, variables, images)
    assert outputs['stage4'].dtype == jnp.bfloat16
    logits = [outputs[name] for name in ('head_logits', 'logits', 'auxiliary_logits')]
    assert {value.dtype for value in logits} == {jnp.float32.dtype}
    expected = run(network(window=24, window_stride=16), variables, images)
    for value, name in zip(logits, ('head_logits', 'logits', 'auxiliary_logits'), strict=True):
        difference = np.abs(value - expected[name]).max()
        assert 0 < difference < 0.05 * np.abs(expected[name]).max()


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'window': 32}, 'window is 32 and window_stride None: give both'),
        ({'window_stride': 32}, 'window is None and window_stride 32: give both'),
        ({'window': 32, 'window_stride': 33}, 'a stride of at most the window'),
        ({'window': 0, 'window_stride': 0}, 'window must be None, or from 1 to'),
        ({'window': 10**9, 'window_stride': 1}, 'window must be None, or from 1 to'),
        ({'window': (32, 64), 'window_stride': 32}, 'window must be a whole number or None'),
        ({'num_classes': 0}, 'num_classes is 0: a segmenter has a logit for each of its classes'),
        ({'context_ratio': 0}, r'context_ratio must be None, or in \(0, 1\]'),
        ({'context_ratio': 2.0}, r'context_ratio must be None, or in \(0, 1\]'),
        ({'channels': 0}, 'channels must be from 1'),
        ({'auxiliary_channels': -1}, 'auxiliary_channels must be from 0'),
        ({'dropout_rate': 1.0}, r'dropout_rate must be in \[0, 1\)'),
        ({'output_stride': 7}, 'output_stride must be 4, 8, 16, 32 or None'),
        ({'align_corners': 'yes'}, 'align_corners must be True or False'),
        ({'backbone': 'fcn_resnet50_d8_voc'}, 'backbone of gc_resnet50_d8_cityscapes'),
        ({'cascade': True}, 'option of gc_resnet50_d8_cityscapes over resnet18'),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        network(**options)
    assert '\n' not in str(caught.value)


def test_a_backbone_of_one_stage_has_no_map_for_the_auxiliary_head():
    def shape_of(**more):
        model = network(stage_sizes=(1,), widths=(8,), **more)
        images = jnp.zeros((1, 16, 16, 3))
        key = jax.random.key(0)
        return jax.eval_shape(lambda: model.init_with_output(key, images, train=False)[0]).shape

    with pytest.raises(ConfigError, match=r'auxiliary head reads the last stage but one, .* set'):
        shape_of()
    assert shape_of(auxiliary_channels=0) == (1, 16, 16, 5)
