"""What a file says about the network it belongs to, against the network that is built of it.

Several architectures have the same tensors under the same names and compute something else: pooling
before the stride, an average in the shortcut, the stride on another convolution. Their weights load
without a complaint and give logits that are 10% off.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn

from gcnet_jax.errors import CheckpointError, one_line
from gcnet_jax.models.registry import create_model, list_models, model_entry
from gcnet_jax.porting import published, published_segmenters
from gcnet_jax.porting.files import TorchFile
from gcnet_jax.porting.hub import HARMLESS_ARGUMENTS, HUB_FILES, read_hub_config

# Other names of the same computation: published under these by timm.
PREFIXES = ('tv_', 'ssl_', 'swsl_', 'gluon_', 'legacy_')
# A word that is a name of an architecture, and not of a person, a run or a data set.
LOOKS_LIKE_A_NETWORK = re.compile(r'[a-z0-9_]*(res|vgg|mobile|dense|efficient|regnet)[a-z0-9_]*')
# 'ResNet-50' and the like, as people write them.
HYPHENATED = re.compile(r'(se-?|eca-?)?res(net|next)-?\d+-?[a-z]{0,2}')
# What makes another network of the same tensors in a config of mmdetection or mmsegmentation, which
# is Python (`style='caffe'`) or JSON (`"style": "caffe"`).
FOREIGN_SETTINGS = {
    'style': (r'caffe', 'the stride is on the first convolution'),
    'avg_down': (r'true', 'the shortcut averages'),
    'type': (r'(ResNetV1d|ConvWS|SEResNet|SEResNeXt|ResNeSt|Res2Net)', 'another backbone'),
    'dilations': (r'[(\[][\s\d,]*[2-9][\s\d,]*[)\]]', 'dilated convolutions'),
}
# Where training programs keep the name of the architecture, and within which group of settings.
GROUPS = ('args', 'hyper_parameters', 'hparams', 'config')
NAMES = ('arch', 'architecture', 'model', 'model_name', 'backbone')


def build_and_compare(
    file: TorchFile,
    name: str,
    options: Mapping[str, Any],
    asked: Collection[str],
    *,
    choose: bool,
    check: bool,
) -> tuple[nn.Module, str, dict[str, Any], tuple[str, ...]]:
    """Builds a network and compares it with all that a file says of its own beside its tensors.

    Args:
      file: The file.
      name, options: The network that is built of it.
      asked: Options that whoever loads the file gave.
      choose: Whether the file may choose among networks of the same tensors.
      check: Whether contradictions are refused.

    Returns:
      The network, its name and options, chosen if need be, and notes for the user.

    Raises:
      CheckpointError: They contradict each other; says both.
      ConfigError: An unknown option, or a value out of range.
    """
    task, notes, options = model_entry(name).task, (), dict(options)
    sources = published_segmenters.sources_of(file) if task == 'segmentation' else {}
    if choose and task == 'detection':
        name, options = published.choose_norm(file, name, options)
    elif choose and task == 'segmentation':
        name, options, notes = published_segmenters.choose_row(sources, name, options)
    network = create_model(name, **options)
    if check:
        if task == 'detection':
            published.check_told(file, name, options)
        elif task == 'segmentation':
            published_segmenters.check_told(file.path, sources, name, options, asked)
        settings = dict(model_entry(name).module.keywords) | options
        is_dilated = settings.get('output_stride') is not None
        check_settings(file.metadata, name, one_line(file.path), is_dilated=is_dilated)
        for told in (*told_architectures(file.metadata), _told_beside(file.path)):
            check_architecture(told, name, one_line(file.path))
    return network, name, options, notes


def _told_beside(path: Path) -> str:
    """The architecture in the `config.json` beside a file of the hub's own name, if any."""
    config = read_hub_config(path.parent) if path.name in HUB_FILES else None
    return config.architecture if config else ''


def check_architecture(told: str, built: str, place: object) -> None:
    """Refuses a file that names another network than the one that is built of it.

    Args:
      told: The architecture that the file names; '' is no name.
      built: The name of the network here.
      place: The file, named in errors.

    Raises:
      CheckpointError: The two compute different things, or nobody here knows whether they do.
    """
    name = _known_name(told)
    if not name or _without_context(name) == _without_context(built):
        return
    raise CheckpointError(
        f'{place} says that it is a {one_line(told, 80)}, and {built} would be built of it: the '
        'same tensors, another computation. Name the network that it is with --model if it is '
        'among those here; --ignore-architecture takes the weights as they are'
    )


def told_architectures(metadata: Mapping[str, Any]) -> Iterator[str]:
    """Yields every name of an architecture that a training checkpoint holds beside its weights."""
    for group in (metadata, *map(metadata.get, GROUPS)):
        for name in NAMES if isinstance(group, Mapping) else ():
            value = group.get(name)
            if isinstance(value, str) and _known_name(value):
                yield value


def check_settings(
    metadata: Mapping[str, Any], built: str, place: object, *, is_dilated: bool = False
) -> None:
    """Refuses a file whose training config is of another network.

    That is a config of mmdetection or mmsegmentation, or the arguments of timm's training script.
    `is_dilated` is whether the network has dilated convolutions, too.

    Raises:
      CheckpointError: Names the setting.
    """
    arguments = metadata.get('args')
    arguments = arguments if isinstance(arguments, Mapping) else {}
    others = arguments.get('model_kwargs')
    others = set(others) - HARMLESS_ARGUMENTS if isinstance(others, Mapping) else ()
    if others:
        raise CheckpointError(
            f'{place} was trained with model_kwargs of {one_line(", ".join(map(str, others)), 80)},'
            f' and {built} would be built of it: the same tensors, maybe another computation. '
            '--ignore-architecture takes the weights as they are'
        )
    meta = metadata.get('meta')
    meta = meta if isinstance(meta, Mapping) else {}
    # mmcv writes 'config', mmengine 'cfg': the text of the file, or its settings.
    for config in (meta.get('config'), meta.get('cfg')):
        text = config if isinstance(config, str) else repr(config)
        for setting, (value, what) in FOREIGN_SETTINGS.items():
            if setting == 'dilations' and is_dilated:
                continue
            pattern = rf'\b{setting}[\'"]?\s*[=:]\s*([\'"]?{value}[\'"]?)(?![\w])'
            found = re.search(pattern, text, re.IGNORECASE)
            if found:
                raise CheckpointError(
                    f'{place} was trained with {setting}={one_line(found[1], 40)} ({what}), and '
                    f'{built} would be built of it: the same tensors, another computation. '
                    '--ignore-architecture takes the weights as they are'
                )


def _known_name(told: str) -> str:
    """The name in its plainest form; '' for what is no name of an architecture."""
    name = told.strip().rpartition('/')[2].partition('.')[0].lower().removesuffix('_weights')
    if HYPHENATED.fullmatch(name):
        name = name.replace('-', '')
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    name = re.sub('_v1b$', '', name)
    # Others do not say in the name which shortcuts it has; some depths are here with one kind only.
    if name not in list_models() and f'{name}_a' in list_models():
        name = f'{name}_a'
    return name if name in list_models() or LOOKS_LIKE_A_NETWORK.fullmatch(name) else ''


def _without_context(name: str) -> tuple | str:
    """What a network computes beside its context blocks, which may be put into a plain one.

    Shortcuts are left out too: the tensors of a file tell which they are, and 'resnet20' is what
    other libraries call it with either.
    """
    if name not in list_models():
        return name
    module = model_entry(name).module
    left_out = ('context', 'num_classes', 'shortcut')
    options = {k: v for k, v in module.keywords.items() if k not in left_out}
    # A network that has its context from its library is no plain one with context put in.
    own = module.keywords.get('context') if module.func.__name__ != 'ResNet' else None
    return module.func.__name__, repr(sorted(options.items(), key=str)), repr(own)
