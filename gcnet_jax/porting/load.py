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

from gcnet_jax.context.global_context import GlobalContext
from gcnet_jax.errors import CheckpointError, ConfigError, one_line
from gcnet_jax.files import as_path, reason, write_whole
from gcnet_jax.models.registry import list_models, model_entry
from gcnet_jax.porting.architectures import build_and_compare, check_architecture
from gcnet_jax.porting.convert import Report, from_torch, to_torch_arrays
from gcnet_jax.porting.families.rules import Family
from gcnet_jax.porting.files import TorchFile, read_checkpoint
from gcnet_jax.porting.hub import CONFIG_FILE, HUB_FILES, HubConfig, read_hub_config
from gcnet_jax.porting.published import refuse_superseded, refuse_withdrawn_name
from gcnet_jax.porting.recognise import (
    check_shortcuts,
    class_count,
    family_of,
    recognise_block,
    recognise_family,
    recognise_model,
    told_options,
)

HUB = 'hf-hub:'
# What names the context block of mmsegmentation's head, alone.
BLOCK = 'global_context'


def load_torch(
    path: str | os.PathLike[str],
    model: str | nn.Module | None = None,
    *,
    weights: str = 'auto',
    family: str | None = None,
    drop_classifier: bool = False,
    allow_nonfinite: bool = False,
    ignore_architecture: bool = False,
    seed: int = 0,
    **options: Any,
) -> tuple[nn.Module, dict[str, Any], Report]:
    """Loads a PyTorch checkpoint.

    Args:
      path: A `.safetensors` file, or a `.pth`, `.pt` or `.bin` file.
      model: The network, or its name; None recognises it. A file holds parts as well: name a
        backbone to take it out of a detector or a segmenter, and 'global_context' for the context
        block of mmsegmentation's head.
      weights: 'ema', 'model', or 'auto' for the averaged ones where there are any.
      family: Whose names the file has: 'timm', 'torchvision', 'mmdetection', 'mmsegmentation',
        'gccnn' or 'pytorch_resnet_cifar10'; None recognises it.
      drop_classifier: Initialise a new classifier, of `num_classes`, and leave the file's.
      allow_nonfinite: Take weights that are NaN or infinite, and negative variances, with a warning
        in the report, instead of refusing them.
      ignore_architecture: Take the weights although the file names another network.
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
        allow_nonfinite=allow_nonfinite,
        ignore_architecture=ignore_architecture,
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
      metadata: What else the file says, see `TorchFile`.
    """

    network: nn.Module
    name: str | None
    options: Mapping[str, Any]
    variables: dict[str, Any]
    report: Report
    metadata: Mapping[str, Any]


def load_named(
    path: str | os.PathLike[str],
    model: str | nn.Module | None = None,
    *,
    weights: str = 'auto',
    family: str | None = None,
    drop_classifier: bool = False,
    allow_nonfinite: bool = False,
    ignore_architecture: bool = False,
    seed: int = 0,
    **options: Any,
) -> Loaded:
    """Does what `load_torch` does, and tells the network's name and options too."""
    _suggest_hub(path)
    refuse_withdrawn_name(Path(path))
    file = read_checkpoint(path, weights=weights)
    names = recognise_family(file.tensors, family, _module_class(model))
    refuse_superseded(file, names)
    channels, notes = 3, ()
    if isinstance(model, nn.Module):
        _refuse(options, 'a module has its options already')
        network, name = model, None
        if names.network is None:
            channels = recognise_block(file.tensors.shapes, names)[1]
    elif model in (None, BLOCK) and names.network is None:
        _refuse(options, 'a context block has its options from the file')
        network, channels = recognise_block(file.tensors.shapes, names)
        name = None
    elif model == BLOCK:
        raise CheckpointError(
            f"{one_line(file.path)} holds no context block in a head of mmsegmentation's"
        )
    else:
        asked = {*options, *(['num_classes'] if drop_classifier else [])}
        name, options = _named_options(file, names, model, drop_classifier, options)
        network, name, options, notes = build_and_compare(
            file, name, options, asked, choose=model is None, check=not ignore_architecture
        )
    if not isinstance(network, names.module):
        raise CheckpointError(
            f'{file.path} has the names of {names.library}, which are not those of a '
            f'{type(network).__name__}: leave the model out to have it recognised'
        )
    try:
        check_shortcuts(file.tensors.shapes, names, network, name)
        variables, report = from_torch(
            file.tensors,
            names,
            network,
            drop_classifier=drop_classifier,
            allow_nonfinite=allow_nonfinite,
            seed=seed,
            channels=channels,
        )
    except CheckpointError as error:
        raise CheckpointError(f'{file.path}: {error}') from None
    report = dataclasses.replace(report, wrapper=file.wrapper, warnings=(*report.warnings, *notes))
    return Loaded(network, name, options, variables, report, file.metadata)


def _module_class(model: str | nn.Module | None) -> type[nn.Module] | None:
    if model == BLOCK:
        return GlobalContext
    if isinstance(model, str):
        return model_entry(model).module.func
    return None if model is None else type(model)


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
        classes = class_count(file.tensors.shapes, family)
        found = {'num_classes': classes} if classes and not drop_classifier else {}
        return model, found | told_options(file.tensors.shapes, family) | dict(options)
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
    found = find_pretrained(source)
    loaded = load_named(found.path, found.name if model is None else model, **options)
    if loaded.name and not options.get('ignore_architecture'):
        check_architecture(found.architecture, loaded.name, one_line(source))
    return loaded.network, loaded.variables, loaded.report


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights that were found.

    Attributes:
      path: The file.
      name: The network that the repository's name or the config tells; None if none of ours.
      architecture: The name that its library gives to the network; '' if it is not known.
      config: What the `config.json` beside the file says, if there is one.
    """

    path: Path
    name: str | None = None
    architecture: str = ''
    config: HubConfig | None = None


def find_pretrained(source: str | os.PathLike[str]) -> Source:
    """Returns the file of a source, downloaded if need be, and what is known about it.

    Raises:
      CheckpointError: There is no such file, it cannot be downloaded, or its config is damaged.
    """
    if str(source).startswith(HUB):
        repository, _, revision = str(source).removeprefix(HUB).partition('@')
        path = _download(repository, revision or None)
        _check_hash(path)
        config, names = _hub_config(repository, revision or None), [repository.rpartition('/')[2]]
    else:
        _suggest_hub(source)
        # timm's prefix of a directory.
        given = as_path(os.fsdecode(source).removeprefix('local-dir:'), 'the checkpoint')
        path = _file_in(given)
        # A file of the hub's own name has its config beside it, as a directory has it inside.
        has_config = given.is_dir() or path.name in HUB_FILES
        config, names = (read_hub_config(path.parent) if has_config else None), []
    architecture = config.architecture if config else ''
    if not architecture and str(source).startswith(f'{HUB}timm/'):
        architecture = names[0]
    names += [architecture]
    plain = (name.partition('.')[0] for name in names)
    name = next((name for name in plain if name in list_models()), None)
    return Source(path, name, architecture, config)


def _hub_config(repository: str, revision: str | None) -> HubConfig | None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        path = huggingface_hub.hf_hub_download(repository, CONFIG_FILE, revision=revision)
    except Exception as error:
        is_local = isinstance(error, LocalEntryNotFoundError)
        if isinstance(error, EntryNotFoundError) and not is_local:
            return None
        raise CheckpointError(
            f'cannot download {CONFIG_FILE} of {one_line(repository)}, which says how images are '
            f'prepared: {reason(error)}'
        ) from None
    return read_hub_config(Path(path).parent)


def _file_in(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = [path / name for name in HUB_FILES if (path / name).is_file()]
    if not found:
        raise CheckpointError(f'{path} holds none of {", ".join(HUB_FILES)}; give the file itself')
    return found[0]


def _suggest_hub(source: str | os.PathLike[str]) -> None:
    """Raises an error that says how to name a repository, where `source` looks like one."""
    source = os.fsdecode(source)
    if source.startswith(HUB):
        raise CheckpointError(
            f'{one_line(source)}: load_torch reads files; load_pretrained reads repositories'
        )
    is_file = source.endswith(('.safetensors', '.pth', '.pt', '.bin'))
    if is_file or source.startswith('local-dir:') or os.path.exists(os.path.expanduser(source)):
        return
    prefixes = r'^(hf[-_]?hub:|hf:|timm:|(https?://)?(www\.)?huggingface\.co/)/*'
    name = re.sub(prefixes, '', source, flags=re.IGNORECASE)
    if name.partition('.')[0] in list_models():
        name = f'timm/{name}'
    if re.fullmatch(r'[\w.-]+/[\w.-]+(@[\w.-]+)?', name):
        raise CheckpointError(
            f'no such checkpoint: {one_line(source)}; write {HUB}{one_line(name)} if you mean the '
            'repository of that name on the hub'
        )


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
            raise CheckpointError(
                f'cannot download {one_line(repository)}: {reason(error)}. Without a '
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
      family: Whose names: 'timm', 'torchvision', 'mmdetection', 'mmsegmentation', 'gccnn' or
        'pytorch_resnet_cifar10'.

    Returns:
      Every tensor by its name; `load_state_dict(strict=True)` of the library's own network takes
      them as torch tensors.

    Raises:
      CheckpointError: The library has no such network, or no name for one of the leaves.
    """
    return to_torch_arrays(variables, family_of(model, family))[0]


def write_safetensors(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict as a file that timm, torch and others load; whole or not at all."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    path = as_path(path)
    with write_whole(path, CheckpointError) as partial:
        try:
            partial.touch()
            mode = stat.S_IMODE(partial.stat().st_mode)
            save_file(dict(tensors), partial, metadata={'format': 'pt'})
            partial.chmod(mode)  # safetensors lets nobody else read its files.
        except SafetensorError as error:
            raise CheckpointError(f'cannot write {one_line(path)}: {reason(error)}') from error
