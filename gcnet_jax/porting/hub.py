"""A network in the form of timm and the hub: `model.safetensors` and beside it `config.json`.

`config.json` says what the weights do not: the architecture, how images are prepared
(`pretrained_cfg`; old files have its fields at the top) and the names of the classes.
"""

import dataclasses
import json
import os
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gcnet_jax.data.preprocessing import Preprocessing
from gcnet_jax.errors import CheckpointError, ConfigError, one_line
from gcnet_jax.files import read_json, write_whole

CONFIG_FILE = 'config.json'
HUB_FILES = ('model.safetensors', 'pytorch_model.bin')
# What timm resizes and crops in evaluation; its other modes are for other networks.
CROP_MODE = 'center'
# Arguments of a network that do not change what it computes at inference.
HARMLESS_ARGUMENTS = {
    'num_classes',
    'in_chans',
    'img_size',
    'drop_rate',
    'drop_path_rate',
    'drop_block_rate',
    'zero_init_last',
    'pretrained',
    'exportable',
    'scriptable',
}
# timm's names of the plain average over all positions.
AVERAGES = ('avg', 'fast', 'fastavg')


@dataclasses.dataclass(frozen=True)
class HubConfig:
    """What a `config.json` says.

    Attributes:
      architecture: The name that its library gives to the network; '' if it names none.
      preprocessing: What differs from a network's own, by the name of the field.
      label_names: A name for each class, in the order of the logits; empty if there are none.
    """

    architecture: str = ''
    preprocessing: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    label_names: tuple[str, ...] = ()


def read_hub_config(directory: str | os.PathLike) -> HubConfig | None:
    """Reads the `config.json` of a directory; None where there is none.

    Raises:
      CheckpointError: It is damaged, or asks for something that the networks here do not do.
    """
    path = Path(directory) / CONFIG_FILE
    if not os.path.lexists(path):
        return None
    fields = read_json(path, CheckpointError)
    try:
        if not isinstance(fields, dict):
            raise ConfigError(f'it is {type(fields).__name__}, not an object')
        pretrained = fields.get('pretrained_cfg', fields)
        if not isinstance(pretrained, dict):
            raise ConfigError('pretrained_cfg is no object')
        _check_arguments(fields, pretrained)
        return HubConfig(
            architecture=_text(fields, 'architecture') or _text(pretrained, 'architecture'),
            preprocessing=_preprocessing(pretrained),
            label_names=_label_names(fields, pretrained),
        )
    except ConfigError as error:
        raise CheckpointError(
            f'{one_line(path)}: {error}. To do without this file, give a copy of the weights that '
            'lies elsewhere'
        ) from error


def write_hub_config(
    directory: Path,
    architecture: str,
    preprocessing: Preprocessing,
    label_names: tuple[str, ...],
    num_classes: int,
) -> None:
    """Writes `config.json` as timm does, for `timm.create_model('local-dir:DIR')` and the hub."""
    sizes = {'input_size': [3, *preprocessing.train_shape]}
    crop = {'crop_pct': preprocessing.crop_fraction}
    if preprocessing.test_size != preprocessing.train_size:
        sizes['test_input_size'] = [3, *preprocessing.test_shape]
        crop['test_crop_pct'] = preprocessing.crop_fraction
    config = {
        'architecture': architecture,
        'num_classes': num_classes,
        'pretrained_cfg': {
            **sizes,
            **crop,
            'interpolation': preprocessing.interpolation,
            'crop_mode': CROP_MODE,
            'mean': list(preprocessing.mean),
            'std': list(preprocessing.std),
            'num_classes': num_classes,
        },
    }
    if label_names:
        config['label_names'] = list(label_names)
    with write_whole(directory / CONFIG_FILE, CheckpointError) as partial:
        partial.write_text(json.dumps(config, indent=2) + '\n')


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name) or ''
    if not isinstance(value, str):
        raise ConfigError(f'{name} is {one_line(repr(value), 80)}, not a name')
    return value


def _check_arguments(fields: Mapping[str, Any], pretrained: Mapping[str, Any]) -> None:
    """Refuses what makes another network of the same weights."""
    arguments = fields.get('model_args') or {}
    if not isinstance(arguments, dict):
        raise ConfigError('model_args is no object')
    pooling = [fields.get('global_pool'), arguments.get('global_pool')]
    others = sorted(
        name
        for name, value in arguments.items()
        if name not in HARMLESS_ARGUMENTS | {'global_pool'} and value is not None
    )
    if others:
        raise ConfigError(
            f'model_args has {one_line(", ".join(others))}: another network than the one of that '
            'name here'
        )
    other = [value for value in pooling if value and value not in AVERAGES]
    if other:
        raise ConfigError(f'global_pool is {one_line(repr(other[0]), 40)}; networks here average')
    if pretrained.get('label_offset'):
        raise ConfigError(
            f'label_offset is {one_line(repr(pretrained["label_offset"]), 40)}: the first logits '
            'are of no class, which networks here do not leave out'
        )
    mode = pretrained.get('crop_mode') or CROP_MODE
    if mode != CROP_MODE:
        raise ConfigError(
            f'crop_mode is {one_line(repr(mode), 40)}; only {CROP_MODE!r} is known: images would '
            'be prepared in another way than the weights expect'
        )


def _preprocessing(pretrained: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of Preprocessing that the file has, checked as those of any checkpoint are.

    `input_size` is the training size. Evaluation uses `test_input_size` and `test_crop_pct`, each
    where the file has it, and `input_size` and `crop_pct` otherwise: what timm evaluates with under
    `use_test_size=True`, and what this package's own rows for timm's networks do.
    """
    found: dict[str, Any] = {}
    for name in ('mean', 'std'):
        if pretrained.get(name) is not None:
            value = pretrained[name]
            found[name] = tuple(value) if isinstance(value, list) else value
    if pretrained.get('interpolation') is not None:
        found['interpolation'] = pretrained['interpolation']
    for name in ('crop_pct', 'test_crop_pct'):
        if pretrained.get(name) is not None:
            found['crop_fraction'] = pretrained[name]
            Preprocessing(crop_fraction=pretrained[name])
    if pretrained.get('input_size') is not None:
        found['train_size'] = found['test_size'] = _size(pretrained, 'input_size')
    if pretrained.get('test_input_size') is not None:
        found['test_size'] = _size(pretrained, 'test_input_size')
    Preprocessing(**found)
    return found


def _size(pretrained: Mapping[str, Any], name: str) -> tuple[Any, Any]:
    """The height and width in `[channels, height, width]`."""
    size = pretrained[name]
    if not isinstance(size, list) or len(size) != 3 or size[0] != 3:
        raise ConfigError(
            f'{name} is {one_line(repr(size), 80)}; networks here take [3, height, width]: three '
            'channels'
        )
    return size[1], size[2]


def _label_names(fields: Mapping[str, Any], pretrained: Mapping[str, Any]) -> tuple[str, ...]:
    """A name for each class: its description where there is one, else its name.

    The names are a list, or an object with the numbers of the classes as keys. Two classes may have
    the same name, as the two called 'crane' in ImageNet.
    """
    names = fields.get('label_names') or pretrained.get('label_names') or fields.get('labels') or ()
    described = fields.get('label_descriptions') or pretrained.get('label_descriptions') or {}
    if isinstance(names, dict):
        try:
            numbers = sorted((int(key), key) for key in names)
        except ValueError:
            raise ConfigError('label_names has keys that are no numbers of classes') from None
        if [number for number, _ in numbers] != list(range(len(numbers))):
            raise ConfigError('label_names leaves out some classes; a name for each is needed')
        names = [names[key] for _, key in numbers]
    is_right = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    if not is_right or not isinstance(described, dict):
        raise ConfigError('label_names must be a list of names, label_descriptions an object')
    shown = tuple(described.get(name, name) for name in names)
    if not all(isinstance(name, str) for name in shown):
        raise ConfigError('label_descriptions must hold texts')
    for number, name in enumerate(shown):
        check_label(name, f'label {number}')
    return shown


def check_label(name: str, what: str) -> None:
    """Refuses a class name that is blank or that cannot be written on one line of text.

    Args:
      name: The name.
      what: Where it stands, for the error.

    Raises:
      ConfigError: Says why.
    """
    if not name.strip():
        raise ConfigError(f'{what} is blank; write a name for each class')
    if any(unicodedata.category(letter) in ('Cc', 'Cs', 'Zl', 'Zp') for letter in name):
        raise ConfigError(
            f'{what}, {one_line(name, 80)}, contains a line break or another control character; '
            'write each name on one line'
        )
