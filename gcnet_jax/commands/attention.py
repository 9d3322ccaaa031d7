"""The command attention: pictures of what each context block of a network looks at."""

import argparse

from gcnet_jax.commands.common import image_size, report_choice
from gcnet_jax.commands.images import IMAGES_HELP, ImageStream, check_directories
from gcnet_jax.errors import one_line


def add_attention(commands: argparse._SubParsersAction) -> None:
    attention = commands.add_parser(
        'attention', help='draw what each context block of a network looks at'
    )
    attention.add_argument('images', nargs='+', metavar='IMAGE', help=IMAGES_HELP)
    attention.add_argument('--checkpoint', required=True, metavar='DIR', help='trained or ported')
    attention.add_argument('--out', required=True, metavar='DIR', help='where the pictures go')
    attention.add_argument(
        '--choose', choices=('best', 'newest'), default='best', help='of several checkpoints'
    )
    attention.add_argument(
        '--all-blocks', action='store_true', help='every block, not the last one of each stage'
    )
    attention.add_argument(
        '--size',
        type=image_size,
        metavar='PIXELS',
        help='that the network gets, such as 224 or 96x160 (height first); default: its own; more: '
        'finer maps; for a detector or a segmenter, limits of the short side, or of both sides',
    )
    attention.add_argument(
        '--query',
        action='append',
        type=_fractions,
        metavar='ROW,COLUMN',
        help='of non-local blocks: a position, as parts of the height and width; several times',
    )
    attention.set_defaults(run=_attention)


def _fractions(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(','))


def _attention(options: argparse.Namespace) -> int:
    from gcnet_jax.analysis.attention_pictures import mean_distances, write_pictures
    from gcnet_jax.analysis.pictures import QUERIES
    from gcnet_jax.analysis.query_distances import format_distances
    from gcnet_jax.inference.images import LeftOut

    check_directories(options.images, {'--out': options.out})
    report_choice(options.checkpoint, options.choose)
    left_out = LeftOut()
    results = write_pictures(
        options.checkpoint,
        options.images,
        options.out,
        choose=options.choose,
        size=options.size,
        all_blocks=options.all_blocks,
        queries=options.query or QUERIES,
        left_out=left_out,
    )
    stream, distances = ImageStream(options.command, results, left_out), []
    for path, drawn in stream:
        distances.append(drawn.distances)
        parts = (path, drawn.prediction, *drawn.files)
        print(': '.join(one_line(part) for part in parts if part))
    if means := mean_distances(distances):
        print(format_distances(means, stream.done))
    return stream.exit_code()
