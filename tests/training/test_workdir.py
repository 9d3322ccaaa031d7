"""What a working directory may hold when a run begins there."""

import json
import shutil

import numpy as np
import pytest

from gcnet_jax.errors import CheckpointError, ConfigError
from gcnet_jax.stored import ModelDescription, write_ported
from gcnet_jax.training import workdir
from gcnet_jax.training.workdir import prepare_workdir

DESCRIPTION = ModelDescription('gccnn', {'num_classes': 4}, ('a', 'b', 'c', 'd'))
CONFIG = {'model': {'name': 'gccnn'}, 'training': {'seed': 0}, 'runtime': {'progress': 'auto'}}


def test_a_workdir_takes_the_same_run_again(tmp_path):
    prepare_workdir(tmp_path / 'new', CONFIG, DESCRIPTION, 1)
    assert json.loads((tmp_path / 'new' / 'config.json').read_text()) == CONFIG
    prepare_workdir(tmp_path / 'new', CONFIG | {'runtime': {'progress': 'bar'}}, DESCRIPTION, 1)


def test_a_workdir_of_another_config_is_refused(tmp_path):
    prepare_workdir(tmp_path, CONFIG, DESCRIPTION, 1)
    other = CONFIG | {'training': {'seed': 1}}
    with pytest.raises(CheckpointError, match=r'another config \(config.training.seed\)'):
        prepare_workdir(tmp_path, other, DESCRIPTION, 1)
    assert json.loads((tmp_path / 'config.json').read_text()) == CONFIG


def test_a_workdir_of_another_data_set_is_refused_by_its_name(tmp_path):
    config = CONFIG | {'data': {'name': 'pets'}}
    prepare_workdir(tmp_path, config, DESCRIPTION, 1)
    write_ported(tmp_path / 'x', DESCRIPTION, {'params': {'kernel': np.ones(3, np.float32)}})
    (tmp_path / 'x' / 'checkpoints').rename(tmp_path / 'checkpoints')
    other = ModelDescription('gccnn', {'num_classes': 2}, ('e', 'f'))
    with pytest.raises(
        CheckpointError,
        match=r"holds a run on data set 'pets', and config.data.name is 'birds'; choose another "
        r'--workdir, .* or give --config.data.name=pets to continue that run',
    ):
        prepare_workdir(tmp_path, CONFIG | {'data': {'name': 'birds'}}, other, 1)


def test_a_workdir_of_other_labels_is_refused(tmp_path):
    write_ported(tmp_path, DESCRIPTION, {'params': {'kernel': np.ones(3, np.float32)}})
    (tmp_path / 'config.json').write_text(json.dumps(CONFIG))
    other = ModelDescription('gccnn', {'num_classes': 4}, ('a', 'b', 'bb', 'd'))
    message = "on other labels: the data set is now without 'c', with 'bb'; restore the data set"
    with pytest.raises(CheckpointError, match=message):
        prepare_workdir(tmp_path, CONFIG, other, 1)


def test_a_workdir_of_another_network_is_refused(tmp_path):
    write_ported(tmp_path, DESCRIPTION, {'params': {'kernel': np.ones(3, np.float32)}})
    with pytest.raises(
        ConfigError, match=r'checkpoints of gccnn, and config.model.name is resnet50'
    ):
        prepare_workdir(tmp_path, CONFIG, ModelDescription('resnet50', {}), 1)
    with pytest.raises(CheckpointError, match=r'no config.json'):
        prepare_workdir(tmp_path, CONFIG, DESCRIPTION, 1)


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(CheckpointError, match='is a file'):
        prepare_workdir(tmp_path / 'file', CONFIG, DESCRIPTION, 1)
    with pytest.raises(CheckpointError, match='cannot be written'):
        prepare_workdir(tmp_path / 'file' / 'run', CONFIG, DESCRIPTION, 1)


def test_a_disk_without_room_for_one_checkpoint_is_refused(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(workdir.shutil, 'disk_usage', lambda path: usage)
    with pytest.raises(CheckpointError, match='it takes 3 MiB, free are 1 MiB'):
        prepare_workdir(tmp_path, CONFIG, DESCRIPTION, 3 * 2**20)
    prepare_workdir(tmp_path, CONFIG, DESCRIPTION, 2**20)
