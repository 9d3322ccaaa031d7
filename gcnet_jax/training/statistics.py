"""The norms' running statistics, computed afresh while the running averages lag behind.

A running average of momentum 0.9 starts at mean 0 and variance 1 and forgets that, and the weights
of the steps before, over some dozens of steps. A run on few images is evaluated before that: after
its first step, nine tenths of the statistics are still the initial ones. Until `SETTLED_STEPS`, the
statistics are therefore replaced before each evaluation and each save by their mean over training
batches, all with the present weights. In training, norms use the statistics of the batch, so the
weights do not depend on it.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gcnet_jax.tasks import Task
from gcnet_jax.training.experiment import Experiment
from gcnet_jax.training.freezing import frozen_paths, frozen_statistics, merge, split
from gcnet_jax.training.mesh import batch_shardings, replicated, to_global
from gcnet_jax.training.state import TrainState
from gcnet_jax.training.steps import StepOptions, make_apply, make_split

# 0.9 to this power is 0.00003.
SETTLED_STEPS = 100
# The statistics are the mean over the batches that hold the first so many training images.
STATISTICS_IMAGES = 1024


def statistics_batches(step: int, examples: int, batch_size: int) -> int:
    """Returns the number of batches to average over after a step; 0 if the averages have settled.

    Args:
      step: Number of steps done.
      examples: Number of training images.
      batch_size: Images per batch over all processes.
    """
    if step >= SETTLED_STEPS:
        return 0
    return -(-min(examples, STATISTICS_IMAGES) // batch_size)


def have_moving_statistics(state: TrainState, patterns: tuple[str, ...]) -> bool:
    """Whether any norm keeps running statistics and is not frozen by the patterns."""
    frozen = frozen_paths(state.params, patterns)
    fixed = frozen_statistics(state.batch_stats, state.params, frozen)
    return bool(jax.tree.leaves(split(state.batch_stats, fixed)[0]))


def make_statistics_step(
    model: nn.Module, task: Task, options: StepOptions, mesh: Mesh
) -> Callable:
    """Returns the pure function that adds one batch's part to the mean statistics.

    It maps the variables, the sum so far (anything of the right shapes for the first batch), a
    batch as in training, its index and the number of batches to the new sum, which after the last
    batch is the mean. Images are neither mixed nor erased. The statistics of frozen modules are
    those in the variables, and so are all of them if the mean is not finite.
    """
    apply = make_apply(model, task, options, mesh)
    parts = make_split(task, options.accumulation_steps, mesh)

    def step(variables: dict, total: Any, batch: dict, index: Any, count: Any) -> Any:
        params = jax.lax.with_sharding_constraint(variables['params'], replicated(mesh))
        frozen = frozen_statistics(
            variables['batch_stats'], params, frozen_paths(params, options.frozen)
        )
        running, fixed = split(variables['batch_stats'], frozen)
        key = jax.random.fold_in(jax.random.key(0), index)

        def of_micro_batch(batch):
            def follow(running):
                updated = apply(params, merge(running, fixed), task.inputs(batch), key)[1]
                return split(updated, frozen)[0]

            # The new average is `momentum * old + (1 - momentum) * statistics`. With 0 for the old
            # one, and the momentum as the derivative, the statistics are what is left.
            zeros, ones = (jax.tree.map(make, running) for make in (jnp.zeros_like, jnp.ones_like))
            new, momentum = jax.jvp(follow, (zeros,), (ones,))
            return jax.tree.map(lambda new, momentum: new / (1 - momentum), new, momentum)

        batches = parts(task.prepare(batch, None))
        found = jax.tree.map(lambda leaf: leaf.mean(axis=0), jax.lax.map(of_micro_batch, batches))
        total = jax.tree.map(
            lambda old, new: jnp.where(index == 0, 0.0, old) + new / count,
            split(total, frozen)[0],
            found,
        )
        # Weights that have grown without bounds must not make a saved state unusable.
        finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(total)]).all()
        kept = (index < count - 1) | finite
        total = jax.tree.map(lambda new, old: jnp.where(kept, new, old), total, running)
        return merge(total, fixed)

    return step


def jit_statistics_step(step: Callable, task: Task, mesh: Mesh, shardings: TrainState) -> Callable:
    """Compiles the statistics step for a mesh."""
    variables = shardings.evaluation_variables()
    return jax.jit(
        step,
        in_shardings=(
            variables,
            variables['batch_stats'],
            batch_shardings(mesh, task.batch_spec()),
            replicated(mesh),
            replicated(mesh),
        ),
        out_shardings=variables['batch_stats'],
    )


def fresh_statistics(step: Callable, variables: dict, batches: Any, count: int) -> Any:
    """Returns the mean statistics over the first `count` of the batches.

    Args:
      step: As returned by `jit_statistics_step`.
      variables: {'params', 'batch_stats'}.
      batches: Iterator over batches on the devices.
      count: How many batches to average over, at least 1.
    """
    total = variables['batch_stats']
    for index in range(count):
        total = step(variables, total, next(batches), np.int32(index), np.float32(count))
    return total


def with_statistics(state: TrainState, statistics: Any) -> TrainState:
    """Returns the state with other statistics in its evaluation variables."""
    if state.ema is not None:
        return state.replace(ema={**state.ema, 'batch_stats': statistics})
    return state.replace(batch_stats=statistics)


def refresh_statistics(
    state: TrainState, steps_done: int, experiment: Experiment, step: Callable
) -> TrainState:
    """Returns the state with fresh statistics for evaluation, while the running averages lag.

    Args:
      state: After `steps_done` steps.
      steps_done: Number of steps done; from `SETTLED_STEPS` on the state is returned as it is.
      experiment: Gives the training batches. The first ones of the run are used each time, so that
        a run that was interrupted has the same statistics.
      step: As returned by `jit_statistics_step`.
    """
    count = statistics_batches(steps_done, len(experiment.train_source), experiment.batch_size)
    norm = experiment.description.options.get('norm') or {}
    if not count or norm.get('kind') == 'frozen':
        return state
    if not have_moving_statistics(state, experiment.step_options.frozen):
        return state
    shardings = batch_shardings(experiment.mesh, experiment.task.batch_spec())
    with experiment.train_batches() as batches:
        placed = (to_global(batch, shardings) for batch in batches)
        statistics = fresh_statistics(step, state.evaluation_variables(), placed, count)
    return with_statistics(state, statistics)
