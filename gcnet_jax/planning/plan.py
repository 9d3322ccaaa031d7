"""Knowing before renting: compiles the real training step for a TPU that is not there.

The TPU compiler (libtpu) needs no TPU. The memory, the arithmetic, the traffic and the collectives
of a chip's share of one step are exact for that compiler; divided by the chip's peaks they bound
the speed. Nothing here is measured on a TPU.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from gcnet_jax.data.sizes import format_size
from gcnet_jax.errors import ConfigError, DataError
from gcnet_jax.models.registry import option_readers
from gcnet_jax.planning.chips import Chip, PlanError, parse_topology, topology_devices
from gcnet_jax.planning.program import OutOfMemory, Program, compile_lowered, placed
from gcnet_jax.planning.stand_in import StandInSource
from gcnet_jax.tasks import Task, find_task
from gcnet_jax.training.checks import check_config
from gcnet_jax.training.experiment import Experiment, build
from gcnet_jax.training.initial import read_initial_description
from gcnet_jax.training.mesh import batch_shardings, state_shardings
from gcnet_jax.training.steps import jit_train_step, make_train_step

BATCH_MULTIPLE = 8


# Called with what is compiled, in words, and entered meanwhile.
Compiling = Callable[[str], contextlib.AbstractContextManager]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A config on a topology.

    Attributes:
      network: What was compiled, in words.
      topology: Its name, such as 'v5e:4x4'.
      chip: Of which kind the chips are.
      chips: How many.
      batch_size: Images of a step over all chips.
      parameters: Trained parameters of the network.
      program: The compiled step; None where it does not fit.
      needed_bytes: Memory that a chip needs; None where not even that is known.
      twin: The same network without context; None where it was not asked for or has none.
      twin_parameters: Its parameters, or 0.
    """

    network: str
    topology: str
    chip: Chip
    chips: int
    batch_size: int
    parameters: int
    program: Program | None
    needed_bytes: int | None
    twin: Program | None = None
    twin_parameters: int = 0

    @property
    def batch_per_chip(self) -> float:
        """Images of a step for each chip; less than one where chips share an image."""
        return self.batch_size / self.chips

    def without_context(self) -> 'Plan':
        """Returns the plan of the twin."""
        return dataclasses.replace(
            self,
            program=self.twin,
            needed_bytes=self.twin.memory,
            parameters=self.twin_parameters,
            twin=None,
            twin_parameters=0,
        )

    def bounds(self) -> dict[str, Any]:
        """Returns how fast the step can be at the chip's peaks: seconds, images/s, MFU.

        The model FLOPs utilisation (MFU) is at most what is left where the memory takes longer.
        Collectives and the host are not counted, so a real step takes longer.
        """
        times = {
            'arithmetic': self.program.flops / self.chip.peak_flops,
            'memory': self.program.traffic.hbm_bytes / self.chip.bandwidth,
        }
        bound = max(times, key=times.get)
        seconds = times[bound]
        return {
            'arithmetic_seconds': times['arithmetic'],
            'memory_seconds': times['memory'],
            'bound_by': bound,
            'images_per_second': self.batch_size / seconds,
            'mfu': times['arithmetic'] / seconds,
        }


def describe(
    config: ConfigDict, devices: Sequence[Any], batch_size: int, *, with_context: bool = True
) -> Experiment:
    """Assembles a config for devices that are not here; the data set need not be here either.

    Args:
      config: Every setting, see `gcnet_jax.training.config`.
      devices: What the mesh is made of.
      batch_size: Images of a step over all devices, in place of the config's.
      with_context: False takes the context blocks out, a head's too.

    Raises:
      ConfigError: A setting that cannot work.
      DataError: Neither `config.model.num_classes` nor the data set gives the number of labels.
    """
    check_config(config)
    tree = config.to_dict()
    model, data = tree['model'], tree['data']
    # How long a run is depends on the images; what a step costs does not.
    tree['training'] |= {'batch_size': batch_size, 'total_steps': 1000}
    tree['schedule']['warmup_steps'] = 1
    kind = find_task(tree['task']['name'])
    if not with_context:
        place = tree['training']['init_from']
        name = model['name'] or read_initial_description(place).name
        # Of a head and of a backbone, where the network has them.
        model |= dict.fromkeys({'context', 'context_ratio'} & option_readers(name, model).keys())
    labels = _label_names(kind, model['num_classes'], data)
    if tree['task'].get('class_weights') == 'balanced':
        # The weights come from the images; the cost of a step does not depend on their values.
        tree['task']['class_weights'] = (1.0,) * len(labels)
    sources = [
        StandInSource(data['name'], split, labels, batch_size, kind.is_multilabel)
        for split in (data['train_split'], data['evaluation_split'])
    ]
    return build(ConfigDict(tree), devices=devices, sources=sources)


def _label_names(
    task: type[Task], num_classes: int | None, data: Mapping[str, Any]
) -> tuple[str, ...]:
    if num_classes is not None:
        return tuple(map(str, range(num_classes)))
    try:
        return task.read_label_names(data['name'], data['data_dir'])
    except DataError as error:
        raise DataError(
            f'{error}; or, for a plan, give --config.model.num_classes=NUMBER'
        ) from error


def compile_step(experiment: Experiment) -> Program:
    """Compiles the training step of an experiment and reads what it costs.

    Raises:
      OutOfMemory: It does not fit into the chip's memory.
    """
    mesh, task = experiment.mesh, experiment.task
    step = make_train_step(
        experiment.model, experiment.optimizer, task, experiment.step_options, mesh
    )
    state = jax.eval_shape(experiment.initialize, jax.random.key(0))
    shardings = state_shardings(state, mesh)
    shape = experiment.description.preprocessing.train_shape
    batch = task.batch_shapes(experiment.batch_size, *shape)
    lowered = jit_train_step(step, task, mesh, shardings).lower(
        placed(state, shardings), placed(batch, batch_shardings(mesh, task.batch_spec()))
    )
    # The compiler counts the body of the loop over micro-batches once, and nearly all arithmetic is
    # in it.
    return compile_lowered(lowered, experiment.step_options.accumulation_steps)


def make_plan(config: ConfigDict, topology: str, batch_per_chip: int | None = None) -> Plan:
    """Compiles a config's training step for a topology.

    Args:
      config: Every setting.
      topology: Such as 'v5e:4x4'.
      batch_per_chip: Images of a step for each chip; None: the config's batch over all chips.

    Raises:
      UserError: The topology, the compiler or a setting; one line that says what to do.
    """
    chip, chips = parse_topology(topology)
    _check_batch(batch_per_chip)
    batch_size = config.training.batch_size if batch_per_chip is None else batch_per_chip * chips
    experiment = describe(config, topology_devices(topology), batch_size)
    plan = Plan(
        network=_network(config, experiment.description.name),
        topology=topology,
        chip=chip,
        chips=chips,
        batch_size=batch_size,
        parameters=_parameters(experiment),
        program=None,
        needed_bytes=None,
    )
    try:
        program = compile_step(experiment)
    except OutOfMemory as error:
        return dataclasses.replace(plan, needed_bytes=error.needed_bytes)
    return dataclasses.replace(plan, program=program, needed_bytes=program.memory)


def _check_batch(batch_per_chip: int | None) -> None:
    if batch_per_chip is not None and batch_per_chip < 1:
        raise ConfigError(f'the batch for each chip is {batch_per_chip}; it must be 1 or more')


def _network(config: ConfigDict, name: str | None = None) -> str:
    """Names the network of a config, which may be the one of the checkpoint it starts from."""
    name = name or config.model.name or f'the network of {config.training.init_from}'
    size = config.data.image_size
    size = f'{format_size(size)} pixels, ' if size else ''
    return f'{name}, {size}{config.model.dtype}'


def _title(config: ConfigDict, topology: str, batch_per_chip: int | None) -> str:
    """Returns in words what `make_plan` compiles."""
    _, chips = parse_topology(topology)
    batch = config.training.batch_size / chips if batch_per_chip is None else batch_per_chip
    return f'{_network(config)} for {topology}, {batch:g} images a chip'


def add_twin(plan: Plan, config: ConfigDict, compiling: Compiling = contextlib.nullcontext) -> Plan:
    """Compiles the same network without context too; a network that has none gets no twin."""
    devices = topology_devices(plan.topology)
    if not _has_context(describe(config, devices, plan.batch_size).model):
        return plan
    plain = describe(config, devices, plan.batch_size, with_context=False)
    with compiling(f'{plan.network} for {plan.topology} without its context'):
        twin = compile_step(plain)
    return dataclasses.replace(plan, twin=twin, twin_parameters=_parameters(plain))


def _has_context(model: nn.Module) -> bool:
    parts = (model, getattr(model, 'backbone', None))
    return any(getattr(part, 'context', ()) for part in parts) or bool(
        getattr(model, 'context_ratio', None)
    )


def _parameters(experiment: Experiment) -> int:
    state = jax.eval_shape(experiment.initialize, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(state.params))


def largest_batch(fits: Callable[[int], bool], start: int) -> int:
    """Returns the largest multiple of 8 that fits, or 0; doubles from `start`, then bisects.

    Args:
      fits: Whether a size fits; if one does, smaller ones do.
      start: Where to begin.
    """
    low, high = 0, None
    size = max(BATCH_MULTIPLE, start // BATCH_MULTIPLE * BATCH_MULTIPLE)
    while high is None:
        if fits(size):
            low, size = size, size * 2
        else:
            high = size
    while high - low > BATCH_MULTIPLE:
        middle = (low + high) // (2 * BATCH_MULTIPLE) * BATCH_MULTIPLE
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def make_plans(
    config: ConfigDict,
    topologies: Sequence[str],
    batch_per_chip: int | None = None,
    *,
    find_largest: bool = False,
    tell: Callable[[Plan], None] = lambda plan: None,
    compiling: Compiling = contextlib.nullcontext,
) -> list[Plan]:
    """Compiles a config's training step for several topologies.

    On the first where it fits, the network without its context is compiled too.

    Args:
      config: Every setting.
      topologies: Such as 'v5e:4x4'.
      batch_per_chip: As for `make_plan`.
      find_largest: Find the largest batch a chip, on multiples of 8, beginning there.
      tell: Called with each plan as it is made.
      compiling: Called before each compilation with what is compiled, in words; the result is
        entered while that is done, see `gcnet_jax.planning.announcer`.

    Raises:
      UserError: As `make_plan`; or not even the smallest batch fits.
    """
    for topology in topologies:
        parse_topology(topology)  # A wrong one is reported before the first is compiled.
    _check_batch(batch_per_chip)
    plans, needs_twin = [], True
    for topology in topologies:
        if find_largest:
            plan = _largest_plan(config, topology, batch_per_chip, tell, compiling)
        else:
            with compiling(_title(config, topology, batch_per_chip)):
                plan = make_plan(config, topology, batch_per_chip)
            tell(plan)
        if needs_twin and plan.program is not None:
            plan, needs_twin = add_twin(plan, config, compiling), False
        plans.append(plan)
    return plans


def _largest_plan(
    config: ConfigDict,
    topology: str,
    start: int | None,
    tell: Callable[[Plan], None],
    compiling: Compiling,
) -> Plan:
    tried = {}

    def fits(size: int) -> bool:
        with compiling(_title(config, topology, size)):
            tried[size] = make_plan(config, topology, size)
        tell(tried[size])
        return tried[size].program is not None

    _, chips = parse_topology(topology)
    size = largest_batch(fits, start or config.training.batch_size // chips)
    if not size:
        raise PlanError(
            f'{topology}: not even {BATCH_MULTIPLE} images a chip fit; choose a chip with more '
            'memory, or split images with --config.mesh.spatial or parameters with '
            '--config.mesh.fsdp'
        )
    return tried[size]
