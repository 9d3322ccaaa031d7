"""From a PyTorch file to a checkpoint directory of ours and back: what the command line calls."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from gcnet_jax.errors import CheckpointError, ConfigError
from gcnet_jax.models.registry import model_entry
from gcnet_jax.porting.convert import Report, to_torch_arrays
from gcnet_jax.porting.load import find_pretrained, load_named, write_safetensors
from gcnet_jax.porting.recognise import family_of
from gcnet_jax.stored_model import CHECKPOINTS, ModelDescription, load_variables, write_ported

MAX_LABEL_BYTES = 10_000_000


def port(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    model: str | None = None,
    *,
    label_names: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    **options: Any,
) -> tuple[ModelDescription, Report]:
    """Writes a PyTorch checkpoint as a directory that training, evaluation and inference read.

    Args:
      checkpoint: A file, or 'hf-hub:' and a repository; see `load_pretrained`.
      out: The directory; new, unless `overwrite`.
      model: The network's name; None takes it from the file.
      label_names: A text file with the name of a class on each line, in the order of the logits:
        PyTorch's files hold none.
      overwrite: Replace a directory of that name, if it holds a checkpoint.
      **options: See `load_torch`.

    Returns:
      What the directory holds, and the report.

    Raises:
      CheckpointError: The file cannot be read or does not fit, or the directory cannot be written.
        No directory is left behind.
      ConfigError: The label names cannot be read, or are not one for each class.
    """
    out = Path(out).expanduser().absolute()
    _check_out(out, overwrite)
    labels = () if label_names is None else _read_label_names(Path(label_names))
    path, name = find_pretrained(checkpoint)
    loaded = load_named(path, name if model is None else model, **options)
    if loaded.name is None:
        raise CheckpointError(
            f'{checkpoint} holds a context block, not a network: load it with '
            'gcnet_jax.porting.load_torch'
        )
    if labels and len(labels) != loaded.network.num_classes:
        raise ConfigError(
            f'{label_names} has {len(labels)} lines and {loaded.name} has '
            f'{loaded.network.num_classes} classes; write one name a line, in the order of the '
            'classes'
        )
    description = ModelDescription(
        name=loaded.name,
        options=dict(loaded.options),
        label_names=labels,
        preprocessing=model_entry(loaded.name).preprocessing,
        source=f'ported from {Path(checkpoint).name} ({loaded.report.family})',
    )
    _to_jax(loaded.variables)
    with _whole_or_not_at_all(out) as partial:
        write_ported(partial, description, loaded.variables)
    return description, loaded.report


def port_reverse(
    directory: str | os.PathLike[str],
    family: str,
    out: str | os.PathLike[str],
    *,
    choose: str = 'newest',
    overwrite: bool = False,
) -> Report:
    """Writes a checkpoint of ours as a `.safetensors` file that a PyTorch library loads.

    Args:
      directory: A workdir, one of its checkpoints or a ported directory.
      family: Whose names: 'timm', 'torchvision', 'mmdetection' or 'gccnn'.
      out: The file; new, unless `overwrite`.
      choose: 'newest' or 'best', where there are several checkpoints.
      overwrite: Replace a file of that name.

    Raises:
      CheckpointError: The checkpoint cannot be read, the library has no such network, or the file
        cannot be written.
    """
    out = Path(out).expanduser()
    if out.suffix != '.safetensors':
        raise CheckpointError(f'the file to write must end in .safetensors, got {out}')
    if out.is_dir() or (out.exists() and not overwrite):
        raise CheckpointError(f'{out} exists; name a new file or replace it with --overwrite')
    description, variables = load_variables(directory, choose)
    arrays, report = to_torch_arrays(variables, family_of(description.build(), family))
    write_safetensors(out, arrays)
    return report


def _read_label_names(path: Path) -> tuple[str, ...]:
    try:
        if not path.is_file() or path.stat().st_size > MAX_LABEL_BYTES:
            raise ConfigError(f'{path} is not a file of at most {MAX_LABEL_BYTES:,} bytes of names')
        # Windows' editors put a byte order mark in front.
        names = tuple(line.strip() for line in path.read_text('utf-8-sig').splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f'the label names in {path} cannot be read: {error}') from error
    # A name may stand on two lines: ImageNet has two classes called 'crane'.
    if not all(names) or not names:
        raise ConfigError(f'{path} has an empty line; write one name a line')
    return names


def _to_jax(tree: dict[str, Any]) -> None:
    """Makes jax arrays of the leaves, one by one: Orbax would copy numpy's all at once."""
    for key, value in tree.items():
        if isinstance(value, dict):
            _to_jax(value)
        else:
            tree[key] = jnp.asarray(value)


def _check_out(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise CheckpointError(f'{out} exists; name a new directory or replace it with --overwrite')
    if not (out / CHECKPOINTS).is_dir():
        raise CheckpointError(f'{out} holds no checkpoint, so --overwrite does not replace it')


@contextlib.contextmanager
def _whole_or_not_at_all(out: Path) -> Iterator[Path]:
    """Gives a directory to write into, which takes the place of `out` once it is complete."""
    partial = out.with_name(f'.{out.name}.partial')
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        old = out.with_name(f'.{out.name}.old')
        if out.exists():
            out.rename(old)
        partial.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    except CheckpointError:
        raise
    except Exception as error:  # Orbax and TensorStore have many errors for a full disk
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else ''
        raise CheckpointError(f'cannot write {out}: {reason or type(error).__name__}') from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
