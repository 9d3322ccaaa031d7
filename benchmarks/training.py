"""A training step, ours against plain Flax's and PyTorch's: images/s and memory.

    python -m benchmarks.training [--cases ...] [--rounds N] [--json]

A step is forward, backward and SGD with momentum in float32. Ours is the package's own step, with
the normalisation of the uint8 images and all metrics in it; plain Flax's is that of
`benchmarks/plain_flax.py`; PyTorch's networks are timm's and torchvision's in channels_last.
"""

import functools
from collections.abc import Callable

import numpy as np

from benchmarks import common

# Network, batch size and height and width in pixels. 'gccnn' on 8 pixels is the digits' network.
CASES = {
    'resnet50': ('resnet50', 16, 224),
    'gc_resnet50': ('gc_resnet50', 16, 224),
    'gc_resnet20': ('gc_resnet20', 128, 32),
    'digits': ('gccnn', 64, 8),
}
CANDIDATES = ('gcnet_jax', 'plain Flax', 'torch')


def batch_of(batch: int, size: int) -> dict[str, np.ndarray]:
    """Returns noise and labels below 10."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (batch, size, size, 3), np.uint8)
    return {'image': images, 'label': generator.integers(0, 10, batch).astype(np.int32)}


def ours(network: str, batch: int, size: int) -> Callable:
    """Sets up the package's training step on one device."""
    import jax
    import jax.numpy as jnp

    from gcnet_jax.models import create_model, model_entry
    from gcnet_jax.tasks import Classification

    model, preprocessing = create_model(network), model_entry(network).preprocessing
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, size, size, 3)), train=False)
    )
    variables = common.random_variables(dict(shapes))
    classes = variables['params']['classifier']['bias'].size
    task = Classification(classes, preprocessing.mean, preprocessing.std)
    return common.training_step(model, task, variables, batch_of(batch, size), learning_rate=0.01)


def plain_flax(network: str, batch: int, size: int) -> Callable:
    """Sets up the step of a plain Flax network."""
    import jax
    import jax.numpy as jnp
    import optax

    from benchmarks.plain_flax import NETWORKS

    model, optimizer = NETWORKS[network], optax.sgd(0.01, momentum=0.9)
    inputs = jax.device_put(batch_of(batch, size))
    images = inputs['image'].astype(jnp.float32) / 127.5 - 1
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    variables = jax.device_put(common.random_variables(dict(shapes)))
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


def torch_peer(network: str, batch: int, size: int) -> Callable:
    """Sets up the step of the same network in PyTorch."""
    import torch

    from benchmarks.torch_peers import build

    model = build(network).train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    inputs = batch_of(batch, size)
    images = torch.from_numpy(inputs['image']).permute(0, 3, 1, 2).float() / 127.5 - 1
    labels = torch.from_numpy(inputs['label']).long()

    def run():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return run


def main(arguments: list[str] | None = None) -> None:
    """Times a step of every case."""
    parser = common.argument_parser(__doc__)
    parser.add_argument('--cases', nargs='+', default=tuple(CASES), choices=CASES)
    parser.add_argument('--candidates', nargs='+', default=CANDIDATES, choices=CANDIDATES)
    parser.add_argument('--batch', type=int, help='batch size, instead of what the case has')
    parser.add_argument('--size', type=int, help='pixels, instead of what the case has')
    parser.add_argument('--rounds', type=int, default=7, help='steps of each that are timed')
    flags = parser.parse_args(arguments)
    setups = {'gcnet_jax': ours, 'plain Flax': plain_flax, 'torch': torch_peer}
    rows = []
    for case in flags.cases:
        network, batch, size = CASES[case]
        batch, size = flags.batch or batch, flags.size or size
        candidates = {
            name: functools.partial(setups[name], network, batch, size) for name in flags.candidates
        }
        timings = common.compare(candidates, rounds=flags.rounds)
        columns = {'network': network, 'pixels': size, 'batch': batch}
        rows += common.throughput_rows(columns, timings, batch, 'torch')
    common.report(rows, as_json=flags.json)


if __name__ == '__main__':
    main()
