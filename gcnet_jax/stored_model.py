"""A network on disk: its variables, and beside them all that is needed to build it again.

A checkpoint of a training run and a ported directory are the same thing here:
`DIR/checkpoints/STEP/` with the Orbax items `variables` (what evaluation uses: {'params',
'batch_stats'}), `description` and `checksums` (JSON). Training adds items of its own. Porting,
inference and training meet in this module and import nothing of each other.
"""

import asyncio
import contextlib
import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import linen as nn

from gcnet_jax.checksums import check_checksums, check_json, checksums, json_checksum
from gcnet_jax.errors import CheckpointError, ConfigError, one_line
from gcnet_jax.files import as_place, explain_bucket, is_bucket, read_json
from gcnet_jax.models.registry import IMAGENET, Preprocessing, create_model
from gcnet_jax.stored_checks import check_files, check_size, check_weights

FORMAT_VERSION = 1
CHECKPOINTS = 'checkpoints'
METRICS = 'metrics'
# Longest label and longest note on the source.
MAX_TEXT = 10_000
# In a bucket: the file that Orbax writes into a checkpoint when all else is there.
COMMITTED = 'commit_success.txt'


@dataclasses.dataclass(frozen=True)
class ModelDescription:
    """What rebuilds a network and reads its answers.

    Attributes:
      name: Its name in the registry.
      options: The options that `create_model` got, plain values only.
      label_names: A name a class, in the order of the logits; empty if unknown.
      preprocessing: What it expects of its images.
      source: Where the variables come from, in words: 'trained on cifar10', a ported file.
    """

    name: str
    options: Mapping[str, Any]
    label_names: tuple[str, ...] = ()
    preprocessing: Preprocessing = IMAGENET
    source: str = ''

    def __post_init__(self):
        wrong = [
            field
            for field, is_right in {
                'name': isinstance(self.name, str),
                'options': isinstance(self.options, Mapping)
                and all(isinstance(option, str) for option in self.options),
                'label_names': isinstance(self.label_names, tuple)
                and all(isinstance(n, str) and len(n) <= MAX_TEXT for n in self.label_names),
                'preprocessing': isinstance(self.preprocessing, Preprocessing),
                'source': isinstance(self.source, str) and len(self.source) <= MAX_TEXT,
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
        """Reads what `to_json` gave; `place` is named in errors.

        Raises:
          CheckpointError: The format is newer than this package, or something is missing.
        """
        if not isinstance(fields, Mapping):
            raise CheckpointError(f'{place}: the model description is {type(fields).__name__}')
        fields = dict(fields)
        version = fields.pop('format_version', None)
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f'{place}: format version {one_line(version, 40)}; this package reads '
                f'{FORMAT_VERSION}: use the version of gcnet_jax that wrote it'
            )
        expected = {field.name for field in dataclasses.fields(cls)}
        if fields.keys() != expected:
            different = ', '.join(sorted(map(one_line, fields.keys() ^ expected)))
            raise CheckpointError(
                f'{place}: damaged or incomplete model description: missing or unknown {different}'
            )
        try:
            preprocessing = {k: _tuple(v) for k, v in dict(fields['preprocessing']).items()}
            fields['preprocessing'] = Preprocessing(**preprocessing)
            fields['label_names'] = _tuple(fields['label_names'])
            description = cls(**fields)
            description.build()  # Checks the name and every option.
        except (ConfigError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f'{place}: damaged model description: {one_line(error)}'
            ) from error
        return description


def _tuple(value: Any) -> Any:
    """JSON has lists only."""
    return tuple(value) if isinstance(value, list) else value


def step_directories(directory: str | os.PathLike) -> dict[int, Path]:
    """Returns the checkpoints under a workdir or its `checkpoints` by step, oldest first."""
    root = as_place(directory, 'checkpoint')
    root = root / CHECKPOINTS if (root / CHECKPOINTS).is_dir() else root
    if not root.is_dir():
        return {}
    steps = (path for path in root.iterdir() if re.fullmatch('[0-9]{1,18}', path.name))
    found = {int(path.name): path for path in steps}
    if is_bucket(root):
        # Nothing can be renamed there: Orbax marks what it has written completely.
        found = {step: path for step, path in found.items() if (path / COMMITTED).exists()}
    return dict(sorted(found.items()))


def find_checkpoint(directory: str | os.PathLike, choose: str = 'newest') -> Path:
    """Returns the directory of one checkpoint.

    Args:
      directory: A workdir, its `checkpoints`, a single checkpoint, or a ported directory.
      choose: 'newest', or 'best': of the highest accuracy where any was evaluated, else the newest.

    Raises:
      CheckpointError: There is no checkpoint.
    """
    path = as_place(directory, 'checkpoint')
    with explain_bucket(path, CheckpointError):
        if (path / 'variables').is_dir():
            return path
        found = step_directories(path)
    if not found:
        missing = 'no such directory' if not path.is_dir() else 'no checkpoint in it'
        raise CheckpointError(
            f'{directory}: {missing}; name a workdir of train.py, one of its checkpoints, '
            'or a ported directory'
        )
    if choose == 'best':
        return max(found.items(), key=lambda item: (_accuracy(item[1]), item[0]))[1]
    return found[max(found)]


def _accuracy(checkpoint: Path) -> float:
    try:
        metrics = read_item(checkpoint, METRICS)
    except CheckpointError:
        return -1.0
    accuracy = metrics.get('eval/accuracy')
    is_number = isinstance(accuracy, (int, float)) and math.isfinite(accuracy)
    return float(accuracy) if is_number else -1.0


def read_item(checkpoint: Path, name: str) -> dict[str, Any]:
    """Reads a JSON item of one checkpoint.

    Raises:
      CheckpointError: It is missing or damaged, or no JSON object.
    """
    # The manager itself writes the metrics, under another name than that of other items.
    value = read_json(
        checkpoint / name / (METRICS if name == METRICS else 'metadata'), CheckpointError
    )
    if not isinstance(value, dict):
        raise CheckpointError(f'{checkpoint}: damaged: {name} is {type(value).__name__}')
    return value


def read_model_description(
    directory: str | os.PathLike, choose: str = 'newest'
) -> ModelDescription:
    """Reads which network a checkpoint holds; see `find_checkpoint` for the arguments."""
    return _read_description(find_checkpoint(directory, choose))


def _read_description(checkpoint: Path) -> ModelDescription:
    fields, sums = read_item(checkpoint, 'description'), read_item(checkpoint, 'checksums')
    description = ModelDescription.from_json(fields, checkpoint)
    if 'description' in sums:  # Checkpoints of early versions have none.
        check_json(fields, sums['description'], 'description', checkpoint)
    return description


class _PatientLoop(asyncio.SelectorEventLoop):
    """An event loop that waits for the reads that were left behind, and keeps their errors."""

    def __init__(self) -> None:
        super().__init__()
        self.set_exception_handler(lambda loop, context: None)

    def call_soon_threadsafe(self, callback, *arguments, context=None):
        try:
            return super().call_soon_threadsafe(callback, *arguments, context=context)
        except RuntimeError:
            if not self.is_closed():
                raise

    def close(self) -> None:
        left_behind = () if self.is_closed() else asyncio.all_tasks(self)
        if left_behind:
            self.run_until_complete(asyncio.gather(*left_behind, return_exceptions=True))
        super().close()


class _PatientPolicy(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return _PatientLoop()


@contextlib.contextmanager
def first_error_only() -> Iterator[None]:
    """While Orbax reads: of a damaged checkpoint's many errors only the one that is raised is told.

    Orbax reads all arrays at once and leaves the others behind when one fails. Each of them that
    fails later would otherwise print a traceback of its own, long after the error was dealt with.
    """
    before = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(_PatientPolicy())
    try:
        yield
    finally:
        asyncio.set_event_loop_policy(before)


def load_variables(
    directory: str | os.PathLike, choose: str = 'newest', *, check: bool = True
) -> tuple[ModelDescription, dict]:
    """Reads a network's description and its variables {'params', 'batch_stats'} as numpy arrays.

    Args:
      directory: A workdir, its `checkpoints`, a single checkpoint, or a ported directory.
      choose: 'newest' or 'best', see `find_checkpoint`.
      check: Refuse weights that are not finite; False where the caller calls `check_weights`.

    Raises:
      CheckpointError: There is none, it is damaged, or of a newer format.
    """
    checkpoint = find_checkpoint(directory, choose)
    description = _read_description(checkpoint)
    file_bytes = check_files(checkpoint)
    # On one device, whatever devices it was written from.
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        with first_error_only(), ocp.StandardCheckpointer() as checkpointer:
            # The handler's, because the checkpointer's logs that an item has no metadata of its
            # own.
            metadata = ocp.StandardCheckpointHandler().metadata(checkpoint / 'variables')
            check_size(metadata, file_bytes, checkpoint)
            target = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
                metadata,
            )
            variables = jax.device_get(checkpointer.restore(checkpoint / 'variables', target))
    except CheckpointError:
        raise
    except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files.
        raise CheckpointError(f'{checkpoint}: cannot be read: {one_line(error)}') from error
    check_checksums(variables, read_item(checkpoint, 'checksums').get('variables'), checkpoint)
    if 'params' not in variables:
        raise CheckpointError(f'{checkpoint}: damaged: it has no parameters')
    variables = {'params': variables['params'], 'batch_stats': variables.get('batch_stats', {})}
    if check:
        check_weights(variables, checkpoint)
    return description, variables


def write_ported(
    directory: str | os.PathLike, description: ModelDescription, variables: Mapping[str, Any]
) -> Path:
    """Writes variables that did not come from training as a checkpoint like any other.

    Args:
      directory: A new or empty directory.
      description: The network they belong to.
      variables: {'params', 'batch_stats'}; the latter may be missing.

    Returns:
      The checkpoint's directory.

    Raises:
      CheckpointError: The directory holds something already.
    """
    root = as_place(directory)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise CheckpointError(f'{directory} exists and is not empty; name a new directory')
    stored = {'params': variables['params'], 'batch_stats': variables.get('batch_stats', {})}
    fields = description.to_json()
    sums = {'variables': checksums(stored), 'description': json_checksum(fields)}
    with ocp.CheckpointManager(root / CHECKPOINTS) as manager:
        manager.save(
            0,
            args=ocp.args.Composite(
                variables=ocp.args.StandardSave(stored),
                description=ocp.args.JsonSave(fields),
                checksums=ocp.args.JsonSave(sums),
            ),
        )
    return root / CHECKPOINTS / '0'
