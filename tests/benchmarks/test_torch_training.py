"""PyTorch's runs have the package's weights, batches, optimizer and schedule."""

import jax
import numpy as np
import optax
import pytest

from gcnet_jax.errors import ConfigError
from gcnet_jax.metrics_file import read_metrics
from gcnet_jax.porting import to_torch
from gcnet_jax.stored import load_variables
from gcnet_jax.training.config import default_config
from gcnet_jax.training.experiment import assemble
from gcnet_jax.training.loop import train
from gcnet_jax.training.state import create_state

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


def largest_error(run, before, variables):
    """Returns how far each weight is from ours, as a part of how far ours has moved."""
    expected = to_torch(run.experiment.model, variables, 'torchvision')
    moved = {name: abs(expected[name] - leaf).max() for name, leaf in before.items()}
    assert min(moved.values()) > 0
    after = weights_of(run.network)
    return {name: abs(after[name] - expected[name]).max() / moved[name] for name in before}


def test_weights_move_by_given_gradients_as_ours_do(config, tmp_path):
    """Momentum, weight decay and schedule, without the rounding of a network between them."""
    import torch

    from benchmarks.torch_training import TorchRun

    run = TorchRun(assemble(config), tmp_path)
    before, optimizer = weights_of(run.network), run.experiment.optimizer
    variables = create_state(run.experiment.initialize, run.experiment.seed, run.experiment.mesh)[
        0
    ].evaluation_variables()
    variables = jax.device_get(variables)
    state, update = optimizer.init(variables['params']), jax.jit(optimizer.update)
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        gradients = jax.tree.map(
            lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), variables['params']
        )
        tensors = to_torch(run.experiment.model, variables | {'params': gradients}, 'torchvision')
        for name, leaf in run.network.named_parameters():
            leaf.grad = torch.tensor(tensors[name])
        run.update()
        updates, state = update(gradients, state, variables['params'])
        variables = variables | {'params': optax.apply_updates(variables['params'], updates)}
    assert max(largest_error(run, before, variables).values()) < 1e-4


def test_first_steps_are_those_of_the_package(config, tmp_path):
    """Later ones differ by rounding that the ReLUs of flat backgrounds multiply."""
    from benchmarks.torch_training import TorchRun

    config.training.checkpoint_steps = 1
    config.training.keep_checkpoints = STEPS
    run = TorchRun(assemble(config), tmp_path)
    before = weights_of(run.network)
    train(config, tmp_path / 'ours')
    with run.experiment.train_batches() as batches:
        losses = [float(run.train_step(next(batches)))]
        first = load_variables(tmp_path / 'ours' / 'checkpoints' / '1')[1]
        assert np.median([*largest_error(run, before, first).values()]) < 1e-3
        losses += [float(run.train_step(next(batches))) for _ in range(STEPS - 1)]
    ours = [line['train/loss'] for line in read_metrics(tmp_path / 'ours') if 'train/loss' in line]
    assert losses[:2] == pytest.approx(ours[:2], rel=1e-4)
    assert losses == pytest.approx(ours, rel=1e-2)


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
        ('model.dropout_rate', 0.2),
        ('model.stem', 'small'),
    ],
)
def test_what_is_not_implemented_is_refused(config, tmp_path, path, value):
    from benchmarks.torch_training import train_torch

    with config.unlocked():
        config[path.partition('.')[0]][path.partition('.')[2]] = value
    with pytest.raises(ConfigError, match=f'config.{path} is {value!r}'):
        train_torch(config, tmp_path)
