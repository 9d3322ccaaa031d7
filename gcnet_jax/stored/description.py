"""What rebuilds a stored network and reads its answers, as JSON beside its variables."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from gcnet_jax.data.preprocessing import IMAGENET, KeepRatio, Preprocessing
from gcnet_jax.errors import CheckpointError, ConfigError, one_line
from gcnet_jax.models.registry import create_model
from gcnet_jax.tasks import TASKS

# Version 2 has a task, and sizes that are not square.
FORMAT_VERSION = 2
READ_VERSIONS = (1, 2)
# What descriptions of earlier versions lack, which then has its default.
ADDED = {1: {'task'}}
# What the preprocessing of a task's networks is; of all others it is `Preprocessing`.
PREPROCESSING = {'detection': KeepRatio, 'segmentation': KeepRatio}
# Longest label and longest note on the source.
MAX_TEXT = 10_000


@dataclasses.dataclass(frozen=True)
class ModelDescription:
    """What rebuilds a network and reads its answers.

    Attributes:
      name: Its name in the registry.
      options: The options that `create_model` got, plain values only.
      label_names: A name a class, in the order of the logits; empty if unknown.
      preprocessing: What it expects of its images.
      source: Where the variables come from, in words: 'trained on cifar10', a ported file.
      task: The name of what it was trained for, such as 'classification'.
    """

    name: str
    options: Mapping[str, Any]
    label_names: tuple[str, ...] = ()
    preprocessing: Preprocessing | KeepRatio = IMAGENET
    source: str = ''
    task: str = 'classification'

    def __post_init__(self):
        wrong = [
            field
            for field, is_right in {
                'name': isinstance(self.name, str),
                'options': isinstance(self.options, Mapping)
                and all(isinstance(option, str) for option in self.options),
                'label_names': isinstance(self.label_names, tuple)
                and all(isinstance(n, str) and len(n) <= MAX_TEXT for n in self.label_names),
                'preprocessing': isinstance(self.preprocessing, _preprocessing_of(self.task)),
                'source': isinstance(self.source, str) and len(self.source) <= MAX_TEXT,
                'task': isinstance(self.task, str) and self.task in TASKS,
            }.items()
            if not is_right
        ]
        if wrong:
            value = one_line(repr(getattr(self, wrong[0])), 80)
            raise ConfigError(f'{wrong[0]} of a model description cannot be {value}')

    def build(self) -> nn.Module:
        """Builds the network."""
        return create_model(self.name, **self.options)

    def to_json(self) -> dict:
        """Returns the description as JSON reads it back."""
        fields = {'format_version': FORMAT_VERSION, **dataclasses.asdict(self)}
        return json.loads(json.dumps(fields))

    @classmethod
    def from_json(cls, fields: Mapping[str, Any], place: object) -> 'ModelDescription':
        """Reads what `to_json` gave, in this version and earlier ones; `place` is named in errors.

        Raises:
          CheckpointError: The format is newer than this package, or something is missing.
        """
        if not isinstance(fields, Mapping):
            raise CheckpointError(f'{place}: the model description is {type(fields).__name__}')
        fields = dict(fields)
        version = fields.pop('format_version', None)
        if version not in READ_VERSIONS:
            read = ' and '.join(map(str, READ_VERSIONS))
            raise CheckpointError(
                f'{place}: format version {one_line(version, 40)}; this package reads {read}: use '
                'the version of gcnet_jax that wrote it'
            )
        expected = {field.name for field in dataclasses.fields(cls)} - ADDED.get(version, set())
        if fields.keys() != expected:
            different = ', '.join(sorted(map(one_line, fields.keys() ^ expected)))
            raise CheckpointError(
                f'{place}: damaged or incomplete model description: missing or unknown {different}'
            )
        task = fields.get('task')
        if isinstance(task, str) and task not in TASKS:
            raise CheckpointError(
                f'{place}: its task is {one_line(task, 40)}; this package knows '
                f'{", ".join(TASKS)}: use the version of gcnet_jax that wrote it'
            )
        try:
            preprocessing = {k: _tuple(v) for k, v in dict(fields['preprocessing']).items()}
            fields['preprocessing'] = _preprocessing_of(task)(**preprocessing)
            fields['label_names'] = _tuple(fields['label_names'])
            description = cls(**fields)
            description.build()  # Checks the name and every option.
        except (ConfigError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f'{place}: damaged model description: {one_line(error)}'
            ) from error
        return description


def _preprocessing_of(task: Any) -> type[Preprocessing] | type[KeepRatio]:
    return PREPROCESSING.get(task if isinstance(task, str) else '', Preprocessing)


def _tuple(value: Any) -> Any:
    """JSON has lists only."""
    return tuple(value) if isinstance(value, list) else value
