"""The training step and the evaluation step: pure functions, and their one jit over the mesh.

`jax.jit` with `in_shardings` and `out_shardings` is what `pjit` was: the partitioner reads where
the arguments live and places every collective. BatchNorm's statistics are therefore those of the
whole batch, with no axis name in the model. Steps return sums and counts; only the host divides.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int

from gcnet_jax.models.reorder import reorder
from gcnet_jax.tasks import Task
from gcnet_jax.training.freezing import (
    evaluate_frozen,
    frozen_paths,
    frozen_statistics,
    merge,
    split,
)
from gcnet_jax.training.mesh import batch_parts, batch_shardings, feature_sharding, replicated
from gcnet_jax.training.per_image import split_by_image
from gcnet_jax.training.state import TrainState

Metrics = dict[str, Array]
# What the step and the window over several steps count themselves.
RESERVED_SUMS = frozenset(
    ('weight', 'count', 'gradient_norm', 'finite', 'steps', 'bad_steps', 'skipped')
)


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """What a step needs beside the model, the task and the optimizer.

    Attributes:
      accumulation_steps: Number of micro-batches that a batch is computed in, one after the other.
      ema_decay: Decay of the moving average of the weights; 0 is off.
      frozen: Patterns of the parameters that are not trained, see `freezing.frozen_paths`.
    """

    accumulation_steps: int = 1
    ema_decay: float = 0.0
    frozen: tuple[str, ...] = ()


def moving_average(average: Any, new: Any, decay: float, step: Int[Array, '']) -> Any:
    """Returns `decay * average + (1 - decay) * new`, leaf by leaf.

    Early on the decay is `(1 + step) / (10 + step)` where that is less, so that the initial weights
    are forgotten soon.
    """
    step = step.astype(jnp.float32)
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, leaf: old * decay + leaf * (1.0 - decay), average, new)


def place_features(mesh: Mesh) -> Callable:
    """Returns a method interceptor that says of every feature map where it lives.

    Left alone, the partitioner also splits maps that have fewer rows than there are devices along
    `spatial`, and then gets the gradient of a strided convolution wrong (jax 0.10.2).
    """

    def intercept(method, arguments, keywords, context):
        output = method(*arguments, **keywords)
        if context.method_name == '__call__' and getattr(output, 'ndim', 0) == 4:
            sharding = feature_sharding(mesh, output.shape[1])
            return jax.lax.with_sharding_constraint(output, sharding)
        return output

    return intercept


def make_apply(model: nn.Module, task: Task, options: StepOptions, mesh: Mesh) -> Callable:
    """Returns a function computing the named outputs and new running statistics in training.

    It takes the parameters, the statistics, what the task's `inputs` returned, and a random key.
    Modules whose parameters are all frozen run as in evaluation.
    """
    model = reorder(model, mesh.devices.flat[0].platform)

    def apply(params, batch_stats, inputs, key):
        with contextlib.ExitStack() as stack:
            if batch_parts(mesh) > 1:
                stack.enter_context(nn.intercept_methods(split_by_image(mesh)))
            if mesh.shape['spatial'] > 1:
                stack.enter_context(nn.intercept_methods(place_features(mesh)))
            frozen = frozen_paths(params, options.frozen)
            if frozen:
                stack.enter_context(nn.intercept_methods(evaluate_frozen(params, frozen)))
            outputs, updated = model.apply(
                {'params': params, 'batch_stats': batch_stats},
                *inputs,
                train=True,
                mutable=['batch_stats'],
                rngs={'dropout': key, 'sampling': jax.random.fold_in(key, 1)},
                method=task.training_method,
            )
        return outputs, updated.get('batch_stats', {})

    return apply


def make_loss(model: nn.Module, task: Task, options: StepOptions, mesh: Mesh) -> Callable:
    """Returns a function computing one micro-batch's part of the batch's mean loss, and its sums.

    The function takes the parameters in two parts, those to differentiate by and the frozen ones,
    and the weight of the whole batch.
    """
    apply = make_apply(model, task, options, mesh)

    def loss_share(params, fixed, batch_stats, batch, key, weight):
        params = merge(params, fixed) if fixed else params
        outputs, batch_stats = apply(params, batch_stats, task.inputs(batch), key)
        sums = task.loss(outputs, batch)
        if taken := sums.keys() & RESERVED_SUMS:
            raise ValueError(f"task {task.name}: the sums {sorted(taken)} are the step's own names")
        # Where no example counts, loss and gradient are zero.
        return sums['loss'] / jnp.where(weight > 0, weight, 1.0), (batch_stats, sums)

    return loss_share


def make_split(task: Task, count: int, mesh: Mesh) -> Callable:
    """Returns a function splitting the arrays of a batch into `count` micro-batches.

    A micro-batch takes every n-th example, so that each device keeps its own rows.
    """
    shardings = batch_shardings(mesh, task.batch_spec(), leading=1)

    def split_batch(batch):
        return {
            name: jax.lax.with_sharding_constraint(
                jnp.moveaxis(array.reshape(-1, count, *array.shape[1:]), 1, 0), shardings[name]
            )
            for name, array in batch.items()
        }

    return split_batch


def make_gradient(model: nn.Module, task: Task, options: StepOptions, mesh: Mesh) -> Callable:
    """Returns a function computing a batch's gradient, new statistics and sums.

    The gradient is that of the mean over the whole batch, with respect to the parameters that are
    not frozen; BatchNorm sees one micro-batch at a time.
    """
    gradient = jax.value_and_grad(make_loss(model, task, options, mesh), has_aux=True)
    count = options.accumulation_steps
    parts = make_split(task, count, mesh)

    def whole(params, fixed, batch_stats, batch, key):
        weight = task.weight(batch)
        if count == 1:
            (_, (batch_stats, sums)), grads = gradient(
                params, fixed, batch_stats, batch, key, weight
            )
            return grads, batch_stats, {**sums, 'weight': weight}

        def add(carry, micro):
            grads, batch_stats = carry
            batch, index = micro
            (_, (batch_stats, sums)), more = gradient(
                params, fixed, batch_stats, batch, jax.random.fold_in(key, index), weight
            )
            return (jax.tree.map(jnp.add, grads, more), batch_stats), sums

        start = (jax.tree.map(jnp.zeros_like, params), batch_stats)
        (grads, batch_stats), sums = jax.lax.scan(add, start, (parts(batch), jnp.arange(count)))
        sums = jax.tree.map(lambda of_parts: of_parts.sum(axis=0), sums)
        return grads, batch_stats, {**sums, 'weight': weight}

    return whole


def keep_frozen(learned: TrainState, state: TrainState, frozen: frozenset[str]) -> TrainState:
    """Returns `learned` with the frozen parameters and statistics of `state`, bit for bit."""
    if not frozen:
        return learned
    statistics = frozen_statistics(state.batch_stats, state.params, frozen)

    def keep(new, old, chosen):
        return merge(split(new, chosen)[0], split(old, chosen)[1])

    ema = learned.ema
    if ema is not None:
        ema = {
            'params': keep(ema['params'], state.ema['params'], frozen),
            'batch_stats': keep(ema['batch_stats'], state.ema['batch_stats'], statistics),
        }
    return learned.replace(
        params=keep(learned.params, state.params, frozen),
        batch_stats=keep(learned.batch_stats, state.batch_stats, statistics),
        ema=ema,
    )


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    task: Task,
    options: StepOptions,
    mesh: Mesh,
) -> Callable[[TrainState, dict], tuple[TrainState, Metrics]]:
    """Returns the pure training step.

    It maps the state and a batch of the task to the next state and the batch's {'gradient_norm':
    before clipping, of what is not frozen; 'finite': bool; 'count': number of examples; 'weight':
    by which the loss is divided} beside the task's sums. Where loss or gradient are not finite, the
    new state has the old weights, statistics and optimizer state, and only `step` moves.
    """
    gradient = make_gradient(model, task, options, mesh)

    def step(state: TrainState, batch: dict) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        prepare_key, model_key = jax.random.split(key)
        batch = task.prepare(batch, prepare_key)
        # Parameters are stored in shards and gathered here. Left to itself the partitioner computes
        # with the shards, and got gradients wrong inside the loop over micro-batches (jax 0.10.2).
        params = jax.lax.with_sharding_constraint(state.params, replicated(mesh))
        frozen = frozen_paths(params, options.frozen)
        trained, fixed = split(params, frozen)
        grads, batch_stats, sums = gradient(trained, fixed, state.batch_stats, batch, model_key)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(sums['loss']) & jnp.isfinite(norm)
        grads = merge(grads, jax.tree.map(jnp.zeros_like, fixed))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            new = {'params': params, 'batch_stats': batch_stats}
            ema = moving_average(ema, new, options.ema_decay, state.step)
        learned = state.replace(
            params=params, batch_stats=batch_stats, opt_state=opt_state, ema=ema
        )
        learned = keep_frozen(learned, state, frozen)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), learned, state)
        count = jnp.asarray(batch['image'].shape[0], jnp.float32)
        metrics = {**sums, 'count': count, 'gradient_norm': norm, 'finite': finite}
        return kept.replace(step=state.step + 1), metrics

    return step


def make_evaluation_step(
    model: nn.Module, task: Task, mesh: Mesh | None = None
) -> Callable[[dict, dict], dict]:
    """Returns the pure evaluation step.

    It maps variables and a batch that has a 'mask' too (bool [batch], False for padding) to what
    the task's evaluation adds up.

    Args:
      model: The network.
      task: What it learns.
      mesh: The devices, where the step may be divided among them; see `Task.evaluates_by_device`.
    """

    def step(variables: dict, batch: dict) -> dict:
        inputs = task.evaluation_inputs(task.prepare(batch, None))
        outputs = model.apply(variables, *inputs, train=False, method='outputs')
        return task.results(outputs, batch)

    if mesh is None or batch_parts(mesh) == 1 or not task.evaluates_by_device:
        return step
    rows = PartitionSpec(('data', 'fsdp'))
    return jax.shard_map(
        step, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows, check_vma=False
    )


def jit_train_step(step: Callable, task: Task, mesh: Mesh, shardings: TrainState) -> Callable:
    """Compiles the training step for a mesh; the old state is donated to the new one."""
    return jax.jit(
        step,
        in_shardings=(shardings, batch_shardings(mesh, task.batch_spec())),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def jit_evaluation_step(step: Callable, task: Task, mesh: Mesh, shardings: TrainState) -> Callable:
    """Compiles the evaluation step for a mesh; every process gets the results of all examples."""
    return jax.jit(
        step,
        in_shardings=(
            shardings.evaluation_variables(),
            batch_shardings(mesh, task.evaluation_spec()),
        ),
        out_shardings=replicated(mesh),
    )
