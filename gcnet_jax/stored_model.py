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
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import linen as nn

from gcnet_jax.errors import CheckpointError
from gcnet_jax.files import as_place, explain_bucket, is_bucket
from gcnet_jax.models.registry import IMAGENET, Preprocessing, create_model

FORMAT_VERSION = 1
CHECKPOINTS = 'checkpoints'
METRICS = 'metrics'
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
        fields = dict(fields)
        version = fields.pop('format_version', None)
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f'{place}: format version {version}; this package reads {FORMAT_VERSION}: '
                'use the version of gcnet_jax that wrote it'
            )
        try:
            fields['preprocessing'] = Preprocessing(
                **{
                    key: tuple(value) if isinstance(value, list) else value
                    for key, value in fields['preprocessing'].items()
                }
            )
            fields['label_names'] = tuple(fields['label_names'])
            return cls(**fields)
        except (KeyError, TypeError) as error:
            raise CheckpointError(f'{place}: incomplete model description: {error}') from error


def step_directories(directory: str | os.PathLike) -> dict[int, Path]:
    """Returns the checkpoints under a workdir or its `checkpoints` by step, oldest first."""
    root = as_place(directory, 'checkpoint')
    root = root / CHECKPOINTS if (root / CHECKPOINTS).is_dir() else root
    if not root.is_dir():
        return {}
    found = {int(path.name): path for path in root.iterdir() if re.fullmatch(r'\d+', path.name)}
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
        return read_item(checkpoint, METRICS).get('eval/accuracy', -1.0)
    except CheckpointError:
        return -1.0


def read_item(checkpoint: Path, name: str) -> Any:
    """Reads a JSON item of one checkpoint.

    Raises:
      CheckpointError: It is missing or damaged.
    """
    # The manager itself writes the metrics, under another name than that of other items.
    file = METRICS if name == METRICS else 'metadata'
    try:
        return json.loads((checkpoint / name / file).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f'{checkpoint}: cannot read {name}: {error}') from error


def read_model_description(
    directory: str | os.PathLike, choose: str = 'newest'
) -> ModelDescription:
    """Reads which network a checkpoint holds; see `find_checkpoint` for the arguments."""
    checkpoint = find_checkpoint(directory, choose)
    return ModelDescription.from_json(read_item(checkpoint, 'description'), checkpoint)


def checksums(tree: Any) -> dict[str, int]:
    """Returns a checksum of every leaf, the same on any number of devices and processes.

    Every 32 bits count with their position in the whole array, so a changed bit or two swapped
    values are seen whichever way the array is split.
    """
    partial = {
        jax.tree_util.keystr(path): _leaf_sum(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        own = np.asarray(list(partial.values()), np.uint32)
        total = np.sum(multihost_utils.process_allgather(own), axis=0, dtype=np.uint32)
        partial = dict(zip(partial, map(int, total), strict=True))
    return partial


def _leaf_sum(leaf: Any) -> int:
    """Sums the parts of an array that this process is the first to hold."""
    if not isinstance(leaf, jax.Array):
        leaf = np.asarray(leaf)
        parts = [((slice(None),) * leaf.ndim, leaf)] if jax.process_index() == 0 else []
    else:
        shards = leaf.addressable_shards
        parts = [(shard.index, shard.data) for shard in shards if shard.replica_id == 0]
    total = 0
    for index, data in parts:
        values = np.ascontiguousarray(np.asarray(data))
        unsigned = np.dtype(f'u{values.dtype.itemsize}')
        bits = values.view(unsigned).astype(np.uint32)
        position = np.zeros((), np.uint32)
        stride = 1
        for axis in reversed(range(leaf.ndim)):
            start = index[axis].start or 0
            along = np.arange(start, start + bits.shape[axis], dtype=np.uint32)
            along = along.reshape((-1,) + (1,) * (leaf.ndim - 1 - axis))
            position = position + along * np.uint32(stride % 2**32)
            stride *= leaf.shape[axis]
        total += int(np.sum(bits * (2 * position + 1), dtype=np.uint32))
    return total % 2**32


def check_checksums(tree: Any, expected: Mapping[str, int], place: object) -> None:
    """Raises CheckpointError where a leaf is not what was saved."""
    actual = checksums(tree)
    wrong = sorted(key for key in actual if actual[key] != expected.get(key))
    if wrong:
        raise CheckpointError(f'{place}: damaged: {len(wrong)} arrays differ, first {wrong[0]}')


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
    directory: str | os.PathLike, choose: str = 'newest'
) -> tuple[ModelDescription, dict]:
    """Reads a network's description and its variables {'params', 'batch_stats'} as numpy arrays.

    Args:
      directory: A workdir, its `checkpoints`, a single checkpoint, or a ported directory.
      choose: 'newest' or 'best', see `find_checkpoint`.

    Raises:
      CheckpointError: There is none, it is damaged, or of a newer format.
    """
    checkpoint = find_checkpoint(directory, choose)
    description = ModelDescription.from_json(read_item(checkpoint, 'description'), checkpoint)
    # On one device, whatever devices it was written from.
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        with first_error_only(), ocp.StandardCheckpointer() as checkpointer:
            # The handler's, because the checkpointer's logs that an item has no metadata of its
            # own.
            metadata = ocp.StandardCheckpointHandler().metadata(checkpoint / 'variables')
            target = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
                metadata,
            )
            variables = jax.device_get(checkpointer.restore(checkpoint / 'variables', target))
    except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files.
        raise CheckpointError(f'{checkpoint}: cannot be read: {_one_line(error)}') from error
    check_checksums(variables, read_item(checkpoint, 'checksums')['variables'], checkpoint)
    return description, {
        'params': variables['params'],
        'batch_stats': variables.get('batch_stats', {}),
    }


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
    with ocp.CheckpointManager(root / CHECKPOINTS) as manager:
        manager.save(
            0,
            args=ocp.args.Composite(
                variables=ocp.args.StandardSave(stored),
                description=ocp.args.JsonSave(description.to_json()),
                checksums=ocp.args.JsonSave({'variables': checksums(stored)}),
            ),
        )
    return root / CHECKPOINTS / '0'


def _one_line(error: BaseException) -> str:
    text = ' '.join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + '...'
