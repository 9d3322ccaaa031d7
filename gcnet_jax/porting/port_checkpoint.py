"""From a PyTorch file to a checkpoint directory of ours and back: what the command line calls."""

import contextlib
import dataclasses
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from gcnet_jax.data.coco_labels import COCO_LABELS
from gcnet_jax.data.segmentation_labels import LABEL_SETS, palette
from gcnet_jax.errors import CheckpointError, ConfigError, one_line
from gcnet_jax.files import as_path, read_text, reason
from gcnet_jax.models.registry import model_entry
from gcnet_jax.porting.architectures import check_architecture
from gcnet_jax.porting.convert import Report, to_torch_arrays
from gcnet_jax.porting.hub import HUB_FILES, check_label, write_hub_config
from gcnet_jax.porting.load import (
    Loaded,
    Source,
    find_pretrained,
    load_named,
    write_safetensors,
)
from gcnet_jax.porting.mmsegmentation_config import config_of
from gcnet_jax.porting.recognise import family_of
from gcnet_jax.porting.torch_writer import write_torch
from gcnet_jax.stored import ModelDescription, load_variables, write_ported
from gcnet_jax.stored.places import CHECKPOINTS

MAX_LABEL_BYTES = 10_000_000
# What a checkpoint goes back to, in the order in which errors name them.
FILE_SUFFIXES = ('.safetensors', '.pth')


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

    A plain network goes into a GC network too: `port('hf-hub:timm/resnet50.a1_in1k', 'start',
    'gc_resnet50')` gives what the paper fine-tunes, a trained ResNet-50 whose new context blocks
    start as the identity.

    Args:
      checkpoint: A file, a directory in the hub's form, or 'hf-hub:' and a repository; see
        `load_pretrained`. Where there is a `config.json`, preprocessing and labels are its.
      out: The directory; new, unless `overwrite`.
      model: The network's name; None takes it from the file.
      label_names: A text file with the name of a class on each line, in the order of the logits;
        None takes those of a `config.json` beside the weights, or of a file of mmdetection or
        mmsegmentation, and where it names none those of the data set that the published networks
        of as many classes were trained on.
      overwrite: Replace a directory of that name, if it holds a checkpoint.
      **options: See `load_torch`.

    Returns:
      What the directory holds, and the report.

    Raises:
      CheckpointError: The file cannot be read or does not fit, or the directory cannot be written.
        No directory is left behind.
      ConfigError: The label names cannot be read, or are not one for each class.
    """
    out = as_path(out).absolute()
    _check_out(out, overwrite)
    labels = () if label_names is None else _read_label_names(as_path(label_names))
    source = find_pretrained(checkpoint)
    loaded = load_named(source.path, source.name if model is None else model, **options)
    if loaded.name is None:
        raise CheckpointError(
            f'{checkpoint} holds a context block, not a network: load it with '
            'gcnet_jax.porting.load_torch'
        )
    if not options.get('ignore_architecture'):
        check_architecture(source.architecture, loaded.name, one_line(checkpoint))
    if labels and len(labels) != loaded.network.num_classes:
        raise ConfigError(
            f'{label_names} has {len(labels)} lines and {loaded.name} has '
            f'{loaded.network.num_classes} classes; write one name a line, in the order of the '
            'classes'
        )
    description = _description(source, loaded, None if label_names is None else labels, checkpoint)
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
    """Writes a checkpoint of ours as a file or a directory that a PyTorch library loads.

    Args:
      directory: A workdir, one of its checkpoints or a ported directory.
      family: Whose names: 'timm', 'torchvision', 'mmdetection', 'mmsegmentation', 'gccnn' or
        'pytorch_resnet_cifar10'.
      out: A file that ends in `.safetensors` or `.pth`, or a directory, which gets the hub's form:
        `model.safetensors` and `config.json`; new, unless `overwrite`. Detectors and segmenters
        become one file; a `.pth` has the label names in its `meta`, and a segmenter's config.
      choose: 'newest' or 'best', where there are several checkpoints.
      overwrite: Replace a file of that name.

    Raises:
      CheckpointError: The checkpoint cannot be read, the library has no such network, or the file
        cannot be written.
    """
    out = as_path(out)
    is_file = out.suffix in FILE_SUFFIXES
    if not is_file and out.suffix:
        raise CheckpointError(
            f'the file to write must end in {" or ".join(FILE_SUFFIXES)}, got {one_line(out)}'
        )
    if out.exists() and (not overwrite or out.is_dir() == is_file):
        raise CheckpointError(
            f'{one_line(out)} exists; name a new file or replace it with --overwrite'
        )
    description, variables = load_variables(directory, choose)
    network = description.build()
    names = family_of(network, family)
    kind = {'detection': 'detector', 'segmentation': 'segmenter'}.get(description.task)
    if not is_file and kind:
        raise CheckpointError(
            f'{names.library} reads a {kind} from one file: end --out in .pth, got {one_line(out)}'
        )
    arrays, report = to_torch_arrays(variables, names)
    if is_file:
        _write_file(out, arrays, description, family)
        return report
    if out.exists() and any(out.iterdir()) and not (out / HUB_FILES[0]).is_file():
        raise CheckpointError(f'{one_line(out)} holds something else; name a new directory')
    with _whole_or_not_at_all(out.absolute()) as partial:
        partial.mkdir(parents=True)
        write_safetensors(partial / HUB_FILES[0], arrays)
        write_hub_config(
            partial,
            description.name.removeprefix('gc_') if family == 'torchvision' else description.name,
            description.preprocessing,
            description.label_names,
            network.num_classes,
        )
    return report


def _write_file(
    out: Path, arrays: Mapping[str, np.ndarray], description: ModelDescription, family: str
) -> None:
    if out.suffix == '.safetensors':
        write_safetensors(out, arrays)
    elif family in ('mmdetection', 'mmsegmentation'):
        labels = description.label_names
        meta = {'CLASSES': tuple(labels)} if labels else {}
        if labels and family == 'mmsegmentation':
            meta['PALETTE'] = palette(labels, len(labels)).tolist()
        if description.task == 'segmentation':
            meta['cfg'] = config_of(description)
        write_torch(out, arrays, meta=meta)
    else:
        write_torch(out, arrays)


def _description(
    source: Source, loaded: Loaded, labels: tuple[str, ...] | None, checkpoint: object
) -> ModelDescription:
    """The network's own settings with those of the config; labels of None are the config's too."""
    entry = model_entry(loaded.name)
    preprocessing = entry.preprocessing
    if source.config is not None:
        preprocessing = dataclasses.replace(preprocessing, **source.config.preprocessing)
    if labels is None:
        labels = _labels_of(source, loaded, checkpoint)
    return ModelDescription(
        name=loaded.name,
        options=dict(loaded.options),
        label_names=labels or (),
        preprocessing=preprocessing,
        task=entry.task,
        source=f'ported from {Path(checkpoint).name} ({loaded.report.family})',
    )


def _labels_of(source: Source, loaded: Loaded, checkpoint: object) -> tuple[str, ...]:
    """The labels of the config or the file, else those of the published networks' data set.

    What is newly initialised has none.
    """
    classes, new = loaded.network.num_classes, loaded.report.initialised
    if not classes or any(
        re.match(r'params/(classifier|(box_)?head(_\d+)?/logits)/', p) for p in new
    ):
        return ()
    if source.config is not None:
        labels, whose = source.config.label_names, 'its config'
    else:
        try:
            labels, whose = _labels_in(loaded.metadata), 'it'
        except ConfigError as error:
            raise CheckpointError(
                f'{one_line(checkpoint)}: {error}; or give the names with --label-names'
            ) from None
    if len(labels) not in (0, classes):
        raise CheckpointError(
            f'{one_line(checkpoint)}: {whose} names {len(labels)} labels and the network has '
            f'{classes} classes; give the names with --label-names'
        )
    return labels or _labels_of_data_set(loaded.name, classes)


def _labels_of_data_set(name: str, classes: int) -> tuple[str, ...]:
    """Those of COCO for detectors, those in the row's name for segmenters, if as many."""
    labels: tuple[str, ...] = ()
    if model_entry(name).task == 'detection':
        labels = COCO_LABELS
    elif model_entry(name).task == 'segmentation':
        data_set = next((key for key in LABEL_SETS if f'_{key}' in name), None)
        labels = LABEL_SETS[data_set].names if data_set else ()
    return labels if len(labels) == classes else ()


def _labels_in(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """The names that mmcv ('CLASSES') and mmengine ('dataset_meta') save; () without any."""
    meta = metadata.get('meta')
    meta = meta if isinstance(meta, Mapping) else {}
    places = (meta.get('dataset_meta'), meta)
    for place in places:
        for key in ('classes', 'CLASSES') if isinstance(place, Mapping) else ():
            names = place.get(key)
            if isinstance(names, list) and all(isinstance(name, str) for name in names):
                for number, name in enumerate(names):
                    check_label(name, f'label {number} of the file')
                return tuple(names)
    return ()


def _read_label_names(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        raise ConfigError(f'{one_line(path)} is not a file of names; write one name a line')
    try:
        text = read_text(path, MAX_LABEL_BYTES, ConfigError)
    except ConfigError as error:
        raise ConfigError(f'the label names cannot be read: {error}') from error
    # Other line breaks, such as a form feed, are part of a name, and refused as such.
    names = tuple(line.strip(' \t\r') for line in text.removesuffix('\n').split('\n'))
    # A name may stand on two lines: ImageNet has two classes called 'crane'.
    for number, name in enumerate(names, start=1):
        if not name:
            raise ConfigError(f'{one_line(path)} has an empty line; write one name a line')
        check_label(name, f'line {number} of {one_line(path)}')
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
    """Gives a directory to write into, which takes the place of `out` once it is complete.

    Raises:
      CheckpointError: It cannot be written, in one line. What was at `out` is left as it was.
    """
    # Not to be guessed: nothing of the user's can have these names.
    token = secrets.token_hex(4)
    partial, old = (out.with_name(f'.{out.name[:100]}.{token}.{end}') for end in ('partial', 'old'))
    try:
        yield partial
        if out.exists():
            out.rename(old)
        try:
            partial.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except CheckpointError:
        raise
    except Exception as error:  # Orbax and TensorStore have many errors for a full disk
        raise CheckpointError(f'cannot write {one_line(out)}: {reason(error)}') from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
