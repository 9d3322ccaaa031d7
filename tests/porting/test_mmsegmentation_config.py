"""Configs of segmenters: what is written is read back as the same network."""

import pytest

from gcnet_jax.models import list_models, model_entry
from gcnet_jax.porting.files import TorchFile
from gcnet_jax.porting.mmsegmentation_config import config_of
from gcnet_jax.porting.published_segmenters import check_told, choose_row, sources_of
from gcnet_jax.porting.tensors import LazyTensors
from gcnet_jax.stored import ModelDescription


def described(name, **options):
    preprocessing = model_entry(name).preprocessing
    return ModelDescription(name, options, (), preprocessing, task='segmentation')


def read_back(config, tmp_path, name, options):
    """(row, options) that a file with this config is taken for, whose tensors tell the rest."""
    metadata = {'meta': {'cfg': config}}
    sources = sources_of(TorchFile(tmp_path / 'a.pth', LazyTensors({}), metadata=metadata))
    name, options, notes = choose_row(sources, name, options)
    check_told(tmp_path / 'a.pth', sources, name, options)
    assert not notes
    return name, options


@pytest.mark.parametrize('name', list_models('*_d8_*', task='segmentation'))
def test_every_row_is_read_back(tmp_path, name):
    config = config_of(described(name))
    assert read_back(config, tmp_path, name.removesuffix('_769'), {}) == (name, {})


@pytest.mark.parametrize(
    'options',
    [
        {'output_stride': 4},
        {'output_stride': 16},
        {'output_stride': 32},
        {'window': 100, 'window_stride': 60},
        {'align_corners': True},
        {'window': 769, 'window_stride': 513},
    ],
)
def test_what_tensors_do_not_tell_is_read_back(tmp_path, options):
    name = 'gc_resnet50_d8_voc'
    assert read_back(config_of(described(name, **options)), tmp_path, name, {}) == (name, options)


def test_a_small_segmenter_is_read_back(tmp_path):
    config = config_of(described('gc_resnet18_d16', num_classes=11))
    told = {'backbone': 'resnet18', 'stem': 'imagenet', 'num_classes': 11, 'channels': 128}
    options = read_back(config, tmp_path, 'gc_resnet50_d8_ade20k', told)[1]
    assert options == told | {'output_stride': 16}
    # Its name is that of a row without the option, too.
    assert read_back(config, tmp_path, 'gc_resnet18_d16', {'num_classes': 11})[0] == (
        'gc_resnet18_d16'
    )


def test_what_mmsegmentation_does_not_have_has_no_config():
    for options in (
        {'backbone': 'resnext50_32x4d'},
        {'backbone': 'gc_resnet50'},
        {'widths': [8, 8, 8, 8]},
        {'context': None},
        {'norm': {'kind': 'group', 'channel_groups': 8}},
    ):
        assert config_of(described('gc_resnet50_d8_voc', **options)) == ''
    assert config_of(described('gc_resnet50_d8_voc', norm={'kind': 'frozen'}))
