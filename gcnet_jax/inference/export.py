"""A stored network as one file that runs elsewhere: a JAX export artifact, or ONNX.

Both take uint8 images `[batch, height, width, 3]`, of any batch size; the normalisation is inside.
A classifier returns probabilities; a detector takes the sizes of the images too and returns what it
finds; a segmenter returns label maps. Beside FILE lies FILE.json with inputs, outputs, label names
and how images are resized and cropped, which is not inside.
"""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export

from gcnet_jax.data.sizes import Size
from gcnet_jax.errors import UserError, import_optional
from gcnet_jax.files import as_path, write_whole
from gcnet_jax.inference.exported import Exported, load_exported
from gcnet_jax.ops.primitives import standard_primitives
from gcnet_jax.stored import read_model_description

PLATFORMS = ('cpu', 'cuda', 'tpu')
# Onnxruntime reads it since 1.18.
OPSET = 21
# Largest difference of a probability, and of its logarithm relative to the largest logarithm.
TOLERANCE = 1e-4
CHECKED_BATCHES = (1, 3)

# What stops a detector in jax2onnx 0.17: scatters under `vmap` (non-maximum suppression),
# searchsorted, and a switch of more than two branches (RoIAlign). In 0.13 also the primitive that
# jnp.stack is. What an ONNX file returns is compared as probabilities, which label maps are not.
NO_ONNX = {
    'detection': 'a detector cannot become an ONNX file: jax2onnx cannot convert its non-maximum '
    'suppression and RoIAlign',
    'segmentation': 'a segmenter cannot become an ONNX file: only classifiers can',
}


def export_jax(
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    *,
    choose: str = 'best',
    size: Size | None = None,
    overwrite: bool = False,
) -> int:
    """Writes a serialized `jax.export` artifact for CPU, CUDA and TPU at once.

    It needs nothing but jax and flatbuffers; jax of the same version or a later one:

        jax.export.deserialize(bytearray(open(FILE, 'rb').read())).call(images)  # and sizes

    Args:
      checkpoint: A workdir, one of its checkpoints, or a ported directory.
      out: The file.
      choose: 'best' or 'newest', where there are several checkpoints.
      size: Size of the images in pixels, one number for a square or height and width; None for the
        network's own. Of a detector that of the canvas that images are laid on: global context
        sees all of it. Of a segmenter that of the resized images.
      overwrite: Replace a file of that name.

    Returns:
      The file's size in bytes.

    Raises:
      CheckpointError: It cannot be read, or holds no classifier.
      UserError: The file exists, or cannot be written.
    """
    out = check_new(out, overwrite)
    exported = load_exported(checkpoint, choose, size)
    exporter = export.export(jax.jit(exported.function), platforms=PLATFORMS)
    data = exporter(*exported.inputs).serialize()
    _write(out, bytes(data), exported)
    return len(data)


def export_onnx(
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    *,
    choose: str = 'best',
    size: Size | None = None,
    overwrite: bool = False,
) -> float:
    """Writes an ONNX file, which computes in float32, after comparing it with the network.

    Args:
      checkpoint, out, choose, size, overwrite: See `export_jax`.

    Returns:
      The largest difference of a probability between onnxruntime and the network.

    Raises:
      CheckpointError: It cannot be read, or holds no classifier.
      ConfigError: jax2onnx or onnxruntime is not installed.
      UserError: It is a detector or a segmenter; the conversion failed or gives other results; the
        file exists, or cannot be written.
    """
    out = check_new(out, overwrite)
    task = read_model_description(checkpoint, choose).task
    if task in NO_ONNX:
        raise UserError(f'{NO_ONNX[task]}; export it as .jaxexport')
    for name in ('jax2onnx', 'onnxruntime'):
        _import(name)
    exported = load_exported(checkpoint, choose, size, dtype='float32', fold=False)
    data = _to_onnx(exported)
    difference = _compare(data, exported)
    _write(out, data, exported)
    return difference


def check_new(out: str | os.PathLike, overwrite: bool) -> Path:
    """Returns the path of a file to write.

    Raises:
      UserError: There is one already and `overwrite` is not set, or its directory is missing.
    """
    out = as_path(out, '--out')
    if out.is_dir() or (out.exists() and not overwrite):
        raise UserError(f'{out} exists; name a new file or replace it with --overwrite')
    if not out.parent.is_dir():
        raise UserError(f'{out.parent} is not a directory; make it first')
    return out


def _to_onnx(exported: Exported) -> bytes:
    jax2onnx, name = _import('jax2onnx'), exported.description.name
    with _quiet('jax2onnx', 'onnx_ir'):
        try:
            model = jax2onnx.to_onnx(
                standard_primitives(exported.function),
                inputs=list(exported.inputs),
                model_name=name,
                opset=OPSET,
                input_names=list(exported.input_notes),
                output_names=list(exported.output_notes),
            )
        except Exception as error:  # What it cannot convert makes errors of any kind.
            reason = ' '.join(str(error).split())[:200] or type(error).__name__
            raise UserError(
                f'jax2onnx cannot convert {name} with jax {jax.__version__} '
                f"({reason}); install what the extra 'onnx' names in an environment of its own "
                "(pip install '.[onnx]'), or export it as .jaxexport"
            ) from error
    # The shapes it notes of intermediate values are partly wrong; onnxruntime warns of each.
    del model.graph.value_info[:]
    return model.SerializeToString()


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Silences what libraries log below an error."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _compare(data: bytes, exported: Exported) -> float:
    """Runs both on the same images; returns the largest difference of a probability.

    Raises:
      UserError: They differ.
    """
    session = _import('onnxruntime').InferenceSession(data, providers=['CPUExecutionProvider'])
    expected_of, shape = jax.jit(exported.function), exported.inputs[0].shape[1:]
    generator = np.random.default_rng(0)
    largest = 0.0
    for batch in CHECKED_BATCHES:
        images = generator.integers(0, 256, (batch, *shape), np.uint8)
        expected = np.asarray(expected_of(images), np.float64)
        (found,) = session.run(None, {'images': images})
        # Of many classes all probabilities are small: their logarithms show what these hide.
        logs = [np.log(np.maximum(values, 1e-30)) for values in (expected, found)]
        relative = np.abs(logs[0] - logs[1]).max() / max(1.0, np.abs(logs[0]).max())
        difference = np.abs(expected - found).max()
        if not max(difference, relative) <= TOLERANCE:  # Also where it is not a number.
            raise UserError(
                f'onnxruntime gives other probabilities than the network (by {difference:.2g}, '
                f'their logarithms by {relative:.2g}, more than {TOLERANCE:g}); nothing was '
                'written: export it as .jaxexport'
            )
        largest = max(largest, float(difference))
    return largest


def _import(name: str) -> Any:
    advice = "install what the extra 'onnx' names, in the directory of gcnet_jax: "
    return import_optional(name, 'an ONNX file', advice + "pip install '.[onnx]'")


def _write(out: Path, data: bytes, exported: Exported) -> None:
    """Writes the file and the JSON beside it, each whole or not at all."""
    text = json.dumps(exported.to_json(), indent=1, ensure_ascii=False) + '\n'
    for path, content in ((Path(f'{out}.json'), text.encode()), (out, data)):
        with write_whole(path, UserError) as partial:
            partial.write_bytes(content)
