"""A training step, ours against plain Flax's and PyTorch's: images/s and memory.

    python -m benchmarks.training [--cases ...] [--batches ...] [--candidates ...]
        [--precision float32|tf32|bfloat16] [--device cpu|gpu] [--rounds N] [--json]

A step is forward, backward and SGD with momentum. Ours is the package's own step, with the
normalisation of the uint8 images and all metrics in it; plain Flax's is that of
`benchmarks/plain_flax.py`; PyTorch's networks are timm's and torchvision's in channels_last, as
they are and through `torch.compile`. In bfloat16 all keep their weights in float32, PyTorch by
autocast.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import common, settings
from benchmarks.settings import Setting

# Network, batch size and height and width in pixels. 'gccnn' on 8 pixels is the digits' network.
CASES = {
    'resnet50': ('resnet50', 16, 224),
    'gc_resnet50': ('gc_resnet50', 16, 224),
    'gcresnet50t': ('gcresnet50t', 16, 224),
    'gc_resnet20': ('gc_resnet20', 128, 32),
    'digits': ('gccnn', 64, 8),
}
CANDIDATES = ('gcnet_jax', 'plain Flax', 'torch', 'torch.compile')
# timm's has no plain Flax network beside it.
NOT_PLAIN = ('gcresnet50t',)


def batch_of(batch: int, size: int) -> dict[str, np.ndarray]:
    """Returns noise and labels below 10."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (batch, size, size, 3), np.uint8)
    return {'image': images, 'label': generator.integers(0, 10, batch).astype(np.int32)}


def ours(network: str, batch: int, size: int, setting: Setting) -> Callable:
    """Sets up the package's training step on one device."""
    from gcnet_jax.models import create_model, model_entry
    from gcnet_jax.tasks import Classification

    setting.start_jax()
    preprocessing = model_entry(network).preprocessing
    model = create_model(network, dtype=setting.dtype)
    variables = common.random_variables(common.variable_shapes(model, size))
    classes = variables['params']['classifier']['bias'].size
    task = Classification(classes, preprocessing.mean, preprocessing.std)
    return common.training_step(model, task, variables, batch_of(batch, size), learning_rate=0.01)


def plain_flax(network: str, batch: int, size: int, setting: Setting) -> Callable:
    """Sets up the step of a plain Flax network."""
    import jax
    import jax.numpy as jnp
    import optax

    from benchmarks.plain_flax import NETWORKS

    setting.start_jax()
    model = NETWORKS[network].clone(dtype=jnp.dtype(setting.dtype))
    optimizer = optax.sgd(0.01, momentum=0.9)
    inputs = jax.device_put(batch_of(batch, size))
    images = inputs['image'].astype(jnp.float32) / 127.5 - 1
    variables = jax.device_put(common.random_variables(common.variable_shapes(model, size)))
    params, batch_stats = variables['params'], variables['batch_stats']
    state = (params, batch_stats, optimizer.init(params))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, images, labels):
        params, batch_stats, opt_state = state

        def loss(params):
            logits, updated = model.apply(
                {'params': params, 'batch_stats': batch_stats},
                images,
                train=True,
                mutable=['batch_stats'],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updated['batch_stats']

        (value, batch_stats), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), batch_stats, opt_state), value

    def run():
        nonlocal state
        state, value = step(state, images, inputs['label'])
        value.block_until_ready()

    return run


def torch_peer(
    network: str, batch: int, size: int, setting: Setting, *, compiled: bool
) -> Callable:
    """Sets up the step of the same network in PyTorch."""
    import torch

    from benchmarks.torch_peers import build

    device = setting.start_torch()
    model = build(network).train().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    inputs = batch_of(batch, size)
    images = torch.from_numpy(inputs['image']).permute(0, 3, 1, 2).to(device).float() / 127.5 - 1
    labels = torch.from_numpy(inputs['label']).long().to(device)
    narrow = {'dtype': torch.bfloat16, 'enabled': setting.dtype == 'bfloat16'}
    forward = torch.compile(model) if compiled else model

    def run():
        optimizer.zero_grad()
        with torch.autocast(device.type, **narrow):
            loss = torch.nn.functional.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()
        setting.wait_for_torch()

    return run


SETUPS = {
    'gcnet_jax': ours,
    'plain Flax': plain_flax,
    'torch': functools.partial(torch_peer, compiled=False),
    'torch.compile': functools.partial(torch_peer, compiled=True),
}


def rows_of(
    case: str, batch: int | None, setting: Setting, flags: argparse.Namespace
) -> list[dict[str, Any]]:
    """Times a step of one case."""
    network, own_batch, own_size = CASES[case]
    batch, size = batch or own_batch, flags.size or own_size
    candidates = {
        name: functools.partial(SETUPS[name], network, batch, size, setting)
        for name in flags.candidates
        if name != 'plain Flax' or network not in NOT_PLAIN
    }
    timings = common.compare(candidates, rounds=flags.rounds, alone=setting.device == 'gpu')
    columns = {'network': network, 'pixels': size, **dataclasses.asdict(setting), 'batch': batch}
    return common.throughput_rows(columns, timings, batch, 'torch')


def main(arguments: list[str] | None = None) -> None:
    """Times a step of every case."""
    parser = common.argument_parser(__doc__)
    parser.add_argument('--cases', nargs='+', default=tuple(CASES), choices=CASES)
    parser.add_argument('--candidates', nargs='+', default=CANDIDATES, choices=CANDIDATES)
    parser.add_argument(
        '--batches',
        nargs='+',
        type=int,
        default=(None,),
        metavar='N',
        help='in place of what the case has',
    )
    parser.add_argument('--size', type=int, help='pixels, in place of what the case has')
    parser.add_argument('--rounds', type=int, default=7, help='steps of each that are timed')
    settings.add_flags(parser)
    flags = parser.parse_args(arguments)
    setting = settings.read_flags(parser, flags)
    pairs = [(case, batch) for case in flags.cases for batch in flags.batches]
    rows = [row for case, batch in pairs for row in rows_of(case, batch, setting, flags)]
    common.report(rows, as_json=flags.json)


if __name__ == '__main__':
    main()
