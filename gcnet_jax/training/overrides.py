"""Settings from the command line: `--config.GROUP.KEY=VALUE`.

The group `model` is open: its keys are the options of the network that it names. An option that the
config does not set is looked up in the network's entry, so that
`--config.model.context.ratio=0.125` changes one number of the context that the entry describes.
"""

import ast
import copy
import functools
import operator
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from gcnet_jax.errors import ConfigError, unknown_name
from gcnet_jax.models.options import check_options
from gcnet_jax.models.placement import parse_context
from gcnet_jax.models.registry import model_entry, option_readers
from gcnet_jax.tasks import find_task
from gcnet_jax.training.config import (
    default_config,
    default_config_of,
    explain_unread,
    leaves,
    name_network,
    name_task,
)
from gcnet_jax.training.initial import read_initial_description

# What follows the checkpoint of `training.init_from` where the command line does not set it.
FOLLOWING = (
    'image_size',
    'evaluation_image_size',
    'crop_fraction',
    'interpolation',
    'mean',
    'std',
)


def override(
    config: ConfigDict, overrides: Sequence[str], workdir: Path | None = None
) -> ConfigDict:
    """Applies `--config.GROUP.KEY=VALUE` flags to a config.

    A network that is named here comes without the options that the config set for another one. With
    `training.init_from` the network, its options and its preprocessing are those of the checkpoint
    as far as they are not given here too.

    Args:
      config: As the config file returns it; it may be changed.
      overrides: The flags, with their dashes.
      workdir: Where the run is or will be, see `read_initial_description`.

    Returns:
      The config with the flags applied.

    Raises:
      ConfigError: A setting that does not exist (names the nearest), or a value of another type.
      CheckpointError: An option is of the checkpoint's network, and the checkpoint cannot be read.
    """
    given = [(text, *_split(text)) for text in overrides]
    last = {path: value for _, path, value in given}
    name = last.get('model.name')
    if 'task.name' in last and last['task.name'] != _task_name(config):
        name_task(config, last['task.name'])
    place = last.get('training.init_from')
    # A backbone's checkpoint knows neither the network around it nor the size of its images.
    whole = place and not _fills_backbone(config, place, workdir)
    if place:
        following = FOLLOWING if whole else ('mean', 'std')
        config.data.update({key: None for key in following if key in config.data})
    if name is not None and name != config.model.name:
        name_network(config, name)
    elif name is None and whole:
        name_network(config, None)
    closed = _model_keys()
    options = [
        (path, value)
        for _, path, value in given
        if path.startswith('model.') and path not in closed
    ]
    ordinary = [text for text, path, _ in given if not path.startswith('model.') or path in closed]
    config = _set_ordinary(config, ordinary)
    if options:
        network = _Network(config, workdir)
        # The backbone first: it says what the other options may be.
        for path, value in sorted(options, key=lambda option: option[0] != 'model.backbone'):
            network.set(path, value)
    return config


def _task_name(config: ConfigDict) -> object:
    """Returns the name of a config's task; one of an earlier version has no such group."""
    return config.get('task', {}).get('name', 'classification')


def _fills_backbone(config: ConfigDict, place: str, workdir: Path | None) -> bool:
    """Whether the checkpoint that a run starts from fills no more than its network's backbone."""
    task = find_task(_task_name(config))
    if not task.backbones:
        return False
    return read_initial_description(place, workdir).task in task.backbones


def _model_keys() -> set[str]:
    return {path for path, _ in leaves(default_config().to_dict()) if path.startswith('model.')}


def _split(text: str) -> tuple[str, str | None]:
    """Returns a flag's path and the text of its value, that of a boolean where it has none."""
    name, equals, value = text.lstrip('-').partition('=')
    path = name.removeprefix('no').removeprefix('config.')
    if equals:
        return path, value
    return path, 'False' if name.startswith('no') else 'True'


def _set_ordinary(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """Applies the flags of settings that every config has."""
    known = [path for path, _ in leaves(config.to_dict())]
    for text in overrides:
        path = _split(text)[0]
        if path not in known and not any(name.startswith(path + '.') for name in known):
            names = [f'config.{name}' for name in known]
            raise ConfigError(
                explain_unread(path) or unknown_name('setting', f'config.{path}', names)
            )
    # What may be unset is unset by None, also where a config file has set it to a tuple.
    unset = [path for path, value in map(_split, overrides) if value == 'None']
    defaults = dict(leaves(default_config_of(_task_name(config)).to_dict()))
    for path in unset:
        if path in defaults and defaults[path] is None:
            *groups, key = path.split('.')
            functools.reduce(operator.getitem, groups, config)[key] = None
            overrides = [text for text in overrides if _split(text) != (path, 'None')]
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict(
        'config', config, flag_values=values, sys_argv=['train.py', *overrides]
    )
    try:
        rest = values(['train.py', *overrides])[1:]
    except flags.Error as error:
        raise ConfigError(str(error)) from error
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f'{" ".join(overrides)}: {error}') from error
    if rest:
        raise ConfigError(f'unknown argument {rest[0]!r}')
    return values.config


class _Network:
    """Sets options of the network that a config names."""

    def __init__(self, config: ConfigDict, workdir: Path | None) -> None:
        self._model = config.model
        self._name, stored = config.model.name, {}
        if self._name is None:
            place = config.training.init_from
            if not place:
                raise ConfigError(
                    'config.model.name is not set; give --config.model.name=NAME, or the '
                    'checkpoint of a network as --config.training.init_from=DIR'
                )
            description = read_initial_description(place, workdir)
            self._name, stored = description.name, description.options
        self._row = {**model_entry(self._name).module.keywords, **stored}

    @property
    def _readers(self) -> dict[str, type]:
        """The options that the network takes as it is now, with the modules they configure."""
        return option_readers(self._name, {**self._row, **self._model.to_dict()})

    @property
    def _defaults(self) -> dict[str, Any]:
        """The options where the config sets none; a network over another has that one's too."""
        backbone = self._model.get('backbone', self._row.get('backbone'))
        below = {} if backbone is None else model_entry(backbone).module.keywords
        return {**below, **self._row}

    def set(self, path: str, text: str) -> None:
        """Sets one option, or one entry of its context, by the path on the command line."""
        option, *inner = re.findall(r'[^.\[\]]+', path.removeprefix('model.'))
        readers = self._readers
        if option not in readers:
            raise self._unknown(path)
        value = _read(text)
        if inner:
            if option != 'context':
                raise self._unknown(path)
            value = self._changed_context(path, inner, value)
        try:
            if option == 'context':
                parse_context(value)
            check_options(self._name, readers[option], {option: value})
            if option == 'backbone':
                option_readers(self._name, {option: value})
        except ConfigError as error:
            raise ConfigError(f'config.{path}={text}: {error}') from error
        if option in self._model:
            del self._model[option]  # It may be of another type, such as a tuple.
        self._model[option] = value

    def _unknown(self, path: str) -> ConfigError:
        names = {f'config.{key}' for key in _model_keys()}
        names |= {f'config.model.{option}' for option in self._readers if option != 'norm'}
        names |= {f'config.{name}' for name, _ in leaves({'model': self._context_tree()})}
        return ConfigError(unknown_name('setting', f'config.{path}', names))

    def _context_tree(self) -> dict:
        context = self._context()
        return {} if context is None else {'context': context}

    def _context(self) -> Any:
        """Returns the context as plain containers: the config's, or else the entry's."""
        tree = self._model.to_dict()
        return copy.deepcopy(tree.get('context', self._defaults.get('context')))

    def _changed_context(self, path: str, inner: Sequence[str], value: Any) -> Any:
        context = self._context()
        if not context:
            raise ConfigError(
                f'config.{path}: {self._name} has no context; choose a network that has, such as '
                "gc_resnet50, or give all of it: --config.model.context=\"{'block': "
                "'global_context', 'stages': (2, 3, 4), 'position': 'after_conv2'}\""
            )
        is_one = isinstance(context, Mapping)
        entries = [dict(context)] if is_one else [dict(entry) for entry in context]
        index, keys = 0, list(inner)
        if keys[0].isdigit():
            index = int(keys.pop(0))
        elif not is_one and len(entries) > 1:
            raise self._unknown(path)
        if index >= len(entries) or len(keys) != 1:
            raise self._unknown(path)
        entries[index][keys[0]] = value
        return entries[0] if is_one else tuple(entries)


def _read(text: str) -> Any:
    """Reads a Python literal; anything else is a string."""
    if text.lower() in ('true', 'false'):
        return text.lower() == 'true'
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
