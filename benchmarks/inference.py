"""Inference, ours against others': images/s and memory of one network in each of its homes.

    python -m benchmarks.inference [--networks ...] [--batches ...] [--candidates ...]
        [--precision float32|tf32|bfloat16] [--device cpu|gpu] [--rounds N] [--json]

Ours is what `gcnet_jax.Classifier` runs: BatchNorm folded into the convolutions, jitted. PyTorch's
are timm's and torchvision's networks in channels_last under `torch.inference_mode`, as they are and
through `torch.compile`; for bfloat16 their weights and images are converted beforehand. On a CPU
there are also onnxruntime and OpenVINO, see `benchmarks.serving`. All weights are random, all
images noise.
"""

import argparse
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common, serving, settings
from benchmarks.settings import Setting

NETWORKS = ('resnet50', 'gc_resnet50', 'gcresnet50t', 'gcresnext50ts')
CANDIDATES = ('gcnet_jax', 'torch eager', 'torch.compile')
RUNTIMES = dict(
    zip(settings.RUNTIMES, (serving.onnxruntime_session, serving.openvino_model), strict=True)
)


def images(batch: int, size: int) -> np.ndarray:
    """Returns noise, `[batch, size, size, 3]`."""
    return np.random.default_rng(0).normal(size=(batch, size, size, 3)).astype(np.float32)


def ours(network: str, batch: int, size: int, setting: Setting) -> Callable:
    """Sets up the folded and jitted network."""
    import jax

    from gcnet_jax.inference.fold import fold_batch_norms, folded_batch_norm
    from gcnet_jax.models import create_model

    setting.start_jax()
    model = create_model(network, dtype=setting.dtype)
    inputs = jax.numpy.asarray(images(batch, size), setting.dtype)
    variables = common.random_variables(common.variable_shapes(model, size))
    variables = jax.device_put(fold_batch_norms(model, variables, inputs, train=False))

    @jax.jit
    def compute(variables, inputs):
        with folded_batch_norm():
            return model.apply(variables, inputs, train=False)

    return lambda: compute(variables, inputs).block_until_ready()


def torch_peer(
    network: str, batch: int, size: int, setting: Setting, *, compiled: bool
) -> Callable:
    """Sets up the same network in PyTorch."""
    import torch

    from benchmarks.torch_peers import build

    place = {'device': setting.start_torch(), 'dtype': getattr(torch, setting.dtype)}
    model = build(network).eval().to(memory_format=torch.channels_last, **place)
    inputs = torch.from_numpy(images(batch, size)).permute(0, 3, 1, 2).to(**place)
    run = torch.compile(model) if compiled else model

    def compute():
        with torch.inference_mode():
            logits = run(inputs)
        setting.wait_for_torch()
        return logits

    compute()  # Compiles.
    return compute


def setups(
    network: str, batch: int, size: int, setting: Setting, candidates: Iterable[str], file: Path
) -> dict[str, Callable]:
    """Returns what makes each candidate ready; `file` is the network as an ONNX file."""
    shared = {'network': network, 'batch': batch, 'size': size, 'setting': setting}
    known = {
        'gcnet_jax': functools.partial(ours, **shared),
        'torch eager': functools.partial(torch_peer, compiled=False, **shared),
        'torch.compile': functools.partial(torch_peer, compiled=True, **shared),
        **{name: functools.partial(setup, file, batch, size) for name, setup in RUNTIMES.items()},
    }
    return {name: known[name] for name in candidates}


def rows_of(network: str, setting: Setting, flags: argparse.Namespace) -> list[dict[str, Any]]:
    """Times a network at every batch size."""
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, f'{network}.onnx')
        if not RUNTIMES.keys().isdisjoint(flags.candidates):
            serving.write_onnx(network, flags.size, file)
        for batch in flags.batches:
            candidates = setups(network, batch, flags.size, setting, flags.candidates, file)
            timings = common.compare(candidates, rounds=flags.rounds, alone=setting.device == 'gpu')
            columns = {'network': network, **dataclasses.asdict(setting), 'batch': batch}
            rows += common.throughput_rows(columns, timings, batch, 'torch eager')
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Times every network at every batch size."""
    # Not for the processes of the others, whose memory is measured.
    from gcnet_jax.models import list_models

    parser = common.argument_parser(__doc__)
    parser.add_argument(
        '--networks', nargs='+', default=NETWORKS, choices=list_models(), metavar='NAME'
    )
    parser.add_argument('--batches', nargs='+', type=int, default=(1, 8, 32), metavar='N')
    parser.add_argument(
        '--candidates', nargs='+', default=CANDIDATES, choices=(*CANDIDATES, *RUNTIMES)
    )
    parser.add_argument('--size', type=int, default=224, help='height and width in pixels')
    parser.add_argument('--rounds', type=int, default=10, help='runs of each that are timed')
    settings.add_flags(parser)
    flags = parser.parse_args(arguments)
    setting = settings.read_flags(parser, flags)
    rows = [row for network in flags.networks for row in rows_of(network, setting, flags)]
    common.report(rows, as_json=flags.json)


if __name__ == '__main__':
    main()
