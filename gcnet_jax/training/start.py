"""Where a run starts: from its newest intact checkpoint, from another network, or at random."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax

from gcnet_jax.errors import CheckpointError
from gcnet_jax.files import as_place, explain_bucket
from gcnet_jax.stored import find_checkpoint, load_variables, step_directories
from gcnet_jax.tasks import OutputPlan
from gcnet_jax.training.checkpoints import CheckpointStore
from gcnet_jax.training.experiment import Experiment
from gcnet_jax.training.freezing import frozen_paths, split
from gcnet_jax.training.initial import explain_other_network, merge_initial
from gcnet_jax.training.mesh import state_shardings
from gcnet_jax.training.metrics import Window
from gcnet_jax.training.state import TrainState, create_state


@dataclasses.dataclass
class Start:
    """What the loop begins with.

    Attributes:
      state: The training state after `step` steps.
      shardings: The sharding of each of its leaves.
      step: Number of steps done.
      window: Sums of the steps since the last line of metrics.
      bad_in_a_row: Steps up to this one that were not finite.
      best: {'step', 'value'} of the best evaluation so far, or None.
    """

    state: TrainState
    shardings: TrainState
    step: int = 0
    window: Window = dataclasses.field(default_factory=Window)
    bad_in_a_row: int = 0
    best: dict | None = None


@dataclasses.dataclass(frozen=True)
class Initial:
    """The weights that a run starts from.

    Attributes:
      place: The checkpoint, as `training.init_from` names it.
      variables: {'params', 'batch_stats'}.
      outputs: Which of its outputs are kept.
      text: Which checkpoint they are of, in one line for the user.
      modules: Those of the outputs, and those that the checkpoint lacks: keywords of
        `merge_initial`.
    """

    place: str
    variables: dict
    outputs: OutputPlan
    text: str
    modules: dict[str, tuple[str, ...]]


def read_initial(experiment: Experiment, workdir: Path) -> Initial | None:
    """Reads the checkpoint to start from, and refuses one that does not fit.

    Returns None where `init_from` is unset, and for a run that has checkpoints to continue from.
    """
    place = experiment.init_from
    with explain_bucket(workdir, CheckpointError, '--workdir'):
        if place is None or step_directories(workdir):
            return None
    checkpoint = find_checkpoint(place, choose='best')
    there, variables = load_variables(checkpoint)
    fresh = jax.eval_shape(experiment.initialize, jax.random.key(0))
    fresh = {'params': fresh.params, 'batch_stats': fresh.batch_stats}
    variables, new_modules = experiment.task.take_over(there, variables)
    modules = {'outputs': experiment.task.output_modules, 'new_modules': new_modules}
    try:
        merge_initial(fresh, variables, kept=(), place=place, **modules)
    except CheckpointError as error:
        raise explain_other_network(error, experiment.description, there, place) from error
    outputs = experiment.task.plan_outputs(
        experiment.description, there, experiment.config.training.new_classifier, place
    )
    text = _explain_choice(place, there.name, checkpoint)
    return Initial(place, variables, outputs, text, modules)


def _explain_choice(place: str, name: str, chosen: Path) -> str:
    """Describes which checkpoint `training.init_from` led to, and how to choose another."""
    text = f'weights from {place} ({name})'
    steps = [] if chosen == as_place(place) else list(step_directories(place))
    if len(steps) < 2:
        # A ported network always has step 0.
        return text if chosen.name == '0' else f'{text}, step {chosen.name}'
    setting = f'--config.training.init_from={chosen.parent}'
    if chosen.name == str(steps[-1]):
        text += f', step {chosen.name}, the best and the newest; any other is chosen by '
        return f'{text}{setting}/STEP'
    text += f', step {chosen.name}, the best; the newest is of step {steps[-1]} '
    return f'{text}({setting}/{steps[-1]})'


def find_start(
    experiment: Experiment,
    store: CheckpointStore,
    initial: Initial | None,
    say: Callable[[str], None],
) -> Start:
    """Restores the newest intact checkpoint, or makes the state of step 0.

    Args:
      experiment: What the run is made of.
      store: Its checkpoints.
      initial: The weights that a new run starts from, as `read_initial` returns them.
      say: Called with each line for the user.

    Raises:
      CheckpointError: No checkpoint is intact, or the data set has changed.
    """
    initialize, mesh = experiment.initialize, experiment.mesh
    shapes = jax.eval_shape(initialize, jax.random.key(0))
    shardings = state_shardings(shapes, mesh)
    target = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        shardings,
    )
    _introduce(experiment, shapes, say)
    restored = store.restore(target)
    if restored is not None:
        return _continue(experiment, *restored, shardings, say)
    state, shardings = create_state(initialize, experiment.seed, mesh)
    if initial is not None:
        state = _fill(state, shardings, initial, say)
    return Start(state, shardings)


def _continue(
    experiment: Experiment,
    state: TrainState,
    position: dict,
    shardings: TrainState,
    say: Callable[[str], None],
) -> Start:
    """Returns the start of a run resumed from a saved position."""
    examples = len(experiment.train_source)
    if position['examples'] != examples:
        raise CheckpointError(
            f'the data set has {examples} training images, and had {position["examples"]} when '
            'this run began; restore it, or choose another --workdir'
        )
    step, window, best = position['step'], Window(position['window']), position.get('best')
    if jax.process_index() != 0:
        window.sums['skipped'] = 0.0  # The first process holds those of all.
    if best is not None and 'value' not in best:  # Saved by an earlier version.
        best = {'step': best['step'], 'value': best['accuracy']}
    say(f'continuing from step {step}')
    if experiment.durations.extend and step < experiment.durations.total:
        rate = float(experiment.schedule(step))
        say(
            f'extended to step {experiment.durations.total}: the learning rate goes on at '
            f'{rate:.3g}, as in the schedule of that many steps'
        )
    return Start(state, shardings, step, window, position['bad_in_a_row'], best)


def _fill(
    state: TrainState,
    shardings: TrainState,
    initial: Initial,
    say: Callable[[str], None],
) -> TrainState:
    """Puts a checkpoint's variables in the place of the random ones."""
    merged, context = merge_initial(
        {'params': state.params, 'batch_stats': state.batch_stats},
        initial.variables,
        kept=initial.outputs.kept,
        place=initial.place,
        kept_of=initial.outputs.kept_of,
        **initial.modules,
    )
    say(initial.text)
    if context:
        say(f'{len(context)} context parameters are new, first {context[0]}, last {context[-1]}')
    say(initial.outputs.text)
    params, batch_stats = (
        jax.tree.map(jax.device_put, merged[name], getattr(shardings, name))
        for name in ('params', 'batch_stats')
    )
    ema = state.ema
    if ema is not None:
        ema = jax.tree.map(lambda leaf: leaf.copy(), {'params': params, 'batch_stats': batch_stats})
    return state.replace(params=params, batch_stats=batch_stats, ema=ema)


def _introduce(experiment: Experiment, shapes: TrainState, say: Callable[[str], None]) -> None:
    parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes.params))
    axes = ' x '.join(f'{name} {size}' for name, size in experiment.mesh.shape.items())
    device = experiment.mesh.devices.flat[0]
    train, evaluation = experiment.train_source, experiment.evaluation_source
    say(
        f'{experiment.description.name}: {parameters:,} parameters; {train.name}: '
        f'{len(train):,} training and {len(evaluation):,} evaluation images; '
        f'{experiment.durations.total:,} steps; mesh {axes} of {device.platform} devices'
    )
    patterns = experiment.step_options.frozen
    if patterns:
        _, fixed = split(shapes.params, frozen_paths(shapes.params, patterns))
        count = sum(leaf.size for leaf in jax.tree.leaves(fixed))
        say(f'{count:,} of {parameters:,} parameters are frozen: {", ".join(patterns)}')
    for note in (*experiment.notes, *experiment.task.notes(train)):
        say(note)
