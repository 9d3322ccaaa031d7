"""What the step asks of every task."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from gcnet_jax.models import create_model
from gcnet_jax.tasks import TASKS, Classification, LabelTask
from gcnet_jax.training.config import default_config, name_task
from gcnet_jax.training.mesh import make_mesh
from gcnet_jax.training.state import state_initializer
from gcnet_jax.training.steps import StepOptions, make_train_step


@dataclasses.dataclass(frozen=True)
class Counting(Classification):
    """A task that counts something under a name of the step's own."""

    def loss(self, outputs, batch):
        return super().loss(outputs, batch) | {'count': outputs['logits'].sum()}


def test_names_that_are_taken_are_refused():
    model = create_model('gccnn', stage_sizes=(1,), widths=(4,), num_classes=3, context=None)
    task = Counting(3, (0.5,) * 3, (0.2,) * 3)
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    step = make_train_step(model, optax.sgd(0.1), task, StepOptions(), mesh)
    initialize = state_initializer(model, optax.sgd(0.1), (8, 8, 3), use_ema=False)
    state = jax.eval_shape(initialize, jax.random.key(0))
    with pytest.raises(ValueError, match=r"the sums \['count'\] are the step's own names"):
        jax.eval_shape(step, state, task.batch_shapes(4, 8, 8))


@pytest.mark.parametrize('name', TASKS)
def test_every_task_can_be_configured_and_prepares_what_its_batch_spec_names(name):
    config = default_config()
    name_task(config, name)
    assert config.task.to_dict().keys() == {'name', *TASKS[name].settings}
    assert TASKS[name].ranges.keys() == TASKS[name].settings.keys()
    own = TASKS[name].data_ranges.keys() - {'image_size', 'evaluation_image_size'}
    assert own == TASKS[name].data_settings.keys()
    assert set(config.data) >= TASKS[name].data_settings.keys()
    task = TASKS[name](3, (0.5,) * 3, (0.2,) * 3)
    shapes = task.batch_shapes(4, 8, 6)
    assert shapes.keys() == task.batch_spec().keys()
    for key in (None, jax.random.key(0)):
        prepared = jax.eval_shape(lambda batch, k=key: task.prepare(batch, k), shapes)
        assert prepared.keys() == shapes.keys()
        assert prepared['image'].shape == (4, 8, 6, 3)
        assert jax.eval_shape(task.weight, prepared).shape == ()
    assert task.best in task.percentages
    if not issubclass(TASKS[name], LabelTask):
        return
    probabilities = task.probabilities(np.array([0.0, -1.0, 2.0]), np)
    assert ((probabilities >= 0) & (probabilities <= 1)).all()
