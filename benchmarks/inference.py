"""Inference, ours against PyTorch's: images/s and memory of one network in each of its homes.

    python -m benchmarks.inference [--networks ...] [--batches ...] [--rounds N] [--json]

Ours is what `gcnet_jax.Classifier` runs: BatchNorm folded into the convolutions, jitted. PyTorch's
are timm's and torchvision's networks in channels_last under `torch.inference_mode`, as they are and
through `torch.compile`. All weights are random, all images float32 noise.
"""

import functools
from collections.abc import Callable

import numpy as np

from benchmarks import common

NETWORKS = ('resnet50', 'gc_resnet50', 'gcresnet50t', 'gcresnext50ts')
CANDIDATES = ('gcnet_jax', 'torch eager', 'torch.compile')


def images(batch: int, size: int) -> np.ndarray:
    """Returns noise, `[batch, size, size, 3]`."""
    return np.random.default_rng(0).normal(size=(batch, size, size, 3)).astype(np.float32)


def ours(network: str, batch: int, size: int) -> Callable:
    """Sets up the folded and jitted network."""
    import jax

    from gcnet_jax.inference.fold import fold_batch_norms, folded_batch_norm
    from gcnet_jax.models import create_model

    model, inputs = create_model(network), jax.numpy.asarray(images(batch, size))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), inputs, train=False))
    variables = common.random_variables(dict(shapes))
    variables = jax.device_put(fold_batch_norms(model, variables, inputs, train=False))

    @jax.jit
    def compute(variables, inputs):
        with folded_batch_norm():
            return model.apply(variables, inputs, train=False)

    return lambda: compute(variables, inputs).block_until_ready()


def torch_peer(network: str, batch: int, size: int, *, compiled: bool) -> Callable:
    """Sets up the same network in PyTorch."""
    import torch

    from benchmarks.torch_peers import build

    model = build(network).eval().to(memory_format=torch.channels_last)
    inputs = torch.from_numpy(images(batch, size)).permute(0, 3, 1, 2)
    run = torch.compile(model) if compiled else model

    def compute():
        with torch.inference_mode():
            return run(inputs)

    compute()  # Compiles.
    return compute


def setups(network: str, batch: int, size: int, candidates: list[str]) -> dict[str, Callable]:
    """Returns what makes each candidate ready."""
    shared = {'network': network, 'batch': batch, 'size': size}
    known = {
        'gcnet_jax': functools.partial(ours, **shared),
        'torch eager': functools.partial(torch_peer, compiled=False, **shared),
        'torch.compile': functools.partial(torch_peer, compiled=True, **shared),
    }
    return {name: known[name] for name in candidates}


def main(arguments: list[str] | None = None) -> None:
    """Times every network at every batch size."""
    # Not for the processes of the others, whose memory is measured.
    from gcnet_jax.models import list_models

    parser = common.argument_parser(__doc__)
    parser.add_argument(
        '--networks', nargs='+', default=NETWORKS, choices=list_models(), metavar='NAME'
    )
    parser.add_argument('--batches', nargs='+', type=int, default=(1, 8, 32), metavar='N')
    parser.add_argument('--candidates', nargs='+', default=CANDIDATES, choices=CANDIDATES)
    parser.add_argument('--size', type=int, default=224, help='height and width in pixels')
    parser.add_argument('--rounds', type=int, default=10, help='runs of each that are timed')
    flags = parser.parse_args(arguments)
    rows = []
    for network in flags.networks:
        for batch in flags.batches:
            candidates = setups(network, batch, flags.size, flags.candidates)
            timings = common.compare(candidates, rounds=flags.rounds)
            rows += common.throughput_rows(
                {'network': network, 'batch': batch}, timings, batch, 'torch eager'
            )
    common.report(rows, as_json=flags.json)


if __name__ == '__main__':
    main()
