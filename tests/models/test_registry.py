"""Networks by name, and what a wrong name or option is told."""

import fnmatch

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from gcnet_jax.errors import ConfigError
from gcnet_jax.models import create_model, list_models, model_entry


def test_every_name_builds_a_module():
    assert len(list_models()) > 20
    for name in list_models():
        assert isinstance(create_model(name), nn.Module)
        assert model_entry(name).description


def test_list_models_takes_a_pattern():
    names = list_models('gc_*')
    assert 'gc_resnet50' in names
    assert names == sorted(name for name in list_models() if fnmatch.fnmatch(name, 'gc_*'))
    assert list_models('nothing*') == []


def test_context_none_is_the_plain_network():
    assert create_model('gc_resnet50', context=None) == create_model('resnet50')


def test_dtype_by_name_is_the_dtype():
    assert create_model('resnet18', dtype='bfloat16').dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ('name', 'options', 'message'),
    [
        ('gc_resnet5', {}, "unknown model 'gc_resnet5'; did you mean .*'gc_resnet50'"),
        (
            'resnet50',
            {'num_clases': 3},
            "option of resnet50 'num_clases'; did you mean 'num_classes'",
        ),
        ('resnet50', {'num_classes': -1}, 'num_classes must be 0 .* got -1'),
        ('resnet50', {'num_classes': 2.5}, 'num_classes must be a whole number, got 2.5'),
        ('resnet50', {'dropout_rate': 1.0}, r'dropout_rate must be in \[0, 1\), got 1.0'),
        ('resnet50', {'stochastic_depth_rate': -0.1}, 'stochastic_depth_rate must be in'),
        ('resnet50', {'dtype': 'bfloat'}, "unknown dtype 'bfloat'; did you mean 'bfloat16'"),
        ('resnet50', {'stem': 'tiny'}, "unknown stem 'tiny'"),
        ('resnet50', {'context': 'gc'}, "context must be a mapping .* got 'gc'"),
        ('resnet50', {'context': [1]}, 'each entry must be a mapping, got 1'),
        ('resnet50', {'context': {'position': 'after_conv3'}}, 'global_context needs stages'),
        (
            'mask_rcnn_resnet50_fpn',
            {'box_chanels': 3},
            "over resnet50 'box_chanels'.*'box_channels'",
        ),
        ('mask_rcnn_resnet50_fpn', {'dropout_rate': 0.5}, "over resnet50 'dropout_rate'"),
        ('mask_rcnn_resnet50_fpn', {'backbone': 'resnet5'}, 'unknown backbone of mask_rcnn'),
    ],
)
def test_wrong_names_and_options_are_refused(name, options, message):
    with pytest.raises(ConfigError, match=message):
        create_model(name, **options)


@pytest.mark.parametrize(
    ('name', 'change', 'message'),
    [
        ('resnet50', {'block': 'global_contxt'}, "did you mean 'global_context'"),
        ('resnet50', {'position': 'after_conv'}, 'did you mean .*after_conv'),
        ('resnet18', {'position': 'after_conv3'}, 'they have after_conv1, after_conv2, after_add'),
        ('resnet50', {'stages': (2, 5)}, 'stage 5 is not in this network; it has stages 1 to 4'),
        ('resnet50', {'stages': 'c3'}, "stages must be whole numbers .* got 'c3'"),
        ('resnet50', {'blocks': 4}, 'index 4 is not in stage 2, which has 4 blocks: -4 to 3'),
        ('resnet50', {'ration': 0.5}, "unknown option of context block .*did you mean .*'ratio'"),
    ],
)
def test_wrong_placements_are_refused(name, change, message):
    context = {'block': 'global_context', 'stages': (2, 3, 4), 'position': 'after_conv2'}
    with pytest.raises(ConfigError, match=message):
        create_model(name, context=context | change)


def test_a_ratio_out_of_range_is_refused_before_anything_is_compiled():
    context = {'stages': (2,), 'position': 'after_conv3', 'ratio': 16}
    model = create_model('resnet50', context=context)
    images = jnp.zeros((1, 32, 32, 3))
    with pytest.raises(ConfigError, match=r'got 16; did you mean 1/16\?'):
        jax.eval_shape(lambda key: model.init(key, images, train=False), jax.random.key(0))
