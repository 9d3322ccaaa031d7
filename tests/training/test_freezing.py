import jax
import numpy as np
import pytest

from gcnet_jax.errors import ConfigError
from gcnet_jax.models.registry import create_model
from gcnet_jax.training.freezing import (
    frozen_paths,
    frozen_statistics,
    is_frozen_module,
    layer_distances,
    merge,
    parse_patterns,
    split,
)

PARAMS = {
    'stem_conv': {'kernel': 0},
    'stem_norm': {'scale': 1, 'bias': 2},
    'stage1_0': {'conv1': {'kernel': 3}, 'norm1': {'scale': 4, 'bias': 5}},
    'stage1_10': {'conv1': {'kernel': 6}, 'norm1': {'scale': 7, 'bias': 8}},
    'classifier': {'kernel': 9, 'bias': 10},
}


def frozen(*patterns):
    taken = split(PARAMS, frozen_paths(PARAMS, patterns))[1]
    return sorted(jax.tree.leaves(taken))


@pytest.mark.parametrize(
    ('patterns', 'expected'),
    [
        ((), []),
        (('stem_conv',), [0]),
        (('stem*',), [0, 1, 2]),
        (('stage1_1*',), [6, 7, 8]),
        (('stage1_?',), [3, 4, 5]),
        (('*/norm*',), [4, 5, 7, 8]),
        (('*norm*',), [1, 2, 4, 5, 7, 8]),
        (('*/bias',), [2, 5, 8, 10]),
        (('*', '!classifier'), [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (('stage*', '!*/norm1', 'stage1_0/norm1/bias'), [3, 5, 6]),
        (('!classifier', 'stem_conv'), [0]),
        (('[!c]*',), [0, 1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_patterns_freeze_parameters_and_what_is_below_modules(patterns, expected):
    assert frozen(*patterns) == expected


@pytest.mark.parametrize('pattern', ['stage', 'layer1*', 'Stem*', 'conv1', '!head'])
def test_a_pattern_that_matches_nothing_is_refused_with_what_there_is(pattern):
    with pytest.raises(
        ConfigError, match='modules are classifier, stage1_0, stage1_10, stem_conv'
    ) as caught:
        frozen('stem*', pattern)
    assert repr(pattern) in str(caught.value)
    assert 'stage1_0/conv1/kernel' in str(caught.value)


def test_something_must_be_left_to_train():
    with pytest.raises(ConfigError, match='freezes every parameter'):
        frozen('*')
    with pytest.raises(ConfigError, match='freezes every parameter'):
        frozen('st*', 'classifier')
    with pytest.raises(ConfigError, match="further pattern '!head'"):
        frozen_paths({'backbone': PARAMS, 'head': {'kernel': 0}}, ('*',))


@pytest.mark.parametrize(
    ('setting', 'expected'),
    [
        (None, ()),
        ('', ()),
        ('stem*', ('stem*',)),
        ('*, !classifier', ('*', '!classifier')),
        (['stem*', 'stage1*'], ('stem*', 'stage1*')),
    ],
)
def test_patterns_are_a_sequence_or_one_string(setting, expected):
    assert parse_patterns(setting) == expected


def test_the_parts_make_the_whole():
    for chosen in (frozenset(), frozenset({'stem_conv/kernel', 'stage1_0/norm1/bias'})):
        rest, taken = split(PARAMS, chosen)
        assert len(jax.tree.leaves(taken)) == len(chosen)
        assert merge(rest, taken) == PARAMS


def test_a_module_is_frozen_with_all_its_parameters():
    chosen = frozen_paths(PARAMS, ('stage1_0', 'stem_norm/scale'))
    assert is_frozen_module(('stage1_0',), PARAMS, chosen)
    assert is_frozen_module(('stage1_0', 'norm1'), PARAMS, chosen)
    # It has no parameters of its own.
    assert is_frozen_module(('stage1_0', 'Dropout_0'), PARAMS, chosen)
    assert not is_frozen_module(('Dropout_0',), PARAMS, chosen)
    assert not is_frozen_module((), PARAMS, chosen)
    assert not is_frozen_module(('stem_norm',), PARAMS, chosen)
    stats = {'stem_norm': {'mean': 0}, 'stage1_0': {'norm1': {'mean': 1, 'var': 2}}}
    assert frozen_statistics(stats, PARAMS, chosen) == {
        'stage1_0/norm1/mean',
        'stage1_0/norm1/var',
    }


def test_layers_are_counted_down_from_the_classifier():
    assert layer_distances(PARAMS) == {
        'stem_conv': 3,
        'stem_norm': 3,
        'stage1_0': 2,
        'stage1_10': 1,
        'classifier': 0,
    }
    efficientnet = ['stage10_0', 'stage2_0', 'stage2_1', 'head_conv', 'head_norm', 'stem_conv']
    assert layer_distances(dict.fromkeys(efficientnet)) == {
        'stem_conv': 4,
        'stage2_0': 3,
        'stage2_1': 2,
        'stage10_0': 1,
        'head_conv': 0,
        'head_norm': 0,
    }
    backbone = {name: leaf for name, leaf in PARAMS.items() if name != 'classifier'}
    heads = {'head': PARAMS['classifier'], 'auxiliary_head': PARAMS['classifier']}
    assert layer_distances({'backbone': backbone, **heads}) == {
        'backbone/stem_conv': 3,
        'backbone/stem_norm': 3,
        'backbone/stage1_0': 2,
        'backbone/stage1_10': 1,
        'head': 0,
        'auxiliary_head': 0,
    }


@pytest.mark.parametrize(('name', 'blocks'), [('gccnn', 3), ('resnet20', 9)])
def test_every_block_of_a_network_is_a_layer(name, blocks):
    model = create_model(name, num_classes=2)
    images = np.zeros((1, 32, 32, 3), np.float32)
    params = jax.eval_shape(lambda key: model.init(key, images, train=False), jax.random.key(0))
    distances = layer_distances(params['params'])
    assert distances['classifier'] == 0
    stages = [value for key, value in distances.items() if key.startswith('stage')]
    assert sorted(stages) == list(range(1, blocks + 1))
    assert distances['stage1_0'] == blocks
    assert distances.get('stem_conv', blocks + 1) == blocks + 1
