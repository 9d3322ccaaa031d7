"""Reading and writing a network's variables, as the Orbax items of one checkpoint."""

import asyncio
import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from gcnet_jax.errors import CheckpointError, one_line
from gcnet_jax.files import as_place
from gcnet_jax.stored.checks import check_files, check_size, check_weights
from gcnet_jax.stored.checksums import check_checksums, check_json, checksums, json_checksum
from gcnet_jax.stored.description import ModelDescription
from gcnet_jax.stored.places import CHECKPOINTS, find_checkpoint, read_item


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
    """An event loop that waits for the tasks that were left behind, and keeps their errors."""

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
    """Where Orbax cannot read or write, hides every error except the one that it raises.

    Orbax reads and writes all arrays at once and leaves the others behind when one fails: in a
    damaged checkpoint, or on a full disk. Each of them that fails later would otherwise print a
    traceback of its own, long after the error was dealt with.
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
