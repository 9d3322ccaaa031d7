"""Our ONNX file in onnxruntime and in OpenVINO, as candidates of `benchmarks.inference`.

Both need the extra `onnx`, OpenVINO also requirements-serving.txt. The file takes uint8 images,
normalises them and returns probabilities, which the other candidates leave out. It computes in
float32. Both run it on the CPU only, with a thread for each core, compiled for the size of the
batch.
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks import common
from benchmarks.settings import Setting


def write_onnx(network: str, size: int, file: Path) -> None:
    """Exports a network with random weights for images of this height and width."""
    from gcnet_jax.inference.export import export_onnx
    from gcnet_jax.models import model_entry
    from gcnet_jax.stored import ModelDescription, write_ported

    Setting().start_jax()
    preprocessing = dataclasses.replace(model_entry(network).preprocessing, test_size=size)
    description = ModelDescription(network, {}, preprocessing=preprocessing)
    variables = common.random_variables(common.variable_shapes(description.build(), size))
    stored = file.with_suffix('')
    write_ported(stored, description, variables)
    export_onnx(stored, file)


def random_pixels(batch: int, size: int) -> np.ndarray:
    """Returns noise, uint8 `[batch, size, size, 3]`."""
    return np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), np.uint8)


def _threads() -> int:
    return len(os.sched_getaffinity(0))


def onnxruntime_session(file: Path, batch: int, size: int) -> Callable[[], np.ndarray]:
    """Sets up the file in onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = _threads()
    options.add_free_dimension_override_by_name('batch', batch)
    session = onnxruntime.InferenceSession(file, options, ['CPUExecutionProvider'])
    inputs = {'images': random_pixels(batch, size)}
    return lambda: session.run(None, inputs)[0]


def openvino_model(file: Path, batch: int, size: int) -> Callable[[], np.ndarray]:
    """Sets up the file in OpenVINO."""
    import openvino

    core = openvino.Core()
    model = core.read_model(file)
    model.reshape([batch, size, size, 3])
    # Without the last it computes in bfloat16 where the processor can.
    options = {
        'PERFORMANCE_HINT': 'LATENCY',
        'INFERENCE_NUM_THREADS': _threads(),
        'INFERENCE_PRECISION_HINT': 'f32',
    }
    request = core.compile_model(model, 'CPU', options).create_infer_request()
    inputs = random_pixels(batch, size)
    return lambda: request.infer([inputs])[0]
