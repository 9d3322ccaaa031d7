"""timm's GC networks: their sizes and settings; tests/porting compares the outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcnet_jax.errors import ConfigError
from gcnet_jax.models import create_model

SMALL = {
    'stage_sizes': (1, 2),
    'widths': (16, 32),
    'context': {
        'stages': (1, 2),
        'position': 'after_conv2',
        'ratio': 1 / 8,
        'rounding': 'nearest',
        'norm_epsilon': 1e-6,
    },
    'stem_widths': (4, 4, 8),
    'num_classes': 5,
}
# Published: timm 1.0.31.
PARAMETERS = {
    'gcresnext26ts': 10_476_600,
    'gcresnet33ts': 19_880_698,
    'gcresnet50t': 25_897_080,
    'gcresnext50ts': 15_667_320,
}


def shapes_of(model, size=33):
    return jax.eval_shape(
        lambda key: model.init(key, jnp.zeros((1, size, size, 3)), train=False), jax.random.key(0)
    )


@pytest.fixture(scope='module')
def small():
    model = create_model('gcresnet50t', **SMALL)
    init = jax.jit(lambda key: model.init(key, jnp.zeros((1, 33, 33, 3)), train=False))
    return model, init(jax.random.key(0))


@pytest.mark.parametrize('name', PARAMETERS)
def test_parameters_are_as_many_as_published(name):
    leaves = jax.tree.leaves(shapes_of(create_model(name))['params'])
    assert sum(leaf.size for leaf in leaves) == PARAMETERS[name]


@pytest.mark.parametrize(('name', 'stem'), [('gcresnet50t', (17, 13)), ('gcresnext26ts', (33, 25))])
def test_feature_maps_have_torch_s_sizes(name, stem):
    model = create_model(name)
    images = jax.ShapeDtypeStruct((2, 66, 50, 3), jnp.float32)
    variables = shapes_of(model)
    maps = jax.eval_shape(
        lambda v, x: model.apply(v, x, train=False, method='outputs'), variables, images
    )
    assert maps['stem'].shape == (2, *stem, 64)
    assert maps['stage1'].shape == (2, 17, 13, 256)
    assert maps['stage4'].shape == (2, 3, 2, 2048)


def test_one_context_block_in_every_residual_block(small):
    _, variables = small
    blocks = [name for name in variables['params'] if name.startswith('stage')]
    assert len(blocks) == 3
    for name in blocks:
        context = variables['params'][name]['context_after_conv2_0']
        inner = variables['params'][name]['conv2']['kernel'].shape[-1]
        # timm rounds inner / 8 to the nearest: 4 / 8 is 1 after it, not 0.
        assert context['add']['reduce']['kernel'].shape == (inner, max(1, int(inner / 8 + 0.5)))


def test_only_first_blocks_that_change_the_shape_project(small):
    _, variables = small
    projected = {name for name, block in variables['params'].items() if 'shortcut_conv' in block}
    assert projected == {'stage1_0', 'stage2_0'}


def test_residual_blocks_start_as_the_identity(small):
    model, variables = small
    images = jax.random.normal(jax.random.key(1), (2, 33, 33, 3))
    _, kept = jax.jit(
        lambda v, x: model.apply(
            v, x, train=False, capture_intermediates=True, mutable=['intermediates']
        )
    )(variables, images)
    before, after = (kept['intermediates'][f'stage2_{i}']['__call__'][0] for i in (0, 1))
    np.testing.assert_array_equal(before, after)  # the second block has no projection


def test_training_updates_statistics_and_drops(small):
    model, variables = small
    dropping = model.clone(stochastic_depth_rate=0.5, dropout_rate=0.5)
    images = jax.random.normal(jax.random.key(1), (4, 33, 33, 3))

    @jax.jit
    def run(seed):
        return dropping.apply(
            variables,
            images,
            train=True,
            mutable=['batch_stats'],
            rngs={'dropout': jax.random.key(seed)},
        )

    (logits, changed), (others, _) = run(0), run(1)
    assert logits.shape == (4, 5)
    assert np.any(logits != others)
    moved = jax.tree.map(
        lambda a, b: np.any(a != b), changed['batch_stats'], variables['batch_stats']
    )
    assert all(jax.tree.leaves(moved))


def test_bfloat16_computes_in_bfloat16_and_answers_in_float32(small):
    _, variables = small
    narrow = create_model('gcresnet50t', **SMALL, dtype='bfloat16')

    def run(method):
        return jax.eval_shape(
            lambda v: narrow.apply(v, jnp.ones((1, 33, 33, 3)), train=False, method=method),
            variables,
        )

    outputs = run('outputs')
    wide = {name for name, value in outputs.items() if value.dtype == jnp.float32}
    assert wide == {'pooled', 'logits'}
    assert {outputs[name].dtype for name in outputs.keys() - wide} == {jnp.dtype('bfloat16')}
    assert run('__call__').dtype == jnp.float32


def test_wrong_settings_are_refused():
    with pytest.raises(ConfigError, match="unknown activation 'selu'; did you mean 'silu'"):
        create_model('gcresnet50t', activation='selu')
    with pytest.raises(ConfigError, match="did you mean 'group_size'"):
        create_model('gcresnet50t', groups_size=3)
