"""Starting from a checkpoint: its network, its preprocessing, its weights, and its classifier.

Which outputs of the classifier take over which of the checkpoint's is up to the task, see
`gcnet_jax.tasks.task.Task.plan_outputs`.
"""

import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from gcnet_jax.data.preprocessing import KeepRatio, Preprocessing
from gcnet_jax.errors import CheckpointError, ConfigError, one_line
from gcnet_jax.files import as_place, explain_bucket
from gcnet_jax.models.registry import create_model, model_entry
from gcnet_jax.stored import ModelDescription, read_model_description
from gcnet_jax.tasks import find_task
from gcnet_jax.training.config import default_config
from gcnet_jax.training.workdir import read_own_config, read_own_description

# An output of a module here and the one there that it takes over.
Pairs = tuple[tuple[int, int], ...]
# Attributes of a network that no parameter's shape depends on, and the size of its classifier.
SHAPELESS = {
    'num_classes',
    'dropout_rate',
    'stochastic_depth_rate',
    'zero_init_residual',
    'output_stride',
    'norm',
    'dtype',
    'parent',
    'name',
}
# Endings of the files that `python -m gcnet_jax port` reads.
TORCH_FILES = ('.safetensors', '.pth', '.pt', '.bin')


def read_initial_description(
    place: str | None, workdir: Path | None = None
) -> ModelDescription | None:
    """Reads which network a run starts from; None where it starts from none.

    A run that began from there has the same network and preprocessing. Where `init_from` can no
    longer be read, they are those of the newest checkpoint in `workdir`.

    Args:
      place: `config.training.init_from`.
      workdir: Where the run is or will be, as `as_place` returns it.

    Raises:
      ConfigError: `init_from` names weights of PyTorch.
      CheckpointError: It cannot be read, and `workdir` holds no run that began from it.
    """
    if place is None:
        return None
    _refuse_torch(place)
    try:
        return read_model_description(place, choose='best')
    except CheckpointError:
        own = None if workdir is None else _description_of_run_from(place, workdir)
        if own is None:
            raise
        return own


def _refuse_torch(place: str) -> None:
    """Refuses names that `gcnet_jax port` takes; a directory may have any name."""
    is_repository = place.startswith('hf-hub:')
    is_file = place.lower().endswith(TORCH_FILES) and not as_place(place, 'init_from').is_dir()
    if is_repository or is_file:
        what = 'a repository of PyTorch weights' if is_repository else 'a PyTorch file'
        raise ConfigError(
            f'config.training.init_from: {one_line(place)} is {what}; port it first: '
            f'python -m gcnet_jax port {shlex.quote(one_line(place))} --out DIR, and give '
            '--config.training.init_from=DIR'
        )


def _description_of_run_from(place: str, workdir: Path) -> ModelDescription | None:
    """Returns the description of the run in a directory, if it began from that checkpoint."""
    with explain_bucket(workdir, CheckpointError, '--workdir'):
        own = read_own_description(workdir)
        config = None if own is None else read_own_config(workdir)
    training = None if config is None else config.get('training')
    began_there = isinstance(training, dict) and training.get('init_from') == place
    return own if began_there else None


def take_network(config: ConfigDict, initial: ModelDescription | None) -> ConfigDict:
    """Fills in the checkpoint's network where the config names none.

    Options that the config sets itself win over the checkpoint's. The size of the classifier is the
    data's and the type of the computation the config's.

    Returns:
      A config whose `model.name` is set; the same one where it was set before.
    """
    if config.model.name is not None or initial is None:
        return config
    if initial.task in find_task(config.task.name).backbones:
        return config
    tree = config.to_dict()
    default = default_config().model.to_dict()
    own = {
        key: value
        for key, value in tree['model'].items()
        if key not in default or value != default[key]
    }
    stored = {
        key: value for key, value in initial.options.items() if key not in ('num_classes', 'dtype')
    }
    tree['model'] = {**default, **stored, **own, 'name': initial.name}
    # A network that was stored with another norm setting may lack some of its keys.
    tree['model']['norm'] = {**default['norm'], **(tree['model']['norm'] or {})}
    return ConfigDict(tree)


def preprocessing(
    config: ConfigDict, initial: ModelDescription | None
) -> Preprocessing | KeepRatio:
    """Returns what the images of a run are like: the config's, the checkpoint's, the network's."""
    base = model_entry(config.model.name).preprocessing
    if initial is not None:
        there = initial.preprocessing
        # A checkpoint that fills the backbone knows what values it takes, not which sizes.
        same = type(there) is type(base)
        base = there if same else dataclasses.replace(base, mean=there.mean, std=there.std)
    given = {name: config.data[name] for name in ('mean', 'std')}
    values = {name: tuple(map(float, value)) for name, value in given.items() if value is not None}
    base = dataclasses.replace(base, **values)
    return find_task(config.task.name).preprocessing(config.data, base)


def merge_initial(
    fresh: Mapping[str, Any],
    loaded: Mapping[str, Any],
    *,
    kept: Pairs | None,
    place: str,
    kept_of: Mapping[str, Pairs] = MappingProxyType({}),
    outputs: tuple[str, ...] = ('classifier',),
    new_modules: tuple[str, ...] = (),
) -> tuple[dict, list[str]]:
    """Fills a network's variables from a checkpoint of the same or of the plain network.

    Args:
      fresh: The network's own {'params', 'batch_stats'}: arrays, or shapes.
      loaded: The checkpoint's.
      kept: Outputs that are taken from the checkpoint, as in `gcnet_jax.tasks.OutputPlan`.
      place: The checkpoint, named in errors.
      kept_of: Other pairs than `kept`, of some of the modules in `outputs`.
      outputs: Paths of the modules, or single parameters, whose last axis is the classes.
      new_modules: Modules that the checkpoint does not have, which stay as they are in `fresh`.

    Returns:
      The variables, and the parameters of context blocks that the checkpoint does not have, which
      stay as they are in `fresh`.

    Raises:
      CheckpointError: Anything else is missing, left over, or of another shape; lists both sides.
    """
    ours, theirs = flatten_dict(dict(fresh), sep='/'), flatten_dict(dict(loaded), sep='/')
    missing, extra = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    common = sorted(ours.keys() & theirs.keys())

    def of_modules(keys, modules):
        # Behind the name of the collection.
        starts = tuple(f'{module}/' for module in modules)
        return [key for key in keys if f'{key.partition("/")[2]}/'.startswith(starts)]

    new = of_modules(missing, new_modules)
    context = [key for key in missing if key not in new and '/context' in key]
    classifier = of_modules(ours, outputs)
    # A checkpoint of pooled features has no classifier.
    absent = new + [key for key in missing if key in classifier and kept == ()]
    lost = sorted(set(missing) - set(context) - set(absent))

    def differs(key):
        left, right = ours[key].shape, theirs[key].shape
        return left[:-1] != right[:-1] if key in classifier and kept is not None else left != right

    wrong = [f'{key} {theirs[key].shape} for {ours[key].shape}' for key in common if differs(key)]
    parts = {'missing': lost, 'not in the network': extra, 'of another shape': wrong}
    found = [f'{len(keys)} {what}, first {keys[0]}' for what, keys in parts.items() if keys]
    if found:
        raise CheckpointError(f'{place} is of another network: {"; ".join(found)}')
    merged = {key: theirs.get(key, value) for key, value in ours.items()}
    if kept is not None:
        own = {key: pairs for name, pairs in kept_of.items() for key in of_modules(ours, (name,))}
        for key in classifier:
            merged[key] = _with_outputs(ours[key], theirs.get(key), own.get(key, kept))
    filled = unflatten_dict(merged, sep='/')
    return {'params': filled['params'], 'batch_stats': filled.get('batch_stats', {})}, context


def _with_outputs(fresh: Any, loaded: Any, kept: Pairs) -> Any:
    """Returns a classifier's leaf, its last axis the classes, with the kept ones filled in."""
    if not kept or isinstance(fresh, jax.ShapeDtypeStruct):
        return fresh
    here, there = map(np.array, zip(*kept, strict=True))
    # By an operation of JAX: the leaf may be spread over several processes.
    return jax.numpy.asarray(fresh).at[..., here].set(np.asarray(loaded)[..., there])


def explain_other_network(
    error: CheckpointError, here: ModelDescription, there: ModelDescription, place: str
) -> ConfigError:
    """Returns the error for a checkpoint whose weights do not fit, naming both networks."""
    detail = str(error).removeprefix(f'{place} is of another network: ')
    if there.task in find_task(here.task).backbones:
        what, advice = _explain_other_backbone(here, there)
    elif here.name != there.name:
        what = f'holds {there.name}, and config.model.name is {here.name}'
        advice = 'leave config.model.name unset to take the network of the checkpoint'
        if not here.name.startswith('gc_'):
            advice += f', or give --config.model.name={there.name}'
    else:
        defaults = model_entry(here.name).module.keywords
        keys = sorted(
            key
            for key in {**here.options, **there.options}
            if key not in ('num_classes', 'dtype', 'norm')
            and _value(here, key, defaults) != _value(there, key, defaults)
        )
        shown = '; '.join(
            f'{key} is {one_line(_value(there, key, defaults), 80)} there and '
            f'{one_line(_value(here, key, defaults), 80)} here'
            for key in keys
        )
        what = f'holds {there.name} with other options ({shown or "unknown"})'
        advice = 'leave config.model.name and its options unset to take those of the checkpoint'
    return ConfigError(
        f'config.training.init_from: {place} {what}, which cannot be filled from '
        f'it ({detail}); {advice}'
    )


def _explain_other_backbone(here: ModelDescription, there: ModelDescription) -> tuple[str, str]:
    """Says how a network's backbone differs from the one a checkpoint holds, and what to set."""
    own = _value(here, 'backbone', model_entry(here.name).module.keywords)
    what = f'holds {there.name}, and the backbone of {here.name} is {own}'
    flags = [] if own == there.name else [f'--config.model.backbone={there.name}']
    theirs = there.build()
    try:
        ours = create_model(here.name, **{**here.options, 'backbone': there.name}).backbone
    except ConfigError:  # Its options are of another kind of network.
        return what, f'give {flags[0]}, without the options of {own}'
    keys = [
        field.name
        for field in dataclasses.fields(theirs)
        if field.name not in SHAPELESS and getattr(theirs, field.name) != getattr(ours, field.name)
    ]
    for key in keys:
        value = there.options.get(key, getattr(theirs, key))
        what += (
            f'; {key} is {one_line(value, 80)} there and {one_line(getattr(ours, key), 80)} here'
        )
        flags.append(f'--config.model.{key}={one_line(value, 80)}')
    return what, f'give {" ".join(flags)}' if flags else 'choose another checkpoint'


def _value(description: ModelDescription, key: str, defaults: Mapping[str, Any]) -> Any:
    return description.options.get(key, defaults.get(key))
