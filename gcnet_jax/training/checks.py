"""Checks of a config that need neither network nor data nor devices."""

from collections.abc import Mapping

from ml_collections import ConfigDict

from gcnet_jax.errors import ConfigError, unknown_name
from gcnet_jax.ranges import whole
from gcnet_jax.tasks import find_task
from gcnet_jax.training.config import (
    default_config,
    default_config_of,
    explain_unread,
    leaves,
)
from gcnet_jax.training.optimizers import optimizer_options
from gcnet_jax.training.rules import RULES


def check_config(config: ConfigDict) -> None:
    """Refuses unknown keys, values out of range, and settings that contradict each other.

    What depends on the network, the data set or the devices is checked where those are built, also
    before anything is compiled: see `gcnet_jax.training.experiment.build`.

    Raises:
      ConfigError: Names the setting, its value, what is allowed and what to do.
    """
    given = config.to_dict()
    task = given.get('task')
    named = isinstance(task, Mapping) and 'name' in task
    known = (default_config_of(task['name']) if named else default_config()).to_dict()
    _check_keys(given, known)
    task = find_task(given['task']['name'])
    ranges = RULES | {'model.num_classes': whole(task.fewest_classes)}
    ranges |= {f'task.{name}': allowed for name, allowed in task.ranges.items()}
    ranges |= {f'data.{name}': allowed for name, allowed in task.data_ranges.items()}
    defaults = dict(leaves(known))
    for key, value in leaves(given):
        if value is None and key in defaults and defaults[key] is None:
            continue
        if key in ranges and not ranges[key].allows(value):
            raise ConfigError(f'config.{key} is {value!r}; it must be {ranges[key].text}')
    options = {
        key: value
        for key, value in given['optimizer'].items()
        if key not in ('name', 'weight_decay', 'clip_norm', 'frozen', 'layer_decay')
    }
    optimizer_options(given['optimizer']['name'], options)
    conflict = task.conflict_in(given['data'])
    if conflict is not None:
        raise ConfigError(conflict)
    _check_together(given)


def _check_keys(given: Mapping, known: Mapping) -> None:
    for group in given:
        if group not in known:
            raise ConfigError(unknown_name('setting', f'config.{group}', _paths(known)))
    for group, settings in known.items():
        values = given.get(group)
        if not isinstance(values, Mapping):
            raise ConfigError(f'config.{group} must be a group with {", ".join(settings)}')
        extra = [] if group == 'model' else sorted(values.keys() - settings.keys())
        if extra:
            path = f'{group}.{extra[0]}'
            raise ConfigError(
                explain_unread(path) or unknown_name('setting', f'config.{path}', _paths(known))
            )
        missing = sorted(settings.keys() - values.keys())
        if missing:
            raise ConfigError(
                f'config.{group}.{missing[0]} is missing; start the config from '
                'gcnet_jax.training.config.default_config()'
            )


def _paths(tree: Mapping) -> list[str]:
    return [f'config.{path}' for path, _ in leaves(tree)]


def _check_together(given: Mapping) -> None:
    """Refuses settings that would have no effect beside the others."""
    training, runtime, schedule = given['training'], given['runtime'], given['schedule']
    if schedule['decay_epochs'] is None and schedule['decay_factor'] is not None:
        raise ConfigError(
            f'config.schedule.decay_factor is {schedule["decay_factor"]} but '
            'config.schedule.decay_epochs is not set; set it to the epochs after which the rate '
            'drops, such as (8, 11)'
        )
    if schedule['decay_epochs'] is not None and schedule['end_factor']:
        raise ConfigError(
            f'config.schedule.end_factor is {schedule["end_factor"]} but '
            'config.schedule.decay_epochs is set: the rate drops by decay_factor and ends where '
            'that leaves it; set end_factor to 0, or leave decay_epochs unset'
        )
    if schedule['decay_epochs'] is not None and schedule['poly_power'] is not None:
        raise ConfigError(
            f'config.schedule.poly_power is {schedule["poly_power"]} and '
            f'config.schedule.decay_epochs {schedule["decay_epochs"]}: the rate falls by one of '
            'them; leave the other unset'
        )
    if training['new_classifier'] is not None and training['init_from'] is None:
        raise ConfigError(
            f'config.training.new_classifier is {training["new_classifier"]} but '
            'config.training.init_from is not set; name the checkpoint to start from, or leave '
            'new_classifier unset'
        )
    if given['model']['name'] is None and training['init_from'] is None:
        raise ConfigError(
            'config.model.name is not set, and neither is config.training.init_from; name the '
            'checkpoint to start from (--config.training.init_from=DIR), or a network'
        )
    if training['batch_size'] % training['accumulation_steps']:
        raise ConfigError(
            f'config.training.batch_size is {training["batch_size"]}, which '
            f'config.training.accumulation_steps={training["accumulation_steps"]} does not divide; '
            'change one of them'
        )
    processes = {
        key: runtime[key] for key in ('coordinator_address', 'num_processes', 'process_id')
    }
    for key, value in processes.items():
        if value is not None and not runtime['distributed']:
            raise ConfigError(
                f'config.runtime.{key} is {value!r} but config.runtime.distributed is False; '
                'set it to True, or leave the other unset'
            )
    count, index = runtime['num_processes'], runtime['process_id']
    if count is not None and index is not None and index >= count:
        raise ConfigError(
            f'config.runtime.process_id is {index}; with config.runtime.num_processes={count} it '
            f'is 0 to {count - 1}'
        )
