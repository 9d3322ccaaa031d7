"""Each context block alone, forward and backward: time and memory from 7x7 to 128x128 positions.

    python -m benchmarks.context [--maps 28x512 ...] [--batch N] [--json]

A map of 28x512 has 28x28 positions and 512 channels. The block acts on the output of a bottleneck.
Beside it stand the convolutions of one such residual block at the same size, timed alike, and of a
whole stage of them: as many as ResNet-50 has at that width. The global context must grow as the
number of positions does, and stay under 5% of its stage's convolutions. Memory is what XLA
allocates beside arguments and results.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import common

BLOCKS = ('GlobalContext', 'SqueezeExcite', 'SimplifiedNonLocal', 'NonLocal')
CONVOLUTIONS = 'convolutions'
FIGURES = ('ms', 'spread', 'of a block', 'of a stage', 'MiB')
# One width for how it grows, and what ResNet-50 has at 224 pixels.
MAPS = ('7x512', '14x512', '28x512', '56x512', '128x512', '56x256', '14x1024', '7x2048')
STAGE_SIZES = {256: 3, 512: 4, 1024: 6, 2048: 3}
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


def rows_of(side: int, channels: int, backward: bool, flags: Any) -> list[dict[str, Any]]:
    """Times all blocks at one size."""
    sizes = (flags.batch, side, channels, backward)
    attention = 4 * flags.batch * side**4
    skipped = ['NonLocal'] if attention > LARGEST_ATTENTION else []
    names = [name for name in (CONVOLUTIONS, *flags.blocks) if name not in skipped]
    timings = common.compare(
        {name: functools.partial(setup, name, *sizes) for name in names}, rounds=flags.rounds
    )
    whole = timings[CONVOLUTIONS].median
    rows = []
    for name in (CONVOLUTIONS, *flags.blocks):
        row = {'pass': 'forward+backward' if backward else 'forward'}
        row |= {'positions': f'{side}x{side}', 'channels': channels}
        if name in skipped:
            note = f'skipped: its attention maps alone take {attention / 2**30:.3g} GiB'
            figures = dict.fromkeys(FIGURES)
        else:
            memory = compiled(name, *sizes)[0].memory_analysis().temp_size_in_bytes
            note, timing = '', timings[name]
            figures = {
                'ms': timing.median * 1e3,
                'spread': timing.spread,
                'of a block': timing.median / whole,
                'of a stage': timing.median / whole / STAGE_SIZES.get(channels, 1),
                'MiB': memory / 2**20,
            }
        rows.append({**row, 'block': name, **figures, 'note': note})
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Times every block at every size."""
    parser = common.argument_parser(__doc__)
    parser.add_argument('--blocks', nargs='+', default=BLOCKS, choices=BLOCKS)
    parser.add_argument('--maps', nargs='+', default=MAPS, metavar='SIDExCHANNELS')
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--rounds', type=int, default=15, help='runs of each that are timed')
    flags = parser.parse_args(arguments)
    rows = []
    for backward in (False, True):
        for name in flags.maps:
            side, channels = map(int, name.split('x'))
            rows += rows_of(side, channels, backward, flags)
    common.report(rows, as_json=flags.json)


if __name__ == '__main__':
    main()
