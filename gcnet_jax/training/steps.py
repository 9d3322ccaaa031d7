"""The training step and the evaluation step: pure functions, and their one jit over the mesh.

`jax.jit` with `in_shardings` and `out_shardings` is what `pjit` was: the partitioner reads where
the arguments live and places every collective. BatchNorm's statistics are therefore those of the
whole batch, with no axis name in the model. Steps return sums and counts; only the host divides.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, UInt8

from gcnet_jax.data import augment
from gcnet_jax.training.losses import cross_entropy, in_top, smooth_labels
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


def prepare(
    images: UInt8[Array, 'batch height width channel'],
    labels: Int[Array, ' batch'],
    key: Array,
    options: StepOptions,
) -> tuple[Float[Array, 'batch height width channel'], Float[Array, 'batch classes']]:
    """Normalises, erases and mixes a batch on the device; the labels become distributions."""
    erase_key, mix_key = jax.random.split(key)
    images = augment.normalize(images, options.mean, options.std)
    targets = jax.nn.one_hot(labels, options.num_classes)
    if options.erasing_probability:
        images = augment.random_erasing(erase_key, images, options.erasing_probability)
    if options.mixup_alpha or options.cutmix_alpha:
        images, targets = augment.mix(
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


def make_loss(model: nn.Module, options: StepOptions, mesh: Mesh) -> Callable:
    """Returns the function to a micro-batch's share of the batch's mean loss, and its sums."""

    places = contextlib.nullcontext
    if mesh.shape['spatial'] > 1:
        places = functools.partial(nn.intercept_methods, place_features(mesh))

    def loss_share(params, batch_stats, images, targets, key, batch_size):
        with places():
            logits, updated = model.apply(
                {'params': params, 'batch_stats': batch_stats},
                images,
                train=True,
                mutable=['batch_stats'],
                rngs={'dropout': key},
            )
        losses = cross_entropy(logits, smooth_labels(targets, options.label_smoothing))
        correct = in_top(logits, jnp.argmax(targets, axis=-1), 1)
        sums = {'loss': jnp.sum(losses), 'correct': jnp.sum(correct.astype(jnp.float32))}
        return sums['loss'] / batch_size, (updated.get('batch_stats', {}), sums)

    return loss_share


def make_gradient(model: nn.Module, options: StepOptions, mesh: Mesh) -> Callable:
    """Returns the function to a batch's gradient, new statistics and sums.

    A micro-batch takes every n-th example, so that each device keeps its own rows. The gradient is
    that of the mean over the whole batch; BatchNorm sees one micro-batch at a time.
    """
    gradient = jax.value_and_grad(make_loss(model, options, mesh), has_aux=True)
    count = options.accumulation_steps

    def split(array):
        spec = PartitionSpec(None, *(('data', 'fsdp'), 'spatial')[: 2 if array.ndim == 4 else 1])
        parts = jnp.moveaxis(array.reshape(-1, count, *array.shape[1:]), 1, 0)
        return jax.lax.with_sharding_constraint(parts, NamedSharding(mesh, spec))

    def whole(params, batch_stats, images, targets, key):
        size = images.shape[0]
        if count == 1:
            (_, (batch_stats, sums)), grads = gradient(
                params, batch_stats, images, targets, key, size
            )
            return grads, batch_stats, sums

        def add(carry, micro):
            grads, batch_stats, sums = carry
            images, targets, index = micro
            (_, (batch_stats, new)), more = gradient(
                params, batch_stats, images, targets, jax.random.fold_in(key, index), size
            )
            return (
                jax.tree.map(jnp.add, grads, more),
                batch_stats,
                jax.tree.map(jnp.add, sums, new),
            ), None

        zero = jnp.zeros((), jnp.float32)
        start = (jax.tree.map(jnp.zeros_like, params), batch_stats, {'loss': zero, 'correct': zero})
        (grads, batch_stats, sums), _ = jax.lax.scan(
            add, start, (split(images), split(targets), jnp.arange(count))
        )
        return grads, batch_stats, sums

    return whole


def make_train_step(
    model: nn.Module, optimizer: optax.GradientTransformation, options: StepOptions, mesh: Mesh
) -> Callable[[TrainState, dict], tuple[TrainState, Metrics]]:
    """Returns the pure training step.

    It maps the state and a batch {'image': uint8 [batch, height, width, channel], 'label': int32
    [batch]} to the next state and the batch's {'loss', 'correct', 'count': sums; 'gradient_norm':
    before clipping; 'finite': bool}. Where loss or gradient are not finite, the new state has the
    old weights, statistics and optimizer state, and only `step` moves.
    """
    gradient = make_gradient(model, options, mesh)

    def step(state: TrainState, batch: dict) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        prepare_key, model_key = jax.random.split(key)
        images, targets = prepare(batch['image'], batch['label'], prepare_key, options)
        # Parameters are stored in parts and used whole. Left to itself the partitioner computes
        # with the parts, and got gradients wrong inside the loop over micro-batches (jax 0.10.2).
        params = jax.lax.with_sharding_constraint(state.params, replicated(mesh))
        grads, batch_stats, sums = gradient(params, state.batch_stats, images, targets, model_key)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(sums['loss']) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            new = {'params': params, 'batch_stats': batch_stats}
            ema = moving_average(ema, new, options.ema_decay, state.step)
        learned = state.replace(
            params=params, batch_stats=batch_stats, opt_state=opt_state, ema=ema
        )
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), learned, state)
        count = jnp.asarray(images.shape[0], jnp.float32)
        metrics = {**sums, 'count': count, 'gradient_norm': norm, 'finite': finite}
        return kept.replace(step=state.step + 1), metrics

    return step


def make_evaluation_step(model: nn.Module, options: StepOptions) -> Callable[[dict, dict], Metrics]:
    """Returns the pure evaluation step.

    It maps variables and a batch that has a 'mask' too (bool [batch], False for padding) to the
    sums {'loss', 'top1', 'top5', 'count'} over the examples that are not padding.
    """

    def step(variables: dict, batch: dict) -> Metrics:
        images = augment.normalize(batch['image'], options.mean, options.std)
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
            name: jnp.sum(jnp.where(mask, value, 0).astype(jnp.float32))
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
