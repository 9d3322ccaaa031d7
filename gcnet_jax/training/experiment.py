"""From a config to everything that a run needs, with every check that needs no compilation."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gcnet_jax.data.batches import Batches
from gcnet_jax.errors import ConfigError
from gcnet_jax.models.registry import list_models, model_entry
from gcnet_jax.stored import ModelDescription
from gcnet_jax.tasks import TASKS, Examples, Task, find_task
from gcnet_jax.training.checks import check_config
from gcnet_jax.training.config import plain, steps
from gcnet_jax.training.freezing import parse_patterns
from gcnet_jax.training.initial import preprocessing, read_initial_description, take_network
from gcnet_jax.training.mesh import batch_parts, make_mesh
from gcnet_jax.training.optimizers import (
    make_optimizer,
    warmup_cosine,
    warmup_milestones,
    warmup_poly,
)
from gcnet_jax.training.processes import check_connected
from gcnet_jax.training.state import state_initializer
from gcnet_jax.training.steps import StepOptions


@dataclasses.dataclass(frozen=True)
class Durations:
    """The durations of a config in steps; `config.is_due` says when something is due.

    Attributes:
      epoch: Batches per epoch; need not be an integer.
      total: Where the run ends.
      evaluation, checkpoint: Interval of each; need not be an integer.
      early_stopping: How long the task's best metric may go without improving, or None.
      extend: Whether a run of another total is continued.
    """

    epoch: float
    total: int
    evaluation: float
    checkpoint: float
    early_stopping: float | None
    extend: bool


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that a run is built of; nothing here is compiled or random.

    Attributes:
      config: Every setting, with those that followed from the checkpoint filled in.
      description: Description of the network, as stored with each checkpoint.
      model: The network.
      task: What it learns.
      train_source, evaluation_source: The examples.
      train_batches: Returns this process's part of the batches from `start_step` on.
      evaluation_batches: Returns this process's part of the evaluation batches.
      schedule: The learning rate, a function of the step.
      optimizer: With the schedule inside.
      step_options: Arguments of the steps.
      mesh: The devices.
      batch_size: Images of one step over all devices.
      seed: Seeds everything random.
      durations: How long and how often, in steps.
      init_from: The checkpoint that the weights come from at first, or None.
      skip_damaged: Whether damaged records are left out of the batches, and counted.
      notes: What the user should know before the run begins, one line each.
    """

    config: ConfigDict
    description: ModelDescription
    model: nn.Module
    task: Task
    train_source: Examples
    evaluation_source: Examples
    train_batches: Callable[..., Batches]
    evaluation_batches: Callable[[], Batches]
    schedule: Callable[[Any], Any]
    optimizer: optax.GradientTransformation
    step_options: StepOptions
    mesh: Mesh
    batch_size: int
    seed: int
    durations: Durations
    init_from: str | None = None
    skip_damaged: bool = False
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def initialize(self) -> Callable:
        """The pure function from a random key to the state at step 0.

        It is one and the same each time, so that JAX traces it once.
        """
        return state_initializer(
            self.model,
            self.optimizer,
            (*self.description.preprocessing.train_shape, 3),
            use_ema=self.step_options.ema_decay > 0,
        )


def assemble(config: ConfigDict, **options: Any) -> Experiment:
    """Checks a config and builds everything that it describes.

    Args:
      config: Every setting.
      **options: See `build`.

    Raises:
      ConfigError: A setting that is unknown, out of range, or does not fit the network, the data or
        the devices.
      DataError: The data set cannot be read.
    """
    check_config(config)
    return build(config, **options)


def build(
    config: ConfigDict,
    *,
    devices: Any = None,
    sources: Sequence[Examples] | None = None,
    workdir: Path | None = None,
) -> Experiment:
    """Builds everything that a config describes, and refuses what cannot work.

    Args:
      config: Every setting, as `check_config` has let it pass.
      devices: What the mesh is made of; the devices that are here when None.
      sources: Training and evaluation examples, or stand-ins for them; None opens the config's.
      workdir: Where the run is or will be, see `read_initial_description`.

    Raises:
      ConfigError: A setting does not fit the network, the data or the devices.
      DataError: The data set cannot be read.
    """
    mesh = make_mesh(**config.mesh, devices=devices)
    check_connected()
    training, step_options = config.training, _step_options(config)
    batch_size, seed, init_from = training.batch_size, training.seed, training.init_from
    _check_divisible(config, mesh, batch_size, step_options.accumulation_steps)
    initial = read_initial_description(init_from, workdir)
    config = take_network(config, initial)
    _check_trainable(config, initial)  # Before the data set is opened.
    train_source, evaluation_source = _open_sources(config) if sources is None else sources
    description = _describe(config, train_source, evaluation_source, initial)
    _check_sizes(description, mesh)
    images = description.preprocessing
    task = find_task(config.task.name).build(config.task, train_source, images)
    durations = _durations(config, len(train_source), batch_size)
    schedule, notes = _schedule(config, durations)
    common = _common_options(config, batch_size)
    train = task.train_loader(config.data, images)
    evaluate = task.evaluation_loader(config.data, images)
    experiment = Experiment(
        config=config,
        description=description,
        model=description.build(),
        task=task,
        train_source=train_source,
        evaluation_source=evaluation_source,
        train_batches=functools.partial(train, train_source, **common, seed=seed),
        evaluation_batches=functools.partial(evaluate, evaluation_source, **common),
        schedule=schedule,
        optimizer=make_optimizer(schedule=schedule, **config.optimizer),
        step_options=step_options,
        mesh=mesh,
        batch_size=batch_size,
        seed=seed,
        durations=durations,
        init_from=init_from,
        skip_damaged=common['skip_damaged'],
        notes=(*notes, *_batch_notes(batch_size, len(train_source))),
    )
    check_shapes(experiment)
    return experiment


def check_batches(experiment: Experiment) -> None:
    """Makes both loaders without reading a batch.

    What they refuse, such as an image that is larger than its canvas, would otherwise be reported
    when the config has been written, and for the evaluation split only after the first epoch.

    Raises:
      ConfigError, DataError: As the loaders do.
    """
    for make in (experiment.train_batches, experiment.evaluation_batches):
        make().close()


def check_shapes(experiment: Experiment) -> None:
    """Traces the network without computing: an image too small for it is reported here."""
    jax.eval_shape(experiment.initialize, jax.random.key(0))


def _step_options(config: ConfigDict) -> StepOptions:
    return StepOptions(
        accumulation_steps=config.training.accumulation_steps,
        ema_decay=config.training.ema_decay,
        frozen=parse_patterns(config.optimizer.frozen),
    )


def _check_trainable(config: ConfigDict, initial: ModelDescription | None) -> None:
    """Refuses networks that the task does not train or start from, and unknown ones."""
    task, name = find_task(config.task.name), config.model.name
    example = list_models('gc_*resnet50*', task.networks)[0]
    if name is None:
        raise ConfigError(
            f'config.training.init_from is a network for {initial.task}, which fills no more than '
            f'the backbone of one for {task.networks}; name that network: '
            f'--config.model.name={example}, for example'
        )
    _check_kind(name, task, example)
    if initial is not None and initial.task not in task.backbones:
        _check_kind(initial.name, task, example)


def _check_kind(network: str, task: type[Task], example: str) -> None:
    kind = model_entry(network).task
    if kind == task.networks:
        return
    tasks = [other.name for other in TASKS.values() if other.networks == kind]
    raise ConfigError(
        f'{network} is a network for {kind}, and config.task.name is {task.name!r}; choose a '
        f'network for {task.networks}, such as {example}, or --config.task.name={tasks[0]}'
    )


def _check_divisible(config: ConfigDict, mesh: Mesh, batch: int, micro: int) -> None:
    parts = batch_parts(mesh)
    if batch % (parts * micro):
        raise ConfigError(
            f'config.training.batch_size is {batch}; it must divide by {parts * micro}: the mesh '
            f'splits it into {parts} (data {mesh.shape["data"]}, fsdp {mesh.shape["fsdp"]}) and '
            f'config.training.accumulation_steps into {micro}'
        )
    norm_group = (config.model.norm or {}).get('group_size')
    if norm_group and batch // micro % norm_group:
        raise ConfigError(
            f'config.model.norm.group_size is {norm_group}; it must divide the {batch // micro} '
            f'images that are computed at a time: config.training.batch_size={batch} over '
            f'config.training.accumulation_steps={micro}'
        )
    if parts % jax.process_count():
        raise ConfigError(
            f'the mesh splits the batch into {parts}, not a multiple of the {jax.process_count()} '
            'processes; give config.mesh.data or config.mesh.fsdp more devices'
        )
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
    if (owners != owners[..., :1]).any():
        raise ConfigError(
            f'config.mesh.spatial is {mesh.shape["spatial"]}: it would split an image over several '
            f'processes, which have {(owners == owners.flat[0]).sum()} devices each; lower it'
        )


def _check_sizes(description: ModelDescription, mesh: Mesh) -> None:
    images = description.preprocessing
    shapes = {'image_size': images.train_shape, 'evaluation_image_size': images.test_shape}
    for name, (height, width) in shapes.items():
        if height % mesh.shape['spatial']:
            size, what = (height, 'it') if height == width else ((height, width), 'the height')
            raise ConfigError(
                f'config.data.{name} is {size}; {what} must divide by config.mesh.spatial, which '
                f'is {mesh.shape["spatial"]}'
            )


def _open_sources(config: ConfigDict) -> list[Examples]:
    data, task = config.data, find_task(config.task.name)
    return [
        task.load_source(data.name, split, data.data_dir, purpose='selection')
        for split in (data.train_split, data.evaluation_split)
    ]


def _batch_notes(batch: int, examples: int) -> list[str]:
    if batch <= examples:
        return []
    return [
        f'config.training.batch_size is {batch}, and there are only {examples} training images: a '
        f'step takes {batch / examples:.1f} epochs; a batch_size of at most {examples} makes '
        'more steps of as many epochs'
    ]


def _describe(
    config: ConfigDict, train: Examples, evaluation: Examples, initial: ModelDescription | None
) -> ModelDescription:
    options = {key: value for key, value in plain(config)['model'].items() if key != 'name'}
    kind = find_task(config.task.name)
    options['num_classes'], names = kind.outputs_of(train, evaluation, options['num_classes'])
    return ModelDescription(
        name=config.model.name,
        options=options,
        label_names=names,
        preprocessing=preprocessing(config, initial),
        task=config.task.name,
        source=f'trained on {train.name}, split {train.split}',
    )


def _common_options(config: ConfigDict, batch_size: int) -> dict[str, Any]:
    return {
        'global_batch_size': batch_size,
        'num_threads': config.data.num_threads,
        'num_workers': config.data.num_workers,
        'skip_damaged': config.data.skip_damaged,
        'process_index': jax.process_index(),
        'process_count': jax.process_count(),
    }


def _durations(config: ConfigDict, examples: int, batch_size: int) -> Durations:
    training = config.training
    per_epoch = examples / batch_size
    total = round(steps(training, 'total', per_epoch))
    if total < 1:
        raise ConfigError(
            f'config.training.total_epochs is {training.total_epochs}: less than one step of '
            f'{batch_size} images, as there are {examples}; raise it, or lower batch_size'
        )
    return Durations(
        epoch=per_epoch,
        total=total,
        evaluation=steps(training, 'evaluation', per_epoch),
        checkpoint=steps(training, 'checkpoint', per_epoch),
        early_stopping=_optional_steps(training, 'early_stopping', per_epoch),
        extend=training.extend,
    )


def _optional_steps(group: ConfigDict, name: str, per_epoch: float) -> float | None:
    if group[f'{name}_epochs'] is None and group[f'{name}_steps'] is None:
        return None
    return steps(group, name, per_epoch)


def _schedule(config: ConfigDict, durations: Durations) -> tuple[Callable[[Any], Any], list[str]]:
    """Returns the learning rate as a function of the step, and notes about it for the user."""
    settings, total_steps = config.schedule, durations.total
    warmup = round(steps(settings, 'warmup', durations.epoch))
    notes, longest = [], total_steps // 2
    if warmup > longest:
        notes.append(
            f'the warm-up of {warmup} steps is shortened to {longest}, half of the '
            f'{total_steps} steps of this run'
        )
    peak, warmup = settings.peak_learning_rate, min(warmup, longest)
    if settings.decay_epochs is None:
        power = settings.poly_power
        fall = warmup_cosine if power is None else functools.partial(warmup_poly, power=power)
        lengths = {'warmup_steps': warmup, 'total_steps': total_steps}
        return fall(peak, **lengths, end_factor=settings.end_factor), notes
    factor = 0.1 if settings.decay_factor is None else settings.decay_factor
    milestones = [round(epoch * durations.epoch) for epoch in settings.decay_epochs]
    return warmup_milestones(peak, warmup_steps=warmup, milestones=milestones, factor=factor), notes


def state_bytes(experiment: Experiment) -> int:
    """Returns the size of a state, which is about that of a checkpoint."""
    state = jax.eval_shape(experiment.initialize, jax.random.key(0))
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(state))
