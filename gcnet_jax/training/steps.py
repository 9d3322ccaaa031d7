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
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, UInt8

from gcnet_jax.data import on_device
from gcnet_jax.models.reorder import reorder
from gcnet_jax.training.freezing import (
    evaluate_frozen,
    frozen_paths,
    frozen_statistics,
    merge,
    split,
)
from gcnet_jax.training.losses import (
    cross_entropy,
    example_weights,
    in_top,
    smooth_labels,
)
from gcnet_jax.training.mesh import batch_shardings, feature_sharding, replicated
from gcnet_jax.training.state import TrainState

Metrics = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """What a step needs beside the model and the optimizer.

    Attributes:
      num_classes: Number of labels.
      mean, std: The images' mean and standard deviation a channel, on the 0..1 scale.
      label_smoothing: Share of each label that is spread over all classes.
      accumulation_steps: Number of micro-batches that a batch is computed in, one after the other.
      mixup_alpha, cutmix_alpha: Parameters of the Beta distributions of the mixing weights; 0 is
        off.
      erasing_probability: Share of the images in which a rectangle is erased.
      ema_decay: Of the moving average of the weights; 0 is off.
      frozen: Patterns of the parameters that are not trained, see `freezing.frozen_paths`.
      class_weights: How much an example of each class counts in the loss; None is 1 for all.
    """

    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    label_smoothing: float = 0.0
    accumulation_steps: int = 1
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    erasing_probability: float = 0.0
    ema_decay: float = 0.0
    frozen: tuple[str, ...] = ()
    class_weights: tuple[float, ...] | None = None


def prepare(
    images: UInt8[Array, 'batch height width channel'],
    labels: Int[Array, ' batch'],
    key: Array,
    options: StepOptions,
) -> tuple[Float[Array, 'batch height width channel'], Float[Array, 'batch classes']]:
    """Normalises, erases and mixes a batch on the device; the labels become distributions."""
    erase_key, mix_key = jax.random.split(key)
    images = on_device.normalize(images, options.mean, options.std)
    targets = jax.nn.one_hot(labels, options.num_classes)
    if options.erasing_probability:
        images = on_device.random_erasing(erase_key, images, options.erasing_probability)
    if options.mixup_alpha or options.cutmix_alpha:
        images, targets = on_device.mix(
            mix_key, images, targets, options.mixup_alpha, options.cutmix_alpha
        )
    return images, targets


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


def make_apply(model: nn.Module, options: StepOptions, mesh: Mesh) -> Callable:
    """Returns a function computing logits and new running statistics in training.

    Modules whose parameters are all frozen run as in evaluation.
    """
    model = reorder(model)

    def apply(params, batch_stats, images, key):
        with contextlib.ExitStack() as stack:
            if mesh.shape['spatial'] > 1:
                stack.enter_context(nn.intercept_methods(place_features(mesh)))
            frozen = frozen_paths(params, options.frozen)
            if frozen:
                stack.enter_context(nn.intercept_methods(evaluate_frozen(params, frozen)))
            logits, updated = model.apply(
                {'params': params, 'batch_stats': batch_stats},
                images,
                train=True,
                mutable=['batch_stats'],
                rngs={'dropout': key},
            )
        return logits, updated.get('batch_stats', {})

    return apply


def make_loss(model: nn.Module, options: StepOptions, mesh: Mesh) -> Callable:
    """Returns a function computing a micro-batch's part of the batch's mean loss, and its sums.

    The function takes the parameters in two parts, those to differentiate by and the frozen ones,
    and `total`, the batch size or the sum of its examples' weights.
    """
    apply = make_apply(model, options, mesh)

    def loss_share(params, fixed, batch_stats, images, targets, key, total):
        params = merge(params, fixed) if fixed else params
        logits, batch_stats = apply(params, batch_stats, images, key)
        losses = cross_entropy(logits, smooth_labels(targets, options.label_smoothing))
        correct = in_top(logits, jnp.argmax(targets, axis=-1), 1)
        if options.class_weights is not None:
            losses = losses * example_weights(targets, options.class_weights)
        sums = {'loss': jnp.sum(losses), 'correct': jnp.sum(correct.astype(jnp.float32))}
        return sums['loss'] / total, (batch_stats, sums)

    return loss_share


def make_split(count: int, mesh: Mesh) -> Callable:
    """Returns a function splitting an array of a batch into `count` micro-batches.

    A micro-batch takes every n-th example, so that each device keeps its own rows.
    """

    def split_batch(array):
        spec = PartitionSpec(None, *(('data', 'fsdp'), 'spatial')[: 2 if array.ndim == 4 else 1])
        parts = jnp.moveaxis(array.reshape(-1, count, *array.shape[1:]), 1, 0)
        return jax.lax.with_sharding_constraint(parts, NamedSharding(mesh, spec))

    return split_batch


def make_gradient(model: nn.Module, options: StepOptions, mesh: Mesh) -> Callable:
    """Returns a function computing a batch's gradient, new statistics and sums.

    The gradient is that of the mean over the whole batch, with respect to the parameters that are
    not frozen; BatchNorm sees one micro-batch at a time.
    """
    gradient = jax.value_and_grad(make_loss(model, options, mesh), has_aux=True)
    count = options.accumulation_steps
    parts = make_split(count, mesh)

    def whole(params, fixed, batch_stats, images, targets, key):
        total = images.shape[0]
        if options.class_weights is not None:
            total = jnp.sum(example_weights(targets, options.class_weights))
            # Where all its examples count nothing, the batch's loss and gradient are zero.
            total = jnp.where(total > 0, total, 1.0)
        if count == 1:
            (_, (batch_stats, sums)), grads = gradient(
                params, fixed, batch_stats, images, targets, key, total
            )
            return grads, batch_stats, sums

        def add(carry, micro):
            grads, batch_stats, sums = carry
            images, targets, index = micro
            (_, (batch_stats, new)), more = gradient(
                params, fixed, batch_stats, images, targets, jax.random.fold_in(key, index), total
            )
            return (
                jax.tree.map(jnp.add, grads, more),
                batch_stats,
                jax.tree.map(jnp.add, sums, new),
            ), None

        zero = jnp.zeros((), jnp.float32)
        start = (jax.tree.map(jnp.zeros_like, params), batch_stats, {'loss': zero, 'correct': zero})
        (grads, batch_stats, sums), _ = jax.lax.scan(
            add, start, (parts(images), parts(targets), jnp.arange(count))
        )
        return grads, batch_stats, sums

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
    model: nn.Module, optimizer: optax.GradientTransformation, options: StepOptions, mesh: Mesh
) -> Callable[[TrainState, dict], tuple[TrainState, Metrics]]:
    """Returns the pure training step.

    It maps the state and a batch {'image': uint8 [batch, height, width, channel], 'label': int32
    [batch]} to the next state and the batch's {'loss', 'correct', 'count': sums; 'gradient_norm':
    before clipping, of what is not frozen; 'finite': bool}, with class weights also {'weight': sum
    of the examples' weights, by which 'loss' is to be divided}. Where loss or gradient are not
    finite, the new state has the old weights, statistics and optimizer state, and only `step`
    moves.
    """
    gradient = make_gradient(model, options, mesh)

    def step(state: TrainState, batch: dict) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        prepare_key, model_key = jax.random.split(key)
        images, targets = prepare(batch['image'], batch['label'], prepare_key, options)
        # Parameters are stored in parts and used whole. Left to itself the partitioner computes
        # with the parts, and got gradients wrong inside the loop over micro-batches (jax 0.10.2).
        params = jax.lax.with_sharding_constraint(state.params, replicated(mesh))
        frozen = frozen_paths(params, options.frozen)
        trained, fixed = split(params, frozen)
        grads, batch_stats, sums = gradient(
            trained, fixed, state.batch_stats, images, targets, model_key
        )
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
        count = jnp.asarray(images.shape[0], jnp.float32)
        metrics = {**sums, 'count': count, 'gradient_norm': norm, 'finite': finite}
        if options.class_weights is not None:
            metrics['weight'] = jnp.sum(example_weights(targets, options.class_weights))
        return kept.replace(step=state.step + 1), metrics

    return step


def make_evaluation_step(model: nn.Module, options: StepOptions) -> Callable[[dict, dict], Metrics]:
    """Returns the pure evaluation step.

    It maps variables and a batch that has a 'mask' too (bool [batch], False for padding) to the
    sums {'loss', 'top1', 'top5', 'count'} over the examples that are not padding.
    """

    def step(variables: dict, batch: dict) -> Metrics:
        images = on_device.normalize(batch['image'], options.mean, options.std)
        logits = model.apply(variables, images, train=False)
        labels, mask = batch['label'], batch['mask']
        losses = cross_entropy(logits, jax.nn.one_hot(labels, options.num_classes))
        values = {
            'loss': losses,
            'top1': in_top(logits, labels, 1),
            'top5': in_top(logits, labels, 5),
            'count': jnp.ones_like(losses),
        }
        # Padding is selected away, not multiplied: zero times infinity is not a number.
        return {
            name: jnp.sum(jnp.where(mask, value.astype(jnp.float32), 0.0))
            for name, value in values.items()
        }

    return step


def jit_train_step(step: Callable, mesh: Mesh, shardings: TrainState) -> Callable:
    """Compiles the training step for a mesh; the old state is donated to the new one."""
    return jax.jit(
        step,
        in_shardings=(shardings, batch_shardings(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def jit_evaluation_step(step: Callable, mesh: Mesh, shardings: TrainState) -> Callable:
    """Compiles the evaluation step for a mesh."""
    return jax.jit(
        step,
        in_shardings=(
            shardings.evaluation_variables(),
            batch_shardings(mesh, ('image', 'label', 'mask')),
        ),
        out_shardings=replicated(mesh),
    )
