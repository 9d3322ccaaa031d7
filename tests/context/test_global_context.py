"""The global context block against the paper's formulas in numpy, and what the block promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcnet_jax.context import AttentionPool, ContextFusion, ContextTransform, GlobalContext

SHAPES = {'sequence': (2, 11, 8), 'image': (2, 5, 4, 8), 'video': (2, 3, 4, 2, 8)}


def random_features(shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def numpy_transform(params, context, epsilon):
    hidden = context @ params['reduce']['kernel'] + params['reduce']['bias']
    centred = hidden - hidden.mean(-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    hidden = centred / deviation * params['norm']['scale'] + params['norm']['bias']
    return np.maximum(hidden, 0) @ params['expand']['kernel'] + params['expand']['bias']


def numpy_block(params, features, *, pooling, fusion, epsilon=1e-5, mask=None):
    """The paper's block, image by image and in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    output = np.array(features, np.float64)
    for index, image in enumerate(np.asarray(features, np.float64)):
        positions = image.reshape(-1, image.shape[-1])
        valid = np.ones(len(positions), bool) if mask is None else mask[index].reshape(-1)
        kept = positions[valid]
        if pooling == 'attention':
            logits = kept @ params['pool']['logits']['kernel'][:, 0]
            weights = np.exp(logits - logits.max())
            context = (weights / weights.sum()) @ kept
        else:
            context = kept.mean(0)
        if 'scale' in fusion:
            gate = numpy_transform(params['scale'], context, epsilon)
            output[index] = output[index] / (1 + np.exp(-gate))
        if 'add' in fusion:
            output[index] = output[index] + numpy_transform(params['add'], context, epsilon)
    return output


@pytest.mark.parametrize('dimensions', SHAPES)
@pytest.mark.parametrize('pooling', ['attention', 'average'])
@pytest.mark.parametrize('fusion', ['add', 'scale', 'scale_add'])
def test_block_computes_the_paper(dimensions, pooling, fusion, random_variables):
    features = random_features(SHAPES[dimensions])
    block = GlobalContext(ratio=1 / 2, pooling=pooling, fusion=fusion)
    variables = random_variables(block, features)
    expected = numpy_block(variables['params'], features, pooling=pooling, fusion=fusion)
    np.testing.assert_allclose(
        jax.jit(block.apply)(variables, features), expected, rtol=1e-5, atol=1e-5
    )


def test_norm_epsilon_reaches_the_norm(random_variables):
    features = random_features(SHAPES['image'])
    block = GlobalContext(ratio=1 / 2, norm_epsilon=0.5)
    variables = random_variables(block, features)
    expected = numpy_block(
        variables['params'], features, pooling='attention', fusion='add', epsilon=0.5
    )
    np.testing.assert_allclose(
        jax.jit(block.apply)(variables, features), expected, rtol=1e-5, atol=1e-5
    )


def test_defaults_are_the_papers(random_variables):
    """A sixteenth of the channels, an epsilon of 1e-5, and an update of zero at the start."""
    features = jax.ShapeDtypeStruct((1, 2, 2, 272), jnp.float32)  # 272 / 16 is 17 without rounding.
    shapes = jax.eval_shape(GlobalContext().init, jax.random.key(0), features)
    assert shapes['params']['add']['reduce']['kernel'].shape == (272, 17)

    transform, context = ContextTransform(8, 4), random_features((2, 8))
    update, _ = transform.init_with_output(jax.random.key(0), context)
    np.testing.assert_array_equal(update, 0)
    params = random_variables(transform, context)['params']
    params['reduce'] = jax.tree.map(lambda leaf: leaf * 1e-3, params['reduce'])
    update = transform.apply({'params': params}, context)
    np.testing.assert_allclose(update, numpy_transform(params, context, 1e-5), rtol=1e-4, atol=1e-6)


def test_an_update_is_fused_by_its_name_only():
    """Scale and add have the same shape: by place, one could be taken for the other."""
    features, update = random_features((1, 3, 8)), random_features((1, 8))
    with pytest.raises(TypeError, match='positional'):
        ContextFusion().apply({}, features, update)


@pytest.mark.parametrize('pooling', ['attention', 'average'])
def test_padded_batch_gives_what_each_image_gives_alone(pooling, random_variables):
    block = GlobalContext(ratio=1 / 2, pooling=pooling, fusion='scale_add')
    sizes = [(5, 4), (3, 2), (1, 4)]
    padded = np.full((3, 5, 4, 8), np.nan, np.float32)
    mask = np.zeros((3, 5, 4), bool)
    images = []
    for index, (height, width) in enumerate(sizes):
        images.append(random_features((1, height, width, 8), seed=index))
        padded[index, :height, :width] = images[-1]
        mask[index, :height, :width] = True
    variables = random_variables(block, images[0])
    together = block.apply(variables, padded, mask)
    for index, image in enumerate(images):
        alone = block.apply(variables, image)
        inside = together[index, : image.shape[1], : image.shape[2]]
        np.testing.assert_allclose(inside, alone[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('pooling', ['attention', 'average'])
def test_a_batch_may_be_empty(pooling, random_variables):
    block = GlobalContext(ratio=1 / 2, pooling=pooling)
    variables = random_variables(block, random_features((1, 5, 4, 8)))
    features, mask = np.zeros((0, 5, 4, 8), np.float32), np.zeros((0, 5, 4), bool)
    assert block.apply(variables, features).shape == features.shape
    assert block.apply(variables, features, mask).shape == features.shape


def test_masked_positions_get_exactly_zero_attention(random_variables):
    features = random_features((1, 6, 4))
    mask = np.array([[True, False, True, True, False, True]])
    pool = AttentionPool()
    variables = random_variables(pool, features)
    _, sown = pool.apply(variables, features, mask, mutable=['intermediates'])
    attention = np.asarray(sown['intermediates']['attention'][0])
    assert (attention[~mask] == 0).all()
    np.testing.assert_allclose(attention.sum(), 1.0, rtol=1e-6)


def test_an_image_without_valid_positions_has_a_zero_context_and_finite_gradients(random_variables):
    features = random_features((1, 6, 4))
    pool = AttentionPool()
    variables = random_variables(pool, features)
    mask = np.zeros((1, 6), bool)
    assert (pool.apply(variables, features, mask) == 0).all()
    gradient = jax.grad(lambda x: pool.apply(variables, x, mask).sum())(features)
    assert np.isfinite(gradient).all()


def test_add_starts_as_the_exact_identity_and_scale_at_half():
    features = random_features(SHAPES['image'])
    for fusion, factor in [('add', 1.0), ('scale', 0.5), ('scale_add', 0.5)]:
        block = GlobalContext(fusion=fusion)
        output, _ = block.init_with_output(jax.random.key(0), features)
        np.testing.assert_array_equal(output, features * np.float32(factor))


def test_without_zero_init_the_block_changes_its_input():
    features = random_features(SHAPES['image'])
    block = GlobalContext(hidden_channels=4, zero_init=False)
    output, _ = block.init_with_output(jax.random.key(0), features)
    assert np.abs(output - features).max() > 1e-3


@pytest.mark.parametrize(
    ('options', 'hidden'),
    [
        ({'ratio': 1 / 16}, 6),
        ({'ratio': 1 / 16, 'rounding': 'nearest'}, 7),
        ({'ratio': 1 / 1024}, 1),
        ({'ratio': 1 / 1024, 'rounding': 'nearest'}, 1),
        ({'hidden_channels': 5}, 5),
    ],
)
def test_hidden_width(options, hidden):
    features = jnp.zeros((1, 2, 2, 104))  # 104 / 16 = 6.5
    shapes = jax.eval_shape(GlobalContext(**options).init, jax.random.key(0), features)
    assert shapes['params']['add']['reduce']['kernel'].shape == (104, hidden)


def test_parameter_count_of_the_papers_block():
    features = jnp.zeros((1, 2, 2, 1024))
    shapes = jax.eval_shape(GlobalContext(ratio=1 / 16).init, jax.random.key(0), features)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 133_313


def test_gradients_agree_with_finite_differences_of_the_reference(random_variables):
    features = random_features((2, 3, 2, 4))
    block = GlobalContext(ratio=1 / 2, fusion='scale_add')
    variables = random_variables(block, features)
    weights = random_features(features.shape, seed=5)

    def reference(params, features):
        output = numpy_block(params, features, pooling='attention', fusion='scale_add')
        return (output * weights).sum()

    def loss(params, features):
        return (block.apply({'params': params}, features) * weights).sum()

    gradients = jax.grad(loss, argnums=(0, 1))(variables['params'], features)
    leaves, structure = jax.tree.flatten((variables['params'], features))
    leaves = [np.asarray(leaf, np.float64) for leaf in leaves]
    for place, gradient in enumerate(jax.tree.leaves(gradients)):
        numeric = np.zeros_like(leaves[place])
        for index in np.ndindex(numeric.shape):
            values = []
            for step in (1e-5, -1e-5):
                moved = [leaf.copy() for leaf in leaves]
                moved[place][index] += step
                values.append(reference(*jax.tree.unflatten(structure, moved)))
            numeric[index] = (values[0] - values[1]) / 2e-5
        np.testing.assert_allclose(gradient, numeric, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, None])
def test_bfloat16_stays_close_to_float32(dtype, random_variables):
    features = random_features((2, 7, 7, 32))
    block = GlobalContext(ratio=1 / 4, fusion='scale_add')
    variables = jax.tree.map(lambda leaf: leaf * 0.3, random_variables(block, features))
    exact = np.asarray(block.apply(variables, features))
    low = GlobalContext(ratio=1 / 4, fusion='scale_add', dtype=dtype)
    output = low.apply(variables, jnp.asarray(features, jnp.bfloat16))
    assert output.dtype == jnp.bfloat16
    error = np.abs(np.asarray(output, np.float32) - exact).max() / np.abs(exact).max()
    assert error < 2e-2


def test_softmax_runs_in_float32_over_many_positions():
    """8,192 equal positions in bfloat16: a sum in bfloat16 would stop growing at 256."""
    features = jnp.ones((1, 8192, 4), jnp.bfloat16)
    pool = AttentionPool(dtype=jnp.bfloat16)
    variables = pool.init(jax.random.key(0), features)
    context, sown = pool.apply(variables, features, mutable=['intermediates'])
    attention = sown['intermediates']['attention'][0]
    assert attention.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(context, np.float32), 1.0, rtol=1e-2)


def test_the_parts_work_alone():
    features = random_features(SHAPES['image'])
    context, _ = AttentionPool().init_with_output(jax.random.key(0), features)
    assert context.shape == (2, 8)
    update, _ = ContextTransform(8, 2, zero_init=False).init_with_output(jax.random.key(1), context)
    fused, _ = ContextFusion().init_with_output(jax.random.key(2), features, add=update)
    expected = features + np.asarray(update)[:, None, None]
    np.testing.assert_allclose(fused, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ('features', 'error', 'message'),
    [
        (np.zeros((4, 8), np.float32), ValueError, r'got shape \(4, 8\)'),
        (np.zeros((1, 4, 4, 8), np.uint8), TypeError, 'got uint8'),
        ([[1.0]], TypeError, 'got list'),
        (np.zeros((1, 0, 4, 8), np.float32), ValueError, 'none of them empty'),
    ],
)
def test_wrong_features_are_refused(features, error, message):
    with pytest.raises(error, match=message):
        GlobalContext().init(jax.random.key(0), features)


@pytest.mark.parametrize(
    ('mask', 'error', 'message'),
    [
        (np.ones((2, 5, 4), np.float32), TypeError, 'got float32'),
        (np.ones((2, 5), bool), ValueError, r'got shape \(2, 5\)'),
    ],
)
def test_wrong_masks_are_refused(mask, error, message):
    with pytest.raises(error, match=message):
        GlobalContext().init(jax.random.key(0), np.zeros(SHAPES['image'], np.float32), mask)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'ratio': 16}, r'ratio must be in \(0, 1\], got 16; did you mean 1/16\?'),
        ({'ratio': 0}, r'ratio must be in \(0, 1\], got 0'),
        ({'ratio': -0.5}, 'got -0.5'),
        ({'hidden_channels': 0}, 'hidden_channels must be 1 or more, got 0'),
        ({'pooling': 'attn'}, "unknown pooling 'attn'.*attention"),
        ({'fusion': 'adds'}, "unknown fusion 'adds'; did you mean 'add'"),
        ({'rounding': 'ceil'}, "unknown rounding 'ceil'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GlobalContext(**options).init(jax.random.key(0), np.zeros(SHAPES['image'], np.float32))
