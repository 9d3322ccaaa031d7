"""Starting from a checkpoint: its network, preprocessing, weights and classifier."""

import jax
import numpy as np
import pytest

from gcnet_jax.data.preprocessing import Preprocessing
from gcnet_jax.errors import CheckpointError
from gcnet_jax.stored import ModelDescription
from gcnet_jax.training.config import default_config
from gcnet_jax.training.initial import (
    explain_other_network,
    merge_initial,
    preprocessing,
    take_network,
)

OWN = Preprocessing((0.5,) * 3, (0.25,) * 3, 'bicubic', 0.9, 160, 192)


def same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def variables(classes=3, context=False, extra=False):
    params = {'conv': {'kernel': np.ones((3, 4))}, 'classifier': {'kernel': np.ones((4, classes))}}
    if context:
        params['stage1_0'] = {'context_after_conv2_0': {'expand': {'kernel': np.zeros((4, 4))}}}
    if extra:
        params['head'] = {'kernel': np.ones((2, 2))}
    return {'params': params, 'batch_stats': {'norm': {'mean': np.ones(4)}}}


def test_initial_weights_fill_all_but_the_missing_context():
    loaded = jax.tree.map(lambda leaf: leaf * 5, variables())
    merged, new = merge_initial(variables(context=True), loaded, kept=None, place='x')
    assert new == ['params/stage1_0/context_after_conv2_0/expand/kernel']
    context = merged['params'].pop('stage1_0')
    same(merged, loaded)
    assert not context['context_after_conv2_0']['expand']['kernel'].any()


@pytest.mark.parametrize(
    ('fresh', 'loaded', 'message'),
    [
        (variables(extra=True), variables(), '1 missing, first params/head/kernel'),
        (variables(), variables(extra=True), '1 not in the network, first params/head/kernel'),
        (variables(), variables(context=True), '1 not in the network, first params/stage1_0'),
    ],
)
def test_weights_of_another_network_are_refused(fresh, loaded, message):
    with pytest.raises(CheckpointError, match=message):
        merge_initial(fresh, loaded, kept=(), place='x')


def test_outputs_that_are_not_kept_stay_as_they_were():
    fresh, loaded = variables(classes=7), jax.tree.map(lambda leaf: leaf * 5, variables())
    merged, _ = merge_initial(fresh, loaded, kept=(), place='x')
    np.testing.assert_array_equal(merged['params']['classifier']['kernel'], np.ones((4, 7)))
    np.testing.assert_array_equal(merged['params']['conv']['kernel'], np.full((3, 4), 5))
    same_size, _ = merge_initial(variables(), loaded, kept=(), place='x')
    np.testing.assert_array_equal(same_size['params']['classifier']['kernel'], np.ones((4, 3)))
    with pytest.raises(CheckpointError, match='1 of another shape, first params/classifier'):
        merge_initial(fresh, loaded, kept=None, place='x')


def test_outputs_are_moved_to_their_labels():
    fresh, loaded = variables(classes=4), variables()
    kernel, bias = np.arange(12.0).reshape(4, 3), np.arange(3.0)
    loaded['params']['classifier'] = {'kernel': kernel, 'bias': bias}
    fresh['params']['classifier']['bias'] = np.full(4, -1.0)
    merged, _ = merge_initial(fresh, loaded, kept=((3, 0), (0, 2)), place='x')
    head = merged['params']['classifier']
    np.testing.assert_array_equal(head['bias'], [2, -1, -1, 0])
    np.testing.assert_array_equal(head['kernel'][0], [2, 1, 1, 0])
    np.testing.assert_array_equal(head['kernel'][3], [11, 1, 1, 9])


def test_a_checkpoint_without_a_classifier_leaves_it_at_random():
    fresh, loaded = variables(), jax.tree.map(lambda leaf: leaf * 5, variables())
    del loaded['params']['classifier']
    merged, _ = merge_initial(fresh, loaded, kept=(), place='x')
    np.testing.assert_array_equal(merged['params']['classifier']['kernel'], np.ones((4, 3)))


def description(labels=(), classes=None, **others):
    count = len(labels) if classes is None else classes
    return ModelDescription('resnet18', {'num_classes': count}, tuple(labels), **others)


def test_the_network_of_a_checkpoint_is_taken_with_its_options():
    context = {'stages': (3,), 'position': 'after_conv2', 'ratio': 0.5}
    there = ModelDescription(
        'gc_resnet18',
        {
            'num_classes': 9,
            'dtype': 'bfloat16',
            'context': context,
            'widths': (8, 8, 8, 8),
            'norm': {'kind': 'group', 'channel_groups': 4},
        },
        preprocessing=OWN,
    )
    config = default_config()
    assert take_network(config, there) is config
    config.model.name = None
    config.model.dropout_rate = 0.3
    model = take_network(config, there).model.to_dict()
    assert model == {
        'name': 'gc_resnet18',
        'num_classes': None,
        'dtype': 'float32',
        'context': context,
        'widths': (8, 8, 8, 8),
        'dropout_rate': 0.3,
        'norm': {'kind': 'group', 'group_size': None, 'channel_groups': 4},
    }
    config.model.context = None
    config.model.norm.kind = 'frozen'
    model = take_network(config, there).model
    assert (model.context, model.norm.kind, model.norm.channel_groups) == (None, 'frozen', None)


def test_images_are_as_in_the_checkpoint_but_for_what_is_set():
    there = description('abc', preprocessing=OWN)
    config = default_config()
    config.model.name = 'gcresnet50t'
    assert preprocessing(config, there) == OWN
    assert preprocessing(config, None).train_size == 256
    assert preprocessing(config, None).test_size == 288
    config.data.image_size = 96
    config.data.mean, config.data.crop_fraction = (0.1, 0.2, 0.3), 1.0
    expected = Preprocessing((0.1, 0.2, 0.3), (0.25,) * 3, 'bicubic', 1.0, 96, 96)
    assert preprocessing(config, there) == expected
    config.data.evaluation_image_size = 128
    assert preprocessing(config, there).test_size == 128


def test_the_error_for_another_network_names_both():
    problem = CheckpointError('DIR is of another network: 5 missing, first a/b')
    here, there = description('abc'), ModelDescription('gcresnet50t', {'num_classes': 3})
    text = str(explain_other_network(problem, here, there, 'DIR'))
    assert 'DIR holds gcresnet50t, and config.model.name is resnet18' in text
    assert '5 missing, first a/b' in text
    assert '--config.model.name=gcresnet50t' in text
    wide = ModelDescription('resnet18', {'num_classes': 3, 'widths': (8, 8, 8, 8)})
    text = str(explain_other_network(problem, here, wide, 'DIR'))
    assert 'widths is (8, 8, 8, 8) there and None here' in text
