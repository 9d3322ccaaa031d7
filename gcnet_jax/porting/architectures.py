"""What a file says about the network it belongs to, against the network that is built of it.

Several architectures have the same tensors under the same names and compute something else: pooling
before the stride, an average in the shortcut, the stride on another convolution. Their weights load
without a complaint and give logits that are 10% off.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from gcnet_jax.errors import CheckpointError, one_line
from gcnet_jax.models.registry import list_models, model_entry

# Other names of the same computation: published under these by timm.
PREFIXES = ('tv_', 'ssl_', 'swsl_', 'gluon_', 'legacy_')
# A word that is a name of an architecture, and not of a person, a run or a data set.
LOOKS_LIKE_A_NETWORK = re.compile(r'[a-z0-9_]*(res|vgg|mobile|dense|efficient|regnet)[a-z0-9_]*')
# What makes another network of the same tensors in a config of mmdetection or mmsegmentation.
FOREIGN_SETTINGS = {
    r'style\s*=\s*[\'"]caffe[\'"]': "style='caffe' (the stride is on the first convolution)",
    r'avg_down\s*=\s*True': 'avg_down=True (the shortcut averages)',
    r'type\s*=\s*[\'"]ResNetV1d[\'"]': "type='ResNetV1d' (the shortcut averages)",
    r'conv_cfg\s*=\s*dict\(\s*type\s*=\s*[\'"]ConvWS[\'"]': 'ConvWS (standardised weights)',
}


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
        'same tensors, another computation. Give --model if the network has another name here; if '
        'you know that both compute the same, --ignore-architecture takes the weights as they are'
    )


def told_architectures(metadata: Mapping[str, Any]) -> Iterator[str]:
    """Yields every name of an architecture that a training checkpoint holds beside its weights."""
    arguments = metadata.get('args')
    arguments = arguments if isinstance(arguments, Mapping) else {}
    for value in (
        metadata.get('arch'),
        metadata.get('architecture'),
        arguments.get('arch'),
        arguments.get('model'),
    ):
        if isinstance(value, str) and _known_name(value):
            yield value


def check_settings(metadata: Mapping[str, Any], built: str, place: object) -> None:
    """Refuses a file of mmdetection or mmsegmentation whose config is of another network.

    Raises:
      CheckpointError: Names the setting.
    """
    meta = metadata.get('meta')
    text = meta.get('config') if isinstance(meta, Mapping) else None
    for pattern, what in FOREIGN_SETTINGS.items():
        if isinstance(text, str) and re.search(pattern, text):
            raise CheckpointError(
                f'{place} was trained with {what}, and {built} would be built of it: the same '
                'tensors, another computation. --ignore-architecture takes the weights as they are'
            )


def _known_name(told: str) -> str:
    """The name in its plainest form; '' for what is no name of an architecture."""
    name = told.strip().rpartition('/')[2].partition('.')[0].lower()
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    name = re.sub('_v1b$', '', name)
    return name if name in list_models() or LOOKS_LIKE_A_NETWORK.fullmatch(name) else ''


def _without_context(name: str) -> tuple | str:
    """What a network computes beside its context blocks, which may be put into a plain one."""
    if name not in list_models():
        return name
    module = model_entry(name).module
    options = {k: v for k, v in module.keywords.items() if k not in ('context', 'num_classes')}
    # A network that has its context from its library is no plain one with context put in.
    own = module.keywords.get('context') if module.func.__name__ != 'ResNet' else None
    return module.func.__name__, repr(sorted(options.items(), key=str)), repr(own)
