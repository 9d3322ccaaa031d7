"""What a file says about its network, against what is built of it."""

import pytest

from gcnet_jax.errors import CheckpointError
from gcnet_jax.porting.architectures import (
    check_architecture,
    check_settings,
    told_architectures,
)


@pytest.mark.parametrize(
    ('told', 'built'),
    [
        ('resnet50', 'resnet50'),
        ('resnet50', 'gc_resnet50'),
        ('resnet50.a1_in1k', 'gc_resnet50_c4'),
        ('timm/tv_resnet50.tv_in1k', 'resnet50'),
        ('gluon_resnet50_v1b', 'resnet50'),
        ('gc_resnet50_r4', 'gc_resnet50'),
        ('gcresnet50t', 'gcresnet50t'),
        ('ResNet-50', 'resnet50'),
        ('ResNet50_Weights.IMAGENET1K_V2', 'gc_resnet50'),
        ('', 'resnet50'),
        ('alice-run-7', 'resnet50'),
    ],
)
def test_the_same_computation_passes(told, built):
    check_architecture(told, built, 'file.pth')


@pytest.mark.parametrize(
    ('told', 'built'),
    [
        *(('resnetaa50', 'resnet50'), ('resnetaa50.a1h_in1k', 'gc_resnet50')),
        *(('seresnet50', 'resnet50'), ('resnet50d', 'resnet50'), ('resnetblur50', 'resnet50')),
        *(('wide_resnet50_2', 'resnet50'), ('resnet50_gn', 'resnet50'), ('resnet50c', 'resnet50')),
        *(('ecaresnet50t', 'gcresnet50t'), ('resnet50', 'gcresnet50t')),
        *(
            ('resnet34', 'resnet18'),
            ('ResNet-50-D', 'resnet50'),
            ('SE-ResNet-50', 'resnet50'),
            ('resnext50_32x4d', 'resnet50'),
            ('ResNet101', 'resnet50'),
        ),
        ('gcresnext50ts', 'gcresnet50t'),
    ],
)
def test_another_computation_is_refused_by_both_names(told, built):
    with pytest.raises(CheckpointError, match=rf'says that it is a {told}, and {built} would be'):
        check_architecture(told, built, 'file.pth')


def test_every_place_where_training_scripts_say_it():
    metadata = {
        'arch': 'resnet50',
        'architecture': 'resnet51',
        'args': {'arch': 'resnet52', 'model': 'resnet53', 'seed': 3},
        'epoch': 7,
    }
    assert list(told_architectures(metadata)) == [f'resnet{n}' for n in (50, 51, 52, 53)]
    lightning = {'hyper_parameters': {'model_name': 'resnetaa50', 'lr': 0.1}}
    assert list(told_architectures(lightning)) == ['resnetaa50']
    assert list(told_architectures({'arch': 'my best run', 'args': 3})) == []
    assert list(told_architectures({'arch': ['resnet50'], 'args': {'model': 50}})) == []


@pytest.mark.parametrize(
    'text',
    [
        "backbone=dict(type='ResNet', depth=50, style='caffe')",
        'backbone = dict(\n    style = "caffe")',
        "type='ResNetV1d'",
        'avg_down=True',
        "conv_cfg=dict(type='ConvWS')",
        '{"backbone": {"type": "ResNet", "style": "caffe"}}',
        {'backbone': {'type': 'ResNet', 'style': 'caffe'}},
        'strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4)',
    ],
)
@pytest.mark.parametrize('key', ['config', 'cfg'])
def test_a_backbone_of_another_kind_is_refused(text, key):
    """mmcv writes 'config' and mmengine 'cfg'."""
    with pytest.raises(CheckpointError, match=r'was trained with .* and gc_resnet50 would'):
        check_settings({'meta': {key: text}}, 'gc_resnet50', 'detector.pth')


def test_arguments_of_timms_training_script_are_compared():
    arguments = {'model': 'resnet50', 'model_kwargs': {'aa_layer': 'avg', 'num_classes': 3}}
    with pytest.raises(CheckpointError, match='model_kwargs of aa_layer, and resnet50 would'):
        check_settings({'args': arguments}, 'resnet50', 'last.pth')
    for kwargs in ({}, {'num_classes': 3}, None, 'x'):
        check_settings({'args': {'model_kwargs': kwargs}}, 'resnet50', 'last.pth')


def test_the_papers_own_settings_pass():
    text = (
        "backbone=dict(type='ResNet', depth=50, style='pytorch', dilations=(1, 1, 1, 1), "
        "norm_cfg=dict(type='SyncBN'))"
    )
    check_settings({'meta': {'config': text}}, 'gc_resnet50', 'detector.pth')
    for metadata in ({}, {'meta': 3}, {'meta': {'config': 7}}):
        check_settings(metadata, 'gc_resnet50', 'detector.pth')
