"""The segmenters of the registry: parameters as mmsegmentation counts them, and their settings."""

import itertools
import math

import jax
import jax.numpy as jnp
import pytest

from gcnet_jax.models import create_model, list_models, model_entry

BLOCK = 512 + 1 + 2 * 512 * 128 + 128 + 2 * 128 + 512


def counts(name):
    """(values of parameters, values of running statistics, number of arrays)."""
    model, images = create_model(name), jnp.zeros((1, 64, 64, 3))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    each = [
        [math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes[kind])]
        for kind in ('params', 'batch_stats')
    ]
    return *map(sum, each), sum(map(len, each))


@pytest.mark.parametrize(
    ('name', 'parameters', 'statistics', 'tensors'),
    [
        # The figures of mmsegmentation's own networks; its counters of batches are not here.
        ('gc_resnet50_d8_cityscapes', 49_630_215, 56_832, 366 - 59),
        ('gc_resnet50_d8_cityscapes_769', 49_630_215, 56_832, 366 - 59),
        ('gc_resnet50_d8_voc', 49_631_755, 56_832, 366 - 59),
        ('gc_resnet101_d8_ade20k', 68_723_213, 109_056, 672 - 110),
        ('fcn_resnet50_d8_cityscapes', 49_630_215 - BLOCK, 56_832, 366 - 59 - 8),
        ('fcn_resnet101_d8_ade20k', 68_723_213 - BLOCK, 109_056, 672 - 110 - 8),
    ],
)
def test_as_many_parameters_as_in_mmsegmentation(name, parameters, statistics, tensors):
    assert counts(name) == (parameters, statistics, tensors)


def test_every_combination_is_a_row():
    names = itertools.product(
        ('gc', 'fcn'), (50, 101), ('cityscapes', 'cityscapes_769', 'ade20k', 'voc')
    )
    expected = {f'{kind}_resnet{depth}_d8_{data}' for kind, depth, data in names}
    assert {*list_models('*_d8_*', task='segmentation')} == expected


@pytest.mark.parametrize('name', ['gc_resnet18_d16', 'fcn_resnet18_d16'])
def test_a_small_segmenter_takes_a_trained_classifier_in_its_place(name):
    model = create_model(name)
    assert (model.backbone.stem, model.backbone.output_stride) == ('imagenet', 16)
    assert model.context_ratio == (1 / 4 if name.startswith('gc_') else None)
    shapes = [
        jax.eval_shape(
            lambda net=net: net.init(jax.random.key(0), jnp.ones((1, 64, 64, 3)), train=False)
        )
        for net in (model.backbone, create_model('resnet18', num_classes=0))
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize('name', list_models('*_d8_*', task='segmentation'))
def test_the_settings_of_a_row(name):
    model, preprocessing = create_model(name), model_entry(name).preprocessing
    depth = 'resnet101' if 'resnet101' in name else 'resnet50'
    stages = {'resnet50': (3, 4, 6, 3), 'resnet101': (3, 4, 23, 3)}[depth]
    backbone = model.backbone
    assert (tuple(backbone.stage_sizes), backbone.num_classes) == (stages, 0)
    assert (backbone.stem, backbone.output_stride, backbone.context) == ('deep', 8, ())
    assert model.context_ratio == (1 / 4 if name.startswith('gc_') else None)
    assert (model.channels, model.auxiliary_channels, model.dropout_rate) == (512, 256, 0.1)
    classes = {'cityscapes': 19, 'ade20k': 150, 'voc': 21}[name.removesuffix('_769').split('_')[-1]]
    assert model.num_classes == classes
    sizes = preprocessing.short_side, preprocessing.long_side, preprocessing.train_shape
    windows = model.window, model.window_stride, model.align_corners
    if name.endswith('_769'):
        assert sizes == (1025, 2049, (769, 769))
        assert windows == (769, 513, True)
    else:
        assert sizes == ((1024, 2048, (512, 1024)) if classes == 19 else (512, 2048, (512, 512)))
        assert windows == (None, None, False)
    assert preprocessing.multiple_of == 1
