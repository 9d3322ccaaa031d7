"""What the notebook calls for segmentation: a small set that can be prepared, and settings."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from gcnet_jax.data.segmentation_sources import load_segmentation
from gcnet_jax.training.checks import check_config

FILE = Path(__file__).parents[2] / 'colab' / 'notebook_segmenters.py'
FORM = {
    'backbone': 'resnet50',
    'crop': (96, 128),
    'limits': (120, 160),
    'epochs': 30,
    'batch_size': 4,
}


@pytest.fixture
def helpers(monkeypatch, tmp_path):
    monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'sets'))
    spec = importlib.util.spec_from_file_location('notebook_segmenters', FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_shapes_are_a_set_with_every_class_in_every_image(helpers, tmp_path):
    place = helpers.write_shapes(tmp_path / 'shapes', train=3, val=2)
    source = load_segmentation(f'{place}/', 'train')
    assert (len(source), source.label_names) == (3, ('ground', 'disc', 'square'))
    assert set(np.unique(source.label_map(0))) == {0, 1, 2}


@pytest.mark.parametrize('smoke', [False, True])
def test_settings_of_the_form(helpers, tmp_path, smoke):
    place = helpers.write_shapes(tmp_path / 'shapes', train=3, val=2)
    config = helpers.training_config(SimpleNamespace(smoke=smoke), place, **FORM)
    check_config(config)
    assert (config.model.backbone, config.training.batch_size) == ('resnet50', 4)
    assert config.training.init_from is None
    expected = ((48, 48), (48, 64), 2) if smoke else ((96, 128), (120, 160), 30)
    data = config.data
    assert (data.image_size, data.evaluation_image_size, config.training.total_epochs) == expected
    assert len(load_segmentation(data.name, 'validation')) == 2
