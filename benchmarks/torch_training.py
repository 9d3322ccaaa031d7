"""A run of the package's config, trained by PyTorch; needs requirements-torch.txt.

Only network, gradients and optimizer are PyTorch's. The initial weights, the batches with their
augmentation, the normalisation, the smoothed labels, the learning rate of each step and the counts
of the evaluation are the package's own, of the same seed. Runs of fewer than 100 steps are not
comparable: the package then evaluates with norm statistics that it computes afresh, and PyTorch
with running averages that have not settled.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import nn

from benchmarks import torch_peers
from gcnet_jax.errors import CheckpointError, ConfigError
from gcnet_jax.files import write_whole
from gcnet_jax.metrics_file import read_metrics
from gcnet_jax.porting import to_torch
from gcnet_jax.tasks.losses import smooth_labels
from gcnet_jax.training.config import is_due, leaves, plain
from gcnet_jax.training.experiment import Experiment, assemble, state_bytes
from gcnet_jax.training.lock import hold_workdir
from gcnet_jax.training.metrics import MetricsWriter
from gcnet_jax.training.optimizers import optimizer_options
from gcnet_jax.training.state import create_state
from gcnet_jax.training.workdir import prepare_workdir

CHECKPOINT = 'checkpoint.pt'
# Settings that are not implemented here, and the one value of each that needs nothing.
FIXED = {
    'task.name': 'classification',
    'task.mixup_alpha': 0.0,
    'task.cutmix_alpha': 0.0,
    'task.erasing_probability': 0.0,
    'task.class_weights': None,
    'model.context': None,
    'model.dtype': 'float32',
    'model.dropout_rate': 0.0,
    'model.norm.kind': 'batch',
    'model.norm.group_size': None,
    'optimizer.name': 'sgd',
    'optimizer.clip_norm': None,
    'optimizer.layer_decay': None,
    'optimizer.frozen': None,
    'training.accumulation_steps': 1,
    'training.ema_decay': 0.0,
    'training.init_from': None,
    'training.early_stopping_epochs': None,
    'training.early_stopping_steps': None,
}
# Of a network: what is read, or in FIXED.
KNOWN_OPTIONS = ('name', 'num_classes', 'norm.channel_groups')


def train_torch(config: ConfigDict, workdir: str | Path) -> dict[str, float]:
    """Trains the network of a config in PyTorch, or continues from its last checkpoint.

    Args:
      config: Every setting, as `gcnet_jax.training.loop.train` takes it.
      workdir: Directory of the run: config.json, metrics.jsonl and a checkpoint of PyTorch's.

    Returns:
      The last values of everything in metrics.jsonl.

    Raises:
      ConfigError: A setting that is not implemented here, or a network without a peer.
    """
    check_settings(config)
    workdir, experiment = Path(workdir).absolute(), assemble(config)
    with hold_workdir(workdir):
        prepare_workdir(
            workdir, plain(experiment.config), experiment.description, state_bytes(experiment)
        )
        run = TorchRun(experiment, workdir)
        with contextlib.closing(MetricsWriter(workdir, run.step, tensorboard=False)) as writer:
            run.to_the_end(writer)
    final = {}
    for line in read_metrics(workdir):
        final.update(line)
    return final


def check_settings(config: ConfigDict) -> None:
    """Refuses what would make another run here than in the package."""
    for path, value in leaves(plain(config)):
        group, _, option = path.partition('.')
        if group == 'model' and path not in FIXED and option not in KNOWN_OPTIONS:
            raise ConfigError(f'config.{path} is {value!r}; runs in PyTorch have no such option')
        if path in FIXED and value != FIXED[path]:
            raise ConfigError(
                f'config.{path} is {value!r}; runs in PyTorch have {FIXED[path]!r}: leave out the '
                'networks that are trained in PyTorch (--networks)'
            )


class TorchRun:
    """The network, its optimizer, and the step that was reached."""

    def __init__(self, experiment: Experiment, workdir: Path) -> None:
        self.experiment, self.durations = experiment, experiment.durations
        self.device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
        self.network = initial_network(experiment).to(
            self.device, memory_format=torch.channels_last
        )
        self.optimizer = make_optimizer(self.network, experiment.config.optimizer)
        self.step, self._checkpoint = 0, workdir / CHECKPOINT
        if self._checkpoint.exists():
            stored = torch.load(self._checkpoint, map_location=self.device, weights_only=True)
            self.network.load_state_dict(stored['network'])
            self.optimizer.load_state_dict(stored['optimizer'])
            self.step = stored['step']

    def to_the_end(self, writer: MetricsWriter) -> None:
        """Runs the remaining steps; evaluates and saves as the config says."""
        losses = []
        if self.step >= self.durations.total:
            return
        with contextlib.closing(self.experiment.train_batches(start_step=self.step)) as batches:
            for batch in batches:
                losses.append(self.train_step(batch))
                evaluate = is_due(self.step, self.durations.evaluation)
                end = self.step == self.durations.total
                if evaluate or end:
                    loss = float(torch.stack(losses).mean())
                    losses = []
                    if not np.isfinite(loss):
                        raise ConfigError(f'the loss of step {self.step} is not finite')
                    values = {'train/loss': loss} | self.evaluate()
                    writer.write(self.step, self.step / self.durations.epoch, values)
                if evaluate or end or is_due(self.step, self.durations.checkpoint):
                    self._save()
                if end:
                    return

    def train_step(self, batch: dict[str, np.ndarray]) -> torch.Tensor:
        """Takes one step on a batch of the package's loader and returns its loss."""
        prepared = self.experiment.task.prepare(batch, None)
        targets = smooth_labels(prepared['label'], self.experiment.task.label_smoothing)
        self.network.train()
        self.optimizer.zero_grad()
        logits = self.network(self._images(prepared['image']))
        loss = nn.functional.cross_entropy(logits, self._put(targets))
        loss.backward()
        self.update()
        return loss.detach()

    def update(self) -> None:
        """Moves the weights by their gradients, at this step's learning rate."""
        for group in self.optimizer.param_groups:
            group['lr'] = float(self.experiment.schedule(self.step))
        self.optimizer.step()
        self.step += 1

    def evaluate(self) -> dict[str, float]:
        """Returns the task's metrics over the evaluation split."""
        task = self.experiment.task
        evaluation = task.evaluation(self.experiment.evaluation_source)
        self.network.eval()
        with (
            torch.no_grad(),
            contextlib.closing(self.experiment.evaluation_batches()) as batches,
        ):
            for batch in batches:
                logits = self.network(self._images(task.prepare(batch, None)['image']))
                evaluation.add({**batch, 'logits': logits.cpu().numpy()})
        return {f'eval/{name}': value for name, value in evaluation.metrics().items()}

    def _images(self, images: Any) -> torch.Tensor:
        return self._put(images).permute(0, 3, 1, 2)  # Already channels_last in memory.

    def _put(self, values: Any) -> torch.Tensor:
        return torch.from_numpy(np.array(values)).to(self.device)

    def _save(self) -> None:
        stored = {
            'step': self.step,
            'network': self.network.state_dict(),
            'optimizer': self.optimizer.state_dict(),
        }
        with write_whole(self._checkpoint, CheckpointError) as partial:
            torch.save(stored, partial)


def initial_network(experiment: Experiment) -> nn.Module:
    """Builds the peer of an experiment's network with the weights that its run starts from."""
    description = experiment.description
    network = torch_peers.build(description.name, description.options['num_classes'])
    state, _ = create_state(experiment.initialize, experiment.seed, experiment.mesh)
    tensors = to_torch(experiment.model, state.evaluation_variables(), 'torchvision')
    network.load_state_dict({name: torch.tensor(value) for name, value in tensors.items()})
    return network


def make_optimizer(network: nn.Module, settings: ConfigDict) -> torch.optim.Optimizer:
    """Builds SGD with weight decay for kernels only; each step sets its own learning rate."""
    given = {name: settings[name] for name in ('momentum', 'nesterov')}
    return torch.optim.SGD(
        list(_groups(network, settings.weight_decay)),
        lr=0.0,
        **optimizer_options('sgd', given),
    )


def _groups(network: nn.Module, weight_decay: float) -> Iterator[dict[str, Any]]:
    for is_kernel in (True, False):
        yield {
            'params': [leaf for leaf in network.parameters() if (leaf.ndim > 1) == is_kernel],
            'weight_decay': weight_decay if is_kernel else 0.0,
        }
