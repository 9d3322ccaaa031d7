"""PyTorch's runs have the package's weights, batches, optimizer and schedule."""

import pytest

from gcnet_jax.errors import ConfigError
from gcnet_jax.metrics_file import read_metrics
from gcnet_jax.porting import to_torch
from gcnet_jax.stored import load_variables
from gcnet_jax.training.config import default_config
from gcnet_jax.training.experiment import assemble
from gcnet_jax.training.loop import train

pytestmark = pytest.mark.torch
STEPS = 4


@pytest.fixture
def config():
    """Momentum, weight decay, smoothed labels, augmentation, and a learning rate that changes."""
    config = default_config()
    config.model.name = 'resnet20'
    config.data.image_size = 8
    config.data.train_split = 'train[:64]'
    config.data.evaluation_split = 'test[:20]'
    config.data.augmentation = 'pad_crop'
    config.data.num_threads = 1
    config.task.label_smoothing = 0.1
    # Decay so strong that four steps show it; steps so short that they do not multiply rounding.
    config.optimizer.weight_decay = 0.5
    config.schedule.peak_learning_rate = 0.002
    config.schedule.warmup_steps = 2
    config.training.batch_size = 32
    config.training.total_steps = STEPS
    config.training.log_steps = 1
    config.training.seed = 5
    config.runtime.progress = 'none'
    config.runtime.tensorboard = False
    return config


def weights_of(network):
    return {name: leaf.detach().numpy().copy() for name, leaf in network.named_parameters()}


def test_steps_are_those_of_the_package(config, tmp_path):
    from benchmarks.torch_training import TorchRun

    run = TorchRun(assemble(config), tmp_path)
    before = weights_of(run.network)
    with run.experiment.train_batches() as batches:
        losses = [float(run.train_step(next(batches))) for _ in range(STEPS)]
    train(config, tmp_path / 'ours')
    ours = [line['train/loss'] for line in read_metrics(tmp_path / 'ours') if 'train/loss' in line]
    assert losses == pytest.approx(ours, rel=1e-4)
    variables = load_variables(tmp_path / 'ours')[1]
    expected = to_torch(run.experiment.model, variables, 'torchvision')
    for name, leaf in weights_of(run.network).items():
        moved = abs(expected[name] - before[name]).max()
        assert moved > 0
        assert abs(leaf - expected[name]).max() < 1e-2 * moved, name


def test_a_run_goes_on_where_it_stopped(config, tmp_path, monkeypatch):
    from benchmarks import torch_training
    from benchmarks.torch_training import TorchRun, train_torch

    config.training.checkpoint_steps = 2
    whole = train_torch(config, tmp_path / 'whole')
    assert whole['step'] == STEPS
    assert whole['eval/examples'] == 20

    def stop(self):
        save(self)
        raise KeyboardInterrupt

    save = TorchRun._save
    monkeypatch.setattr(torch_training.TorchRun, '_save', stop)
    with pytest.raises(KeyboardInterrupt):
        train_torch(config, tmp_path / 'parts')
    monkeypatch.setattr(torch_training.TorchRun, '_save', save)
    assert TorchRun(assemble(config), tmp_path / 'parts').step == 2
    parts = train_torch(config, tmp_path / 'parts')
    assert parts['eval/loss'] == pytest.approx(whole['eval/loss'], rel=1e-4)
    assert train_torch(config, tmp_path / 'parts') == parts


@pytest.mark.parametrize(
    ('path', 'value'),
    [
        ('task.mixup_alpha', 0.2),
        ('training.ema_decay', 0.9),
        ('optimizer.name', 'adamw'),
        ('model.dtype', 'bfloat16'),
    ],
)
def test_what_is_not_implemented_is_refused(config, tmp_path, path, value):
    from benchmarks.torch_training import train_torch

    with config.unlocked():
        config[path.partition('.')[0]][path.partition('.')[2]] = value
    with pytest.raises(ConfigError, match=f'config.{path} is {value!r}'):
        train_torch(config, tmp_path)
