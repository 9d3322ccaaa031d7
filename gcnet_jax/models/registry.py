"""Every network by name: how to build it, what its input looks like, where it comes from."""

import fnmatch
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from gcnet_jax.errors import ConfigError, unknown_name
from gcnet_jax.models.classifiers import CLASSIFIERS
from gcnet_jax.models.detectors import DETECTORS
from gcnet_jax.models.efficientnet import EfficientStage
from gcnet_jax.models.entry import ModelEntry
from gcnet_jax.models.layers import parse_norm
from gcnet_jax.models.options import check_options, module_options
from gcnet_jax.models.placement import parse_context
from gcnet_jax.models.resnet import BasicBlock
from gcnet_jax.models.segmenters import SEGMENTERS

DTYPES = ('float32', 'bfloat16', 'float16')
_MODELS = {entry.name: entry for entry in (*CLASSIFIERS, *DETECTORS, *SEGMENTERS)}


def list_models(pattern: str = '*', task: str | None = None) -> list[str]:
    """Returns the names of the networks that match a glob pattern, such as 'gc_*'.

    Args:
      pattern: Of the names.
      task: 'classification', 'detection' or 'segmentation'; None for all.
    """
    names = fnmatch.filter(_MODELS, pattern)
    return sorted(name for name in names if task in (None, _MODELS[name].task))


def model_entry(name: str) -> ModelEntry:
    """Returns a network's row: how it is built, its preprocessing, its description.

    Raises:
      ConfigError: No network has that name; names the nearest.
    """
    if name not in _MODELS:
        raise ConfigError(unknown_name('model', name, _MODELS))
    return _MODELS[name]


def option_readers(name: str, options: Mapping[str, Any]) -> dict[str, type[nn.Module]]:
    """Returns every option that a network takes, with the module class that it configures.

    Args:
      name: One of `list_models()`.
      options: Those that differ from the row's; of a network over a backbone, they name it.

    Raises:
      ConfigError: No network, or no backbone, has that name.
    """
    entry = model_entry(name)
    own = entry.module.func
    readers = dict.fromkeys(module_options(own), own)
    backbone = (dict(entry.module.keywords) | dict(options)).get('backbone')
    if backbone is not None:
        module = _backbone_entry(name, backbone).module.func
        readers = dict.fromkeys(_backbone_options(module), module) | readers
    return readers


def create_model(name: str, **overrides: Any) -> nn.Module:
    """Builds a network by name.

    Args:
      name: One of `list_models()`.
      **overrides: Attributes of its module that differ from the row's, such as `num_classes`,
        `dtype` (also as a string: 'bfloat16'), `dropout_rate`, `context` (see `parse_context`;
        None for the plain network), or `norm` (see `parse_norm`). The `backbone` of a detector or a
        segmenter is the name of a classifier here, and whatever the detector does not know itself,
        such as `context`, is an option of the backbone. `norm` and `dtype` are both's.

    Raises:
      ConfigError: An unknown name or option (names the nearest), or a value out of range.
    """
    entry = model_entry(name)
    options = dict(entry.module.keywords) | overrides
    if 'backbone' in options:
        options, overrides = _with_backbone(entry, options, overrides)
    check_options(name, entry.module.func, overrides)
    _check_together(name, options, overrides)
    if 'context' in options:
        options['context'] = parse_context(options['context'])
    if 'norm' in options:
        options['norm'] = parse_norm(options['norm'])
    try:
        options |= {'dtype': jnp.dtype(options['dtype'])} if 'dtype' in options else {}
    except TypeError:
        raise ConfigError(
            f'{name}: dtype must be one of {DTYPES}, got {options["dtype"]!r:.80}'
        ) from None
    return entry.module.func(**options)


def _with_backbone(
    entry: ModelEntry, options: Mapping[str, Any], overrides: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Builds a detector's or segmenter's backbone from what is not its own.

    Returns:
      The options, and those that differ from the row's, with the backbone built.
    """
    name, own = options['backbone'], module_options(entry.module.func)
    known = _backbone_options(_backbone_entry(entry.name, name).module.func)
    of_backbone = {key: value for key, value in options.items() if key not in own}
    for option in sorted(of_backbone.keys() - known):
        raise ConfigError(
            unknown_name(f'option of {entry.name} over {name}', option, {*own, *known})
        )
    of_backbone |= {key: options[key] for key in ('dtype', 'norm') if key in options}
    backbone = create_model(name, num_classes=0, **of_backbone)
    kept = [
        {key: value for key, value in given.items() if key in own and key != 'backbone'}
        for given in (options, overrides)
    ]
    return kept[0] | {'backbone': backbone}, kept[1]


def _backbone_entry(network: str, name: Any) -> ModelEntry:
    names = list_models(task='classification')
    if not isinstance(name, str) or name not in names:
        raise ConfigError(unknown_name(f'backbone of {network}', name, names))
    return model_entry(name)


def _backbone_options(module: type[nn.Module]) -> set[str]:
    # A backbone has no classifier, which alone reads a dropout rate.
    return module_options(module).keys() - {'dropout_rate'}


def _check_together(name: str, options: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
    """Refuses options that contradict each other, and those that this network does not read."""
    dtype = options.get('dtype')
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise ConfigError(unknown_name('dtype', dtype, DTYPES))
    if options.get('block') is BasicBlock:
        for option, plain in (('groups', 1), ('base_width', 64)):
            if overrides.get(option, plain) != plain:
                raise ConfigError(
                    f'{name}: {option} is {overrides[option]}, but its blocks have two ordinary '
                    'convolutions, which do not read it; choose a network of bottlenecks, such as '
                    'resnet50 or resnext50_32x4d'
                )
    sizes, widths = options.get('stage_sizes'), options.get('widths')
    if sizes is not None and widths is not None and len(widths) < len(sizes):
        raise ConfigError(
            f'{name}: stage_sizes has {len(sizes)} stages and widths {len(widths)}; '
            'give a width for each stage'
        )
    stages = overrides.get('stages', ())
    if not isinstance(stages, (list, tuple)) or not all(
        isinstance(stage, EfficientStage) for stage in stages
    ):
        raise ConfigError(f'{name}: stages must be a list of EfficientStage, got {stages!r:.80}')
    if not isinstance(options.get('block', BasicBlock), type):
        raise ConfigError(f'{name}: block must be a module class, got {options["block"]!r:.80}')
