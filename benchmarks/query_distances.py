"""How alike the maps of all queries are in the non-local blocks of a network that was trained.

    python -m benchmarks.query_distances RUN --data NAME [--split SPLIT] [--images N] [--json]

The table of the paper's section 3.2 over the first images of a data set's split;
`gcnet_jax.analysis.query_distances` says what is measured. For image files, `gcnet_jax attention`
prints the same and draws the maps.
"""

import contextlib
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import common


def distances(
    run: str, data: str, split: str | None, data_dir: str | None, images: int
) -> dict[str, Any]:
    """Returns the distances of each block, by its path; see `analysis.query_distances`.

    Raises:
      UserError: The run or the data set cannot be read, or the network has no non-local block.
    """
    from gcnet_jax.analysis.query_distances import query_distances
    from gcnet_jax.data.loader import evaluation_batches
    from gcnet_jax.data.on_device import normalize
    from gcnet_jax.data.sources import load_source
    from gcnet_jax.stored import load_variables

    description, variables = load_variables(run)
    taken = description.preprocessing
    batches = evaluation_batches(
        load_source(data, split, data_dir),
        global_batch_size=images,
        image_size=taken.test_size,
        crop_fraction=taken.crop_fraction,
        interpolation=taken.interpolation,
    )
    with contextlib.closing(batches):
        batch = next(batches)
    pixels = normalize(batch['image'][batch['mask']], taken.mean, taken.std)
    return query_distances(description.build(), variables, pixels, train=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    from gcnet_jax.errors import UserError, print_error

    parser = common.argument_parser(__doc__)
    parser.add_argument('run', metavar='RUN', help='a working directory of train.py')
    parser.add_argument('--data', required=True, help='what config.data.name says')
    parser.add_argument('--split', help='default: test, or validation where there is none')
    parser.add_argument('--data-dir', help="where data sets live; default: TFDS's directory")
    parser.add_argument('--images', type=int, default=128, help='number of images')
    flags = parser.parse_args(arguments)
    if flags.images < 1:
        parser.error(f'--images is {flags.images}; it must be 1 or more')
    try:
        found = distances(flags.run, flags.data, flags.split, flags.data_dir, flags.images)
    except UserError as error:
        print_error('benchmarks.query_distances', error)
        return 1
    rows = [
        {
            'block': path,
            'input': row.input,
            'output': row.output,
            'attention': row.attention,
            'attention (JS)': row.attention_divergence,
        }
        for path, row in found.items()
    ]
    common.report(rows, as_json=flags.json)
    return 0


if __name__ == '__main__':
    sys.exit(main())
