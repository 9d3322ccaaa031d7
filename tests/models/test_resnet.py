"""ResNets: parameter counts, geometry, placement of the context, and what stays as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcnet_jax.errors import ConfigError
from gcnet_jax.models import create_model
from gcnet_jax.models.backbone import stage_strides
from gcnet_jax.models.layers import Conv
from gcnet_jax.models.resnet import BasicBlock, zero_pad_shortcut

GC = {'block': 'global_context', 'stages': (2, 3, 4), 'position': 'after_conv3', 'ratio': 1 / 16}
SMALL = {'stage_sizes': (1, 1, 1, 1), 'widths': (4, 8, 12, 16), 'num_classes': 5}


def initialised(model, images):
    return jax.jit(lambda key, images: model.init(key, images, train=False))(
        jax.random.key(0), images
    )


def run(model, variables, images, **options):
    options = {'train': False} | options
    return jax.jit(lambda variables, images: model.apply(variables, images, **options))(
        variables, images
    )


def shapes_of(model, size=64):
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return jax.eval_shape(lambda images: model.init(jax.random.key(0), images, train=False), images)


def random_images(size, batch=2):
    return np.random.default_rng(0).normal(size=(batch, size, size, 3)).astype(np.float32)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ('name', 'parameters'),
    [
        ('resnet18', 11_689_512),
        ('resnet34', 21_797_672),
        ('resnet50', 25_557_032),
        ('resnet101', 44_549_160),
        ('resnet152', 60_192_808),
        ('resnext50_32x4d', 25_028_904),
        ('resnext101_32x4d', 44_177_704),
        ('gc_resnet50', 28_078_773),
        ('gc_resnet50_r4', 35_557_941),
        ('gc_resnet50_c4', 25_690_345),
        ('nl_resnet50_c4', 27_656_744),
        ('snl_resnet50_c4', 26_607_657),
        ('resnet20', 272_474),
        ('resnet56', 855_770),
        # Those of akamaster/pytorch_resnet_cifar10, which agree with the paper's table 6.
        ('resnet20_a', 269_722),
        ('resnet32_a', 464_154),
        ('resnet44_a', 658_586),
        ('resnet56_a', 853_018),
        ('resnet110_a', 1_727_962),
        ('gccnn', 1_213_885),
    ],
)
def test_parameter_count(name, parameters):
    assert count(shapes_of(create_model(name))['params']) == parameters


@pytest.mark.parametrize(
    ('ratio', 'parameters'),
    [(4, 35_557_941), (8, 30_571_829), (16, 28_078_773), (32, 26_832_245)],
)
def test_parameter_count_by_ratio(ratio, parameters):
    model = create_model('resnet50', context=GC | {'ratio': 1 / ratio})
    assert count(shapes_of(model)['params']) == parameters


def test_which_blocks_project_their_shortcut():
    for name, expected in [
        ('resnet50', {'stage1_0', 'stage2_0', 'stage3_0', 'stage4_0'}),
        ('resnet18', {'stage2_0', 'stage3_0', 'stage4_0'}),
        ('gccnn', {'stage1_0', 'stage2_0', 'stage3_0'}),
    ]:
        params = shapes_of(create_model(name))['params']
        assert {key for key in params if 'shortcut_conv' in params[key]} == expected


def reference_convolution(features, kernel, stride):
    """A 3x3 convolution with one position of padding, in numpy."""
    batch, height, width, _ = features.shape
    padded = np.pad(features, ((0, 0), (1, 1), (1, 1), (0, 0)))
    output = np.zeros((batch, -(-height // stride), -(-width // stride), kernel.shape[-1]))
    for row in range(output.shape[1]):
        for column in range(output.shape[2]):
            top, left = row * stride, column * stride
            window = padded[:, top : top + 3, left : left + 3]
            output[:, row, column] = np.tensordot(window, kernel, axes=3)
    return output


@pytest.mark.parametrize('size', [8, 7])
def test_a_zero_padded_shortcut_is_the_reference(size, random_variables):
    """Every second position, and a quarter of the output's channels of zeros on each side."""
    features = np.random.default_rng(1).normal(size=(2, size, size, 4)).astype(np.float32)
    block = BasicBlock(width=8, stride=2, shortcut='zero_pad')
    variables = random_variables(block, features, train=False)
    params, statistics = variables['params'], variables['batch_stats']
    assert set(params) == {'conv1', 'norm1', 'conv2', 'norm2'}

    def norm(values, name):
        mean, var = statistics[name]['mean'], statistics[name]['var']
        scaled = (values - mean) / np.sqrt(var + 1e-5)
        return scaled * params[name]['scale'] + params[name]['bias']

    branch = reference_convolution(features, params['conv1']['kernel'], 2)
    branch = reference_convolution(
        np.maximum(norm(branch, 'norm1'), 0), params['conv2']['kernel'], 1
    )
    shortcut = np.zeros((2, -(-size // 2), -(-size // 2), 8))
    shortcut[..., 2:6] = features[:, ::2, ::2]
    expected = np.maximum(norm(branch, 'norm2') + shortcut, 0)
    np.testing.assert_allclose(run(block, variables, features), expected, atol=1e-5)


def test_an_odd_channel_of_zeros_follows_the_input():
    features = np.ones((1, 2, 2, 3), np.float32)
    padded = np.asarray(zero_pad_shortcut(features, 1, 8))
    np.testing.assert_array_equal(padded[0, 0, 0], [0, 0, 1, 1, 1, 0, 0, 0])
    with pytest.raises(ConfigError, match='cannot take 3 channels to 2'):
        zero_pad_shortcut(features, 1, 2)


def test_no_network_with_zero_padded_shortcuts_has_parameters_in_them():
    context = GC | {'position': 'after_conv2', 'ratio': 1 / 4, 'stages': (2, 3)}
    for name, options in [
        ('resnet20_a', {'context': context}),
        ('gc_resnet50', {'shortcut': 'zero_pad'}),
        ('gccnn', {'shortcut': 'zero_pad'}),
    ]:
        params = shapes_of(create_model(name, **options))['params']
        blocks = [block for key, block in params.items() if key.startswith('stage')]
        assert not any(part.startswith('shortcut') for block in blocks for part in block)
        assert any(part.startswith('context') for block in blocks for part in block)
    with pytest.raises(ConfigError, match=r"unknown shortcut 'identity'; known: .*zero_pad"):
        create_model('resnet20', shortcut='identity')


@pytest.mark.parametrize('size', [224, 97])
def test_feature_maps_have_torchvisions_sizes(size):
    model = create_model('resnet50')
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    maps = jax.eval_shape(
        lambda variables, images: model.apply(variables, images, train=False, method='outputs'),
        shapes_of(model),
        images,
    )
    names = ['stem', 'stage1', 'stage2', 'stage3', 'stage4']
    sizes = [-(-size // 2**halvings) for halvings in range(1, 6)]
    assert maps.keys() == {*names, 'pooled', 'logits'}
    assert [maps[name].shape[1] for name in names] == sizes
    assert [maps[name].shape[3] for name in names] == [64, 256, 512, 1024, 2048]


@pytest.mark.parametrize(
    ('name', 'positions'),
    [
        ('resnet50', ('after_conv1', 'after_conv2', 'after_conv3', 'after_add')),
        ('resnet18', ('after_conv1', 'after_conv2', 'after_add')),
    ],
)
def test_context_at_its_start_changes_no_bit(name, positions):
    images = random_images(33)
    small = SMALL | {'stage_sizes': (1, 1), 'widths': (4, 8)}
    context = [
        GC | {'position': position, 'stages': (1, 2), 'ratio': 1 / 2} for position in positions
    ]
    plain, with_context = create_model(name, **small), create_model(name, **small, context=context)
    assert_same_bits(plain, with_context, images)


@pytest.mark.slow
def test_context_at_its_start_changes_no_bit_of_the_whole_resnet50():
    assert_same_bits(create_model('resnet50'), create_model('gc_resnet50'), random_images(224))


def assert_same_bits(plain, with_context, images):
    variables, more = initialised(plain, images), initialised(with_context, images)
    assert count(more['params']) > count(variables['params'])
    outputs = [run(plain, variables, images), run(with_context, more, images)]
    np.testing.assert_array_equal(*[np.asarray(output).view(np.uint32) for output in outputs])


def test_position_decides_the_width_of_the_context():
    widths = {'after_conv1': 4, 'after_conv2': 4, 'after_conv3': 16, 'after_add': 16}
    for position, width in widths.items():
        model = create_model('resnet50', **SMALL, context=GC | {'position': position, 'stages': 1})
        block = shapes_of(model)['params']['stage1_0'][f'context_{position}_0']
        assert block['pool']['logits']['kernel'].shape == (width, 1)


def test_blocks_chain_in_the_order_given(random_variables):
    """GC then SE, and SE then GC, each against the same blocks applied by hand."""
    gc = GC | {'stages': 1, 'position': 'after_add', 'ratio': 1 / 2}
    se = {'block': 'squeeze_excite', 'stages': 1, 'position': 'after_add', 'ratio': 1 / 2}
    images = random_images(16, batch=1)
    small = {'stage_sizes': (1,), 'widths': (8,), 'stem': 'none', 'num_classes': 0}
    for order in ((gc, se), (se, gc)):
        model = create_model('resnet18', **small, context=order)
        variables = random_variables(model, images, train=False)
        block = variables['params']['stage1_0']
        plain = create_model('resnet18', **small, context=None)
        values = run(plain, variables, images, method='outputs')['stage1']
        for index, entry in enumerate(order):
            params = block[f'context_after_add_{index}']
            assert ('pool' in params) == (entry is gc)
            values = model.context[index].build().apply({'params': params}, values)
        pooled = run(model, variables, images)
        np.testing.assert_allclose(pooled, values.mean((1, 2)), rtol=1e-5)


def test_several_positions_and_chosen_blocks():
    context = (GC | {'stages': 3, 'blocks': (0, -1)}, GC | {'position': 'after_conv1', 'stages': 3})
    params = shapes_of(create_model('resnet50', context=context))['params']
    last = {key for key in params if 'context_after_conv3_0' in params[key]}
    first = {key for key in params if 'context_after_conv1_0' in params[key]}
    assert last == {'stage3_0', 'stage3_5'}
    assert first == {f'stage3_{index}' for index in range(6)}


def test_without_classes_the_output_is_the_pooled_features(random_variables):
    images = random_images(40)
    model = create_model('resnet18', **SMALL | {'num_classes': 0})
    variables = random_variables(model, images, train=False)
    output = run(model, variables, images)
    maps = run(model, variables, images, method='outputs')
    assert output.shape == (2, 16)
    np.testing.assert_allclose(output, np.asarray(maps['stage4']).mean((1, 2)), rtol=1e-5)


def test_bfloat16_computes_low_and_keeps_float32_parameters(random_variables):
    images = random_images(64)
    exact = create_model('gc_resnet50', **SMALL)
    low = create_model('gc_resnet50', **SMALL, dtype='bfloat16')
    variables = random_variables(exact, images, train=False)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes_of(low))} == {jnp.dtype('float32')}
    assert run(low, variables, images, method='outputs')['stage4'].dtype == jnp.bfloat16
    logits, expected = run(low, variables, images), run(exact, variables, images)
    assert logits.dtype == jnp.float32
    assert np.abs(logits - expected).max() < 2e-2 * np.abs(expected).max()


def test_zero_init_residual_starts_each_block_as_its_shortcut():
    images = random_images(16)
    small = SMALL | {'stage_sizes': (2,), 'widths': (4,)}
    model = create_model('resnet18', **small, zero_init_residual=True)
    maps = run(model, initialised(model, images), images, method='outputs')
    stem = np.pad(maps['stem'], ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(stem, (3, 3), axis=(1, 2))
    np.testing.assert_array_equal(maps['stage1'], windows[:, ::2, ::2].max((-2, -1)))


def test_training_updates_the_statistics_and_drops_by_the_key(random_variables):
    images = random_images(16, batch=8)
    model = create_model('resnet18', **SMALL, dropout_rate=0.5, stochastic_depth_rate=0.5)
    variables = random_variables(model, images, train=False)

    @jax.jit
    def train(seed):
        key = jax.random.key(seed)
        return model.apply(
            variables, images, train=True, mutable=['batch_stats'], rngs={'dropout': key}
        )

    (first, updated), (again, _), (other, _) = train(1), train(1), train(2)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0
    before, after = variables['batch_stats']['stem_norm'], updated['batch_stats']['stem_norm']
    padded = np.pad(images, ((0, 0), (3, 3), (3, 3), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (7, 7), axis=(1, 2))[:, ::2, ::2]
    kernel = variables['params']['stem_conv']['kernel']
    convolved = np.einsum('bhwcyx,yxco->bhwo', windows, kernel)
    mean = 0.9 * before['mean'] + 0.1 * convolved.mean((0, 1, 2))
    variance = 0.9 * before['var'] + 0.1 * convolved.var((0, 1, 2))
    np.testing.assert_allclose(after['mean'], mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(after['var'], variance, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ('images', 'error', 'message'),
    [
        (np.zeros((1, 32, 32, 3), np.uint8), TypeError, 'got uint8; scale to 0..1 and normalise'),
        (np.zeros((32, 32, 3), np.float32), ValueError, r'got shape \(32, 32, 3\)'),
    ],
)
def test_wrong_images_are_refused(images, error, message):
    with pytest.raises(error, match=message):
        create_model('resnet18', **SMALL).init(jax.random.key(0), images, train=False)


def dilated_reference(features, kernel, stride, dilation):
    """A 3x3 convolution from its definition, as PyTorch pads."""
    padded = np.pad(features, ((0, 0), (dilation,) * 2, (dilation,) * 2, (0, 0)))
    height, width = (-(-size // stride) for size in features.shape[1:3])
    total = 0
    for row, column in np.ndindex(3, 3):
        seen = padded[:, row * dilation :: stride, column * dilation :: stride]
        total = total + seen[:, :height, :width] @ kernel[row, column]
    return total


@pytest.mark.parametrize(('stride', 'dilation'), [(1, 2), (2, 2), (1, 4)])
def test_a_dilated_convolution_is_the_definition(stride, dilation):
    features = random_images(13)
    kernel = np.random.default_rng(1).normal(size=(3, 3, 3, 5)).astype(np.float32)
    conv = Conv(5, 3, stride, dilation=dilation)
    actual = conv.apply({'params': {'kernel': kernel}}, features)
    expected = dilated_reference(features, kernel, stride, dilation)
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_output_stride_dilates_instead_of_striding(random_variables):
    images = random_images(64)
    model = create_model('resnet50', **SMALL, output_stride=8)
    variables = random_variables(model, images, train=False)
    maps = run(model, variables, images, method='outputs')
    assert [maps[f'stage{stage}'].shape[1] for stage in (1, 2, 3, 4)] == [16, 8, 8, 8]
    # Stage 3 dilates by 2 from its second block on, stage 4 begins with that and goes on with 4.
    assert list(stage_strides((1, 2, 2, 2), 4, 8)) == [(1, 1, 1), (2, 1, 1), (1, 1, 2), (1, 2, 4)]
    assert list(stage_strides((1, 2, 2, 2), 4, 16)) == [(1, 1, 1), (2, 1, 1), (2, 1, 1), (1, 1, 2)]
    assert list(stage_strides((1, 2), 4, None)) == [(1, 1, 1), (2, 1, 1)]
    # Every dilated map, taken at the plain network's positions, would need the plain inputs: only
    # the parameters are the same, so that trained weights serve both.
    plain = shapes_of(create_model('resnet50', **SMALL))
    assert jax.tree.map(jnp.shape, plain) == jax.tree.map(jnp.shape, shapes_of(model))


def test_the_deep_stem_is_three_convolutions_and_pooling(random_variables):
    images = random_images(32)
    model = create_model('resnet18', **SMALL, stem='deep')
    variables = random_variables(model, images, train=False)
    maps = run(model, variables, images, method='outputs')
    values = images
    for index in range(3):
        kernel = variables['params'][f'stem_conv_{index}']['kernel']
        norm, stats = (variables[name][f'stem_norm_{index}'] for name in ('params', 'batch_stats'))
        values = dilated_reference(values, kernel, 2 if index == 0 else 1, 1)
        scale = norm['scale'] / np.sqrt(stats['var'] + 1e-5)
        values = np.maximum((values - stats['mean']) * scale + norm['bias'], 0)
    np.testing.assert_allclose(maps['stem'], values, rtol=1e-3, atol=1e-4)
    assert maps['stage1'].shape[1:3] == (8, 8)
    width = model.widths[0]
    kernels = [variables['params'][f'stem_conv_{i}']['kernel'].shape[3] for i in range(3)]
    assert kernels == [width // 2, width // 2, width]
