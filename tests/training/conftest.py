"""A tiny network with batch norm, global context and squeeze-excitation, and batches for it."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest

from gcnet_jax.models.registry import create_model
from gcnet_jax.tasks import Classification
from gcnet_jax.training.mesh import batch_shardings, make_mesh, state_shardings, to_global
from gcnet_jax.training.state import TrainState
from gcnet_jax.training.steps import StepOptions

PLACE = {'stages': (1, 2), 'position': 'after_conv2', 'ratio': 1 / 2}


@pytest.fixture(scope='session')
def tiny_model():
    return create_model(
        'gccnn',
        widths=(8, 16),
        stage_sizes=(1, 1),
        num_classes=4,
        context=({'block': 'global_context', **PLACE}, {'block': 'squeeze_excite', **PLACE}),
        stochastic_depth_rate=0.2,
        dropout_rate=0.1,
    )


@dataclasses.dataclass(frozen=True)
class Job:
    """What a step is made of beside the network."""

    task: Classification
    options: StepOptions

    def places(self, mesh):
        return batch_shardings(mesh, self.task.batch_spec())

    def changed(self, **settings):
        """Returns a job with other settings, be they the task's or the step's."""
        of_step = {name for name in settings if hasattr(self.options, name)}
        task = {name: settings[name] for name in settings.keys() - of_step}
        options = {name: settings[name] for name in of_step}
        return Job(
            dataclasses.replace(self.task, **task), dataclasses.replace(self.options, **options)
        )


@pytest.fixture
def job():
    return Job(Classification(4, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25)), StepOptions())


@pytest.fixture
def make_batch():
    def make(size=16, image_size=8, seed=0):
        rng = np.random.default_rng(seed)
        return {
            'image': rng.integers(0, 256, (size, image_size, image_size, 3), dtype=np.uint8),
            'label': rng.integers(0, 4, size).astype(np.int32),
        }

    return make


class SmallNet(nn.Module):
    """The least that has batch statistics; it compiles in no time."""

    @nn.compact
    def __call__(self, images, *, train):
        features = nn.Conv(8, (3, 3), name='conv')(images)
        features = nn.BatchNorm(use_running_average=not train, momentum=0.9, name='norm')(features)
        return nn.Dense(4, name='classifier')(nn.relu(features).mean(axis=(1, 2)))

    def outputs(self, images, *, train):
        return {'logits': self(images, train=train)}


@pytest.fixture(scope='session')
def small_model():
    return SmallNet()


@pytest.fixture(scope='session')
def place(random_variables):
    """Makes a state on a mesh; small leaves are split too, so that some are."""
    made = {}

    def on(shape, model, optimizer, use_ema=False):
        devices = jax.devices()[: int(np.prod(shape))]
        mesh = make_mesh(*shape, devices=devices)
        if model not in made:
            images = np.zeros((1, 8, 8, 3), np.float32)
            made[model] = random_variables(model, images, train=False)
        params, batch_stats = made[model]['params'], made[model].get('batch_stats', {})
        state = TrainState(
            step=np.zeros((), np.int32),
            key=np.array([1, 2], np.uint32),
            params=params,
            batch_stats=batch_stats,
            opt_state=jax.device_get(optimizer.init(params)),
            ema={'params': params, 'batch_stats': batch_stats} if use_ema else None,
        )
        shardings = state_shardings(state, mesh, smallest=2)
        # Copies: what is donated must not be another leaf's memory.
        return mesh, shardings, jax.device_put(jax.tree.map(np.array, state), shardings)

    return on


@pytest.fixture(scope='session')
def put():
    def put(batch, shardings):
        return to_global(batch, {name: shardings[name] for name in batch})

    return put
