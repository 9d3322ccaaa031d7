"""timm's GC EfficientNet: its size and settings; tests/porting compares the outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcnet_jax.errors import ConfigError
from gcnet_jax.models import create_model
from gcnet_jax.models.efficientnet import EfficientStage

SMALL = {
    'stages': (
        EfficientStage('conv', 1, 8, 1),
        EfficientStage('edge', 2, 8, 2, 2),
        EfficientStage('inverted', 2, 16, 2, 4),
    ),
    'stem_width': 8,
    'head_width': 16,
    'num_classes': 5,
}


@pytest.fixture(scope='module')
def small():
    model = create_model('gc_efficientnetv2_rw_t', **SMALL)
    init = jax.jit(lambda key: model.init(key, jnp.zeros((1, 17, 17, 3)), train=False))
    return model, init(jax.random.key(0))


def test_parameters_and_sizes_are_as_published():
    model = create_model('gc_efficientnetv2_rw_t')
    images = jax.ShapeDtypeStruct((1, 66, 50, 3), jnp.float32)
    variables = jax.eval_shape(
        lambda key, x: model.init(key, jnp.zeros(x.shape), train=False), jax.random.key(0), images
    )
    # Published: timm 1.0.31.
    assert sum(leaf.size for leaf in jax.tree.leaves(variables['params'])) == 13_677_713
    maps = jax.eval_shape(
        lambda v, x: model.apply(v, x, train=False, method='outputs'), variables, images
    )
    assert maps['stem'].shape == (1, 33, 25, 24)
    assert [maps[f'stage{number}'].shape[1:] for number in range(1, 7)] == [
        (33, 25, 24),
        (17, 13, 40),
        (9, 7, 48),
        (5, 4, 104),
        (5, 4, 128),
        (3, 2, 208),
    ]


def test_context_takes_the_place_of_squeeze_excitation(small):
    _, variables = small
    holders = {name for name, block in variables['params'].items() if 'context' in block}
    assert holders == {'stage3_0', 'stage3_1'}
    # a quarter of the block's input: 8 channels, then 16
    for name, inner, hidden in (('stage3_0', 32, 2), ('stage3_1', 64, 4)):
        scale = variables['params'][name]['context']['scale']
        assert scale['reduce']['kernel'].shape == (inner, hidden)
        assert variables['params'][name]['depthwise_conv']['kernel'].shape == (3, 3, 1, inner)


def test_depthwise_kernels_start_at_a_variance_of_two_ninths(small):
    """Normal with variance 2 over the nine outputs that a position feeds, as in timm."""
    _, variables = small
    kernel = variables['params']['stage3_1']['depthwise_conv']['kernel']
    assert np.var(kernel) == pytest.approx(2 / 9, rel=0.25)


def test_training_updates_statistics_and_drops(small):
    model, variables = small
    dropping = model.clone(stochastic_depth_rate=0.9)
    images = jax.random.normal(jax.random.key(1), (4, 17, 17, 3))

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
    assert np.any(logits != others)
    moved = jax.tree.map(
        lambda a, b: np.any(a != b), changed['batch_stats'], variables['batch_stats']
    )
    assert all(jax.tree.leaves(moved))


def test_no_classifier_gives_the_pooled_features(small):
    model, variables = small
    params = {key: value for key, value in variables['params'].items() if key != 'classifier'}
    pooled = jax.eval_shape(
        lambda v: model.clone(num_classes=0).apply(v, jnp.ones((2, 17, 17, 3)), train=False),
        {'params': params, 'batch_stats': variables['batch_stats']},
    )
    assert (pooled.shape, pooled.dtype) == ((2, 16), jnp.float32)


def test_unknown_kind_of_stage_is_refused():
    with pytest.raises(
        ConfigError, match="unknown kind of stage 'inverse'; did you mean 'inverted'"
    ):
        EfficientStage('inverse', 1, 8, 1)
