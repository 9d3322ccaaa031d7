"""What a network's outputs stand for, by the names of its labels: compared between networks.

A run that starts from another network fills its classifier by these names, not by their order: an
output whose label the other network knows takes over that label's weights.
"""

import collections
from collections.abc import Sequence
from typing import Any

from gcnet_jax.errors import CheckpointError, ConfigError, changed_names, one_line
from gcnet_jax.tasks.task import Described, OutputPlan


def check_splits(train: Any, evaluation: Any, num_classes: int | None) -> None:
    """Raises ConfigError unless both splits, and the number that is set, have the same labels."""
    if train.label_names != evaluation.label_names:
        raise ConfigError(
            f'config.data: the splits {train.split!r} and {evaluation.split!r} of {train.name} '
            'have different labels; choose splits of one data set'
        )
    if num_classes not in (None, train.num_classes):
        raise ConfigError(
            f'config.model.num_classes is {num_classes}, but data set {train.name} has '
            f'{train.num_classes} labels; leave num_classes unset to take as many'
        )


def check_same_labels(place: str, before: Sequence[str], now: Sequence[str]) -> None:
    """Refuses to continue a run whose data set has other labels, or the same in another order.

    Args:
      place: Where the run is, as errors name it.
      before: The labels it was trained on; none if unknown.
      now: Those of the data set.

    Raises:
      CheckpointError: Names what changed.
    """
    if not before:
        return
    advice = (
        'restore the data set as it was, or choose another --workdir and name this one in '
        'config.training.init_from, which goes by the names of the labels'
    )
    changed = changed_names(before, now)
    if len(now) != len(before):
        raise CheckpointError(
            f'{place} holds a run on {len(before)} labels, and the data set now has '
            f'{len(now)}: {changed}; {advice}'
        )
    if changed:
        raise CheckpointError(
            f'{place} holds a run on other labels: the data set is now {changed}; {advice}'
        )
    for index, (old, new) in enumerate(zip(before, now, strict=True)):
        if new != old:
            raise CheckpointError(
                f'{place} holds a run on other labels, in another order: label {index} was '
                f'{one_line(old, 60)!r}, and the data set now has {one_line(new, 60)!r}; {advice}'
            )


def plan_classifier(
    here: Described, there: Described, new_classifier: bool | None, place: str
) -> OutputPlan:
    """Decides what becomes of a checkpoint's classifier; see `Task.plan_outputs`.

    Raises:
      CheckpointError: It is to be kept and has another size; or the checkpoint has as many classes,
        without names to go by.
    """
    ours, theirs = here.label_names, there.label_names
    classes, stored = here.build().num_classes, there.build().num_classes
    if not stored:
        return OutputPlan((), 'the classifier starts at random: the checkpoint has none')
    if new_classifier:
        return OutputPlan((), 'the classifier starts at random (training.new_classifier=True)')
    if new_classifier is False:
        if stored != classes:
            raise CheckpointError(
                f'{place}: its classifier has {stored} classes, the data set {classes}; leave '
                'config.training.new_classifier unset, or True, to start it at random'
            )
        return OutputPlan(None, f'all {classes} outputs of the classifier are kept in order')
    if not theirs:
        if stored == classes:
            raise CheckpointError(
                f'{place}: its classifier has {stored} classes, as many as the data set, and no '
                'label names to compare; set config.training.new_classifier=True to start it at '
                'random, or False if the classes are the same in the same order'
            )
        return OutputPlan(
            (),
            f"the classifier starts at random: the checkpoint's {stored} classes have no names",
        )
    if ours == theirs:
        return OutputPlan(None, f'the classifier is kept: all {classes} labels are the same')
    return _by_names(ours, theirs)


def _by_names(ours: tuple[str, ...], theirs: tuple[str, ...]) -> OutputPlan:
    """Pairs the labels that have the same name, where the name stands for one class only."""
    repeated = {
        name for names in (ours, theirs) for name, n in collections.Counter(names).items() if n > 1
    }
    places = {name: index for index, name in enumerate(theirs) if name not in repeated}
    kept = tuple((index, places[name]) for index, name in enumerate(ours) if name in places)
    if not kept:
        return OutputPlan(
            (),
            f"the classifier starts at random: none of the checkpoint's {len(theirs)} labels "
            f'({one_line(theirs[0], 40)}, ...) is in the data set ({one_line(ours[0], 40)}, ...)',
        )
    known = {here for here, _ in kept}
    new = [name for index, name in enumerate(ours) if index not in known]
    text = (
        f"{len(kept)} of {len(ours)} outputs of the classifier are the checkpoint's, by their "
        'label names'
    )
    if new:
        names = ', '.join(one_line(name, 40) for name in new[:3]) + (', ...' if new[3:] else '')
        text += f'; {len(new)} start at random: {names}'
    return OutputPlan(kept, text)
