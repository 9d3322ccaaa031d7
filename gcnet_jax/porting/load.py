"""PyTorch checkpoints in and out: from Python, and as the functions behind the command line."""

import dataclasses
import hashlib
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

from gcnet_jax.errors import CheckpointError, ConfigError
from gcnet_jax.models.registry import create_model, list_models
from gcnet_jax.porting.convert import Report, from_torch, to_torch_arrays
from gcnet_jax.porting.files import TorchFile, read_checkpoint
from gcnet_jax.porting.names import Family
from gcnet_jax.porting.recognise import (
    family_of,
    recognise_block,
    recognise_family,
    recognise_model,
)

HUB = 'hf-hub:'
HUB_FILES = ('model.safetensors', 'pytorch_model.bin')


def load_torch(
    path: str | os.PathLike[str],
    model: str | nn.Module | None = None,
    *,
    weights: str = 'auto',
    family: str | None = None,
    drop_classifier: bool = False,
    seed: int = 0,
    **options: Any,
) -> tuple[nn.Module, dict[str, Any], Report]:
    """Loads a PyTorch checkpoint.

    Args:
      path: A `.safetensors` file, or a `.pth`, `.pt` or `.bin` file (needs torch).
      model: The network, or its name; None recognises it. A file of mmsegmentation gives its
        context block alone.
      weights: 'ema', 'model', or 'auto' for the averaged ones where there are any.
      family: Whose names the file has: 'timm', 'torchvision', 'mmdetection', 'mmsegmentation' or
        'gccnn'; None recognises it.
      drop_classifier: Initialise a new classifier, of `num_classes`, and leave the file's.
      seed: For what is newly initialised: a new classifier, or the context blocks of a GC network
        that a plain one is loaded into.
      **options: Of the network, see `create_model`: `num_classes`, `dtype`, `context`, ...

    Returns:
      The network, its variables `{'params', 'batch_stats'}` as numpy arrays, and the report.

    Raises:
      CheckpointError: The file cannot be read, or does not fit in every tensor.
      ConfigError: An unknown name or option.
    """
    loaded = load_named(
        path,
        model,
        weights=weights,
        family=family,
        drop_classifier=drop_classifier,
        seed=seed,
        **options,
    )
    return loaded.network, loaded.variables, loaded.report


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A network that a file was loaded into.

    Attributes:
      network: The module.
      name, options: What `create_model` builds it of; no name for a module that was handed in and
        for a context block.
      variables: `{'params', 'batch_stats'}` as numpy arrays.
      report: What became of every tensor.
    """

    network: nn.Module
    name: str | None
    options: Mapping[str, Any]
    variables: dict[str, Any]
    report: Report


def load_named(
    path: str | os.PathLike[str],
    model: str | nn.Module | None = None,
    *,
    weights: str = 'auto',
    family: str | None = None,
    drop_classifier: bool = False,
    seed: int = 0,
    **options: Any,
) -> Loaded:
    """Does what `load_torch` does, and tells the network's name and options too."""
    file = read_checkpoint(path, weights=weights)
    names = recognise_family(file.tensors, family)
    channels = 3
    if isinstance(model, nn.Module):
        _refuse(options, 'a module has its options already')
        network, name = model, None
    elif model is None and names.library == 'mmsegmentation':
        _refuse(options, 'a context block has its options from the file')
        network, channels = recognise_block(file.tensors.shapes, names)
        name = None
    else:
        name, options = _named_options(file, names, model, drop_classifier, options)
        network = create_model(name, **options)
    if not isinstance(network, names.module):
        raise CheckpointError(
            f'{file.path} has the names of {names.library}, which are not those of a '
            f'{type(network).__name__}: leave the model out to have it recognised'
        )
    try:
        variables, report = from_torch(
            file.tensors,
            names,
            network,
            drop_classifier=drop_classifier,
            seed=seed,
            channels=channels,
        )
    except CheckpointError as error:
        raise CheckpointError(f'{file.path}: {error}') from None
    report = dataclasses.replace(report, wrapper=file.wrapper)
    return Loaded(network, name, options, variables, report)


def _refuse(options: Mapping[str, Any], why: str) -> None:
    if options:
        raise ConfigError(f'{why}: {", ".join(options)} cannot be given')


def _named_options(
    file: TorchFile,
    family: Family,
    model: str | None,
    drop_classifier: bool,
    options: Mapping[str, Any],
) -> tuple[str, dict[str, Any]]:
    """The name, and the options that are not the row's: those given, then those of the file."""
    if model is not None:
        return model, dict(options)
    name, found = recognise_model(file.tensors.shapes, family)
    classes = options.get('num_classes', found['num_classes'])
    if found['num_classes'] not in (0, classes) and not drop_classifier:
        raise CheckpointError(
            f'{file.path} has {found["num_classes"]} classes and num_classes is {classes}: drop '
            'its classifier (--drop-classifier) to start a new one'
        )
    return name, found | options


def load_pretrained(
    source: str | os.PathLike[str], model: str | nn.Module | None = None, **options: Any
) -> tuple[nn.Module, dict[str, Any], Report]:
    """Loads published weights, such as 'hf-hub:timm/gcresnet50t.ra2_in1k'.

    Args:
      source: 'hf-hub:' and a repository, with '@' and a revision if need be; or a local file, or a
        directory that holds `model.safetensors`.
      model: The network; None takes it from the repository's name or recognises it.
      **options: See `load_torch`.

    Returns:
      The network, its variables and the report.

    Raises:
      CheckpointError: It cannot be downloaded (says what to do), is damaged, or does not fit.
    """
    path, name = find_pretrained(source)
    return load_torch(path, name if model is None else model, **options)


def find_pretrained(source: str | os.PathLike[str]) -> tuple[Path, str | None]:
    """Returns the file of a source, downloaded if need be, and the network that its name tells."""
    if not str(source).startswith(HUB):
        return _file_in(Path(source).expanduser()), None
    repository, _, revision = str(source).removeprefix(HUB).partition('@')
    path = _download(repository, revision or None)
    _check_hash(path)
    name = repository.rpartition('/')[2].partition('.')[0]
    return path, name if name in list_models() else None


def _file_in(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = [path / name for name in HUB_FILES if (path / name).is_file()]
    if not found:
        raise CheckpointError(f'{path} holds none of {", ".join(HUB_FILES)}; give the file itself')
    return found[0]


def _download(repository: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for name in HUB_FILES:
        try:
            return Path(huggingface_hub.hf_hub_download(repository, name, revision=revision))
        except Exception as error:  # the hub's own errors, its HTTP client's, OSError
            is_local = isinstance(
                error, LocalEntryNotFoundError
            )  # not in the cache, and no network
            if isinstance(error, EntryNotFoundError) and not is_local:
                continue
            reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else ''
            raise CheckpointError(
                f'cannot download {repository}: {reason or type(error).__name__}. Without a '
                f'network, fetch its {HUB_FILES[0]} elsewhere and give the path of that instead'
            ) from None
    raise CheckpointError(f'{repository} on the hub holds none of {", ".join(HUB_FILES)}')


def _check_hash(path: Path) -> None:
    """The hub's cache names a file by its SHA-256: one that was cut or changed is seen here."""
    expected = path.resolve().name
    if not re.fullmatch('[0-9a-f]{64}', expected):
        return
    with path.open('rb') as file:
        found = hashlib.file_digest(file, 'sha256').hexdigest()
    if found != expected:
        raise CheckpointError(f'{path} is damaged (SHA-256 {found}): delete it and load again')


def to_torch(model: nn.Module, variables: Mapping[str, Any], family: str) -> dict[str, np.ndarray]:
    """Converts variables to a PyTorch state dict.

    Args:
      model: The network.
      variables: Its `{'params', 'batch_stats'}`.
      family: Whose names: 'timm', 'torchvision', 'mmdetection', 'mmsegmentation' or 'gccnn'.

    Returns:
      Every tensor by its name; `load_state_dict(strict=True)` of the library's own network takes
      them as torch tensors.

    Raises:
      CheckpointError: The library has no such network, or no name for one of the leaves.
    """
    return to_torch_arrays(variables, family_of(model, family))[0]


def write_safetensors(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict as a file that timm, torch and others load; whole or not at all."""
    from safetensors.numpy import save_file

    path = Path(path).expanduser()
    partial = path.with_name(path.name + '.partial')
    try:
        partial.touch()
        mode = stat.S_IMODE(partial.stat().st_mode)
        save_file(dict(tensors), partial, metadata={'format': 'pt'})
        partial.chmod(mode)  # safetensors lets nobody else read its files.
        os.replace(partial, path)
    except Exception as error:
        raise CheckpointError(f'cannot write {path}: {error}') from error
    finally:
        partial.unlink(missing_ok=True)
