"""Learning-rate schedules and optimizers, each a row in a table."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from gcnet_jax.errors import ConfigError, unknown_name
from gcnet_jax.training.freezing import (
    frozen_paths,
    layer_distances,
    merge,
    parse_patterns,
    split,
)

# The options that each optimizer takes, with their defaults. An option of another optimizer is
# refused.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    'sgd': {'momentum': 0.9, 'nesterov': True},
    'adamw': {'beta1': 0.9, 'beta2': 0.999, 'epsilon': 1e-8},
    'lamb': {'beta1': 0.9, 'beta2': 0.999, 'epsilon': 1e-6},
    'lars': {'momentum': 0.9, 'nesterov': False, 'trust_coefficient': 1e-3},
}


def warmup_cosine(
    peak: float, *, warmup_steps: int, total_steps: int, end_factor: float = 0.0
) -> Callable[[Any], Any]:
    """Returns the learning rate as a function of the step: a line up, then half a cosine down.

    Step 0 already learns: step s of the warm-up has `peak * (s + 1) / (warmup_steps + 1)`, and
    `peak` is reached at step `warmup_steps`. The last value, at `total_steps`, is `peak *
    end_factor`.
    """

    def schedule(step):
        warm = peak * (step + 1) / (warmup_steps + 1)
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        progress = jax.numpy.clip(progress, 0.0, 1.0)
        cosine = 0.5 * (1.0 + jax.numpy.cos(jax.numpy.pi * progress))
        return jax.numpy.where(
            step < warmup_steps, warm, peak * (end_factor + (1.0 - end_factor) * cosine)
        )

    return schedule


def warmup_poly(
    peak: float, *, warmup_steps: int, total_steps: int, power: float, end_factor: float = 0.0
) -> Callable[[Any], Any]:
    """Returns the learning rate as a function of the step: a line up, then a power of what is left.

    The warm-up is that of `warmup_cosine`. Step s after it has `end + (peak - end) * (1 - (s -
    warmup_steps) / (total_steps - warmup_steps)) ** power`, with `end = peak * end_factor`
    (mmsegmentation's PolyLR; its last step, and not the one after, has `end`).
    """

    def schedule(step):
        warm = peak * (step + 1) / (warmup_steps + 1)
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        left = 1.0 - jax.numpy.clip(progress, 0.0, 1.0)
        factor = end_factor + (1.0 - end_factor) * left**power
        return jax.numpy.where(step < warmup_steps, warm, peak * factor)

    return schedule


def warmup_milestones(
    peak: float, *, warmup_steps: int, milestones: Sequence[int], factor: float
) -> Callable[[Any], Any]:
    """Returns the learning rate as a function of the step: a line up, then level with drops.

    The warm-up is that of `warmup_cosine`. From each milestone on, a step, the rate is multiplied
    by `factor`.
    """

    def schedule(step):
        warm = peak * (step + 1) / (warmup_steps + 1)
        passed = sum(jax.numpy.where(step >= milestone, 1, 0) for milestone in milestones)
        return jax.numpy.where(step < warmup_steps, warm, peak) * factor**passed

    return schedule


def decay_mask(params: Any) -> Any:
    """Says of each parameter whether weight decay applies: to kernels, not to norms and biases."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def optimizer_options(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an optimizer's options: its defaults, overridden by what in `given` is not None.

    Raises:
      ConfigError: There is no such optimizer, or it does not take an option that is given.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(unknown_name('optimizer (optimizer.name)', name, OPTIMIZERS))
    options = dict(OPTIMIZERS[name])
    for key, value in given.items():
        if value is None:
            continue
        if key not in options:
            raise ConfigError(
                f'optimizer.{key} is {value!r}, but {name} does not have it; it takes '
                f'{", ".join(options)}: leave {key} unset or choose another optimizer.name'
            )
        options[key] = value
    return options


def make_optimizer(
    name: str,
    schedule: Callable[[Any], Any] | float,
    *,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    frozen: Any = None,
    layer_decay: float | None = None,
    **given: Any,
) -> optax.GradientTransformation:
    """Builds an optimizer.

    Args:
      name: 'sgd', 'adamw', 'lamb' or 'lars'.
      schedule: The learning rate, a function of the step.
      weight_decay: For sgd and lars added to the gradient, for adamw and lamb decoupled from it;
        kernels only.
      clip_norm: The largest allowed norm of the whole gradient; None does not clip.
      frozen: Patterns of the parameters that are not trained (see `freezing.frozen_paths`). Their
        updates are zero and they have no optimizer state.
      layer_decay: Multiplies the learning rate once for each layer below the classifier (see
        `freezing.layer_distances`); None and 1 train all layers at the same rate.
      **given: Options of `OPTIMIZERS[name]`; None takes the default there.

    Raises:
      ConfigError: There is no such optimizer, or it does not take an option that is given.
    """
    options = optimizer_options(name, given)
    if name == 'sgd':
        core = optax.chain(
            optax.add_decayed_weights(weight_decay, decay_mask), optax.sgd(schedule, **options)
        )
    elif name == 'lars':
        core = optax.lars(
            schedule,
            weight_decay=weight_decay,
            weight_decay_mask=decay_mask,
            trust_ratio_mask=decay_mask,
            **options,
        )
    else:
        core = {'adamw': optax.adamw, 'lamb': optax.lamb}[name](
            schedule,
            b1=options['beta1'],
            b2=options['beta2'],
            eps=options['epsilon'],
            weight_decay=weight_decay,
            mask=decay_mask,
        )
    if clip_norm is not None:
        core = optax.chain(optax.clip_by_global_norm(clip_norm), core)
    patterns = parse_patterns(frozen)
    if patterns:
        core = _train_the_rest(core, patterns)
    return core if layer_decay in (None, 1) else _decay_by_layer(core, layer_decay)


def _train_the_rest(
    core: optax.GradientTransformation, patterns: tuple[str, ...]
) -> optax.GradientTransformation:
    """Shows `core` only the parameters that are not frozen."""

    def init(params):
        return core.init(split(params, frozen_paths(params, patterns))[0])

    def update(updates, state, params):
        chosen = frozen_paths(params, patterns)
        trained, fixed = split(updates, chosen)
        trained, state = core.update(trained, state, split(params, chosen)[0])
        return merge(trained, jax.tree.map(jax.numpy.zeros_like, fixed)), state

    return optax.GradientTransformation(init, update)


def _decay_by_layer(
    core: optax.GradientTransformation, decay: float
) -> optax.GradientTransformation:
    """Scales the finished updates, which scales the learning rate whatever the optimizer."""

    def update(updates, state, params):
        updates, state = core.update(updates, state, params)
        scales = {name: decay**distance for name, distance in layer_distances(params).items()}
        scaled = {
            path: leaf * scales['/'.join(path[: 2 if path[0] == 'backbone' else 1])]
            for path, leaf in flatten_dict(dict(updates)).items()
        }
        return unflatten_dict(scaled), state

    return optax.GradientTransformation(core.init, update)
