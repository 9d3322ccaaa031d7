"""Each context block alone, forward and backward: time and memory from 7x7 to 128x128 positions.

    python -m benchmarks.context [--sides ...] [--channels N] [--batch N] [--json]

The block acts on the output of a bottleneck stage, of `channels` channels. Beside it stand that
stage's convolutions at the same size: the 1x1, 3x3 and 1x1 of one residual block, timed alike. The
global context must grow as the number of positions does, and stay under 5% of the convolutions.
Memory is what XLA allocates beside arguments and results.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import common

BLOCKS = ('GlobalContext', 'SqueezeExcite', 'SimplifiedNonLocal', 'NonLocal')
CONVOLUTIONS = 'convolutions'
SIDES = (7, 14, 28, 56, 128)
# A map of the attention of every position for every other may not be larger, in bytes.
LARGEST_ATTENTION = 2**30


def module(name: str, channels: int) -> Any:
    """Returns a block, or the convolutions of a residual block."""
    import flax.linen as nn

    import gcnet_jax.context as context
    from gcnet_jax.models.layers import Conv

    if name != CONVOLUTIONS:
        return getattr(context, name)()
    inner = channels // 4
    return nn.Sequential([Conv(inner, 1), Conv(inner, 3), Conv(channels, 1)])


def compiled(name: str, batch: int, side: int, channels: int, backward: bool) -> tuple:
    """Compiles a block's forward pass, or forward and backward, and returns its arguments too."""
    import jax

    block = module(name, channels)
    shape = (batch, side, side, channels)
    features = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    shapes = jax.eval_shape(lambda: block.init(jax.random.key(0), features))
    params = common.random_variables(dict(shapes))['params']

    def forward(params, features):
        return block.apply({'params': params}, features)

    def both(params, features, gradient):
        output, pull_back = jax.vjp(forward, params, features)
        return output, pull_back(gradient)

    arguments = (params, features, features) if backward else (params, features)
    arguments = jax.device_put(arguments)
    return jax.jit(both if backward else forward).lower(*arguments).compile(), arguments


def setup(name: str, batch: int, side: int, channels: int, backward: bool) -> Callable:
    """Makes a block ready to be timed."""
    import jax

    function, arguments = compiled(name, batch, side, channels, backward)
    return lambda: jax.block_until_ready(function(*arguments))


def rows_of(side: int, backward: bool, flags: Any) -> list[dict[str, Any]]:
    """Times all blocks at one size."""
    sizes = (flags.batch, side, flags.channels, backward)
    attention = 4 * flags.batch * side**4
    skipped = ['NonLocal'] if attention > LARGEST_ATTENTION else []
    names = [name for name in (CONVOLUTIONS, *flags.blocks) if name not in skipped]
    timings = common.compare(
        {name: functools.partial(setup, name, *sizes) for name in names}, rounds=flags.rounds
    )
    whole = timings[CONVOLUTIONS].median
    rows = []
    for name in (CONVOLUTIONS, *flags.blocks):
        row = {'pass': 'forward+backward' if backward else 'forward', 'positions': f'{side}x{side}'}
        if name in skipped:
            note = f'skipped: its attention maps alone take {attention / 2**30:.3g} GiB'
            figures = dict.fromkeys(('ms', 'spread', 'share of convolutions', 'MiB'))
        else:
            memory = compiled(name, *sizes)[0].memory_analysis().temp_size_in_bytes
            note, timing = '', timings[name]
            figures = {
                'ms': timing.median * 1e3,
                'spread': timing.spread,
                'share of convolutions': timing.median / whole,
                'MiB': memory / 2**20,
            }
        rows.append({**row, 'block': name, **figures, 'note': note})
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Times every block at every size."""
    parser = common.argument_parser(__doc__)
    parser.add_argument('--blocks', nargs='+', default=BLOCKS, choices=BLOCKS)
    parser.add_argument('--sides', nargs='+', type=int, default=SIDES, metavar='PIXELS')
    parser.add_argument('--channels', type=int, default=512)
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--rounds', type=int, default=15, help='runs of each that are timed')
    flags = parser.parse_args(arguments)
    rows = []
    for backward in (False, True):
        for side in flags.sides:
            rows += rows_of(side, backward, flags)
    common.report(rows, as_json=flags.json)


if __name__ == '__main__':
    main()
