"""The command prepare: a data set of a folder of images."""

import argparse
import shlex
import sys

from gcnet_jax.commands.common import print_lines
from gcnet_jax.errors import one_line


def add_prepare(commands: argparse._SubParsersAction) -> None:
    prepare = commands.add_parser(
        'prepare', help='make a data set of a folder of images, one folder a class'
    )
    prepare.add_argument('directory', help='holds train/CLASS/IMAGE (and val, test) or CLASS/IMAGE')
    prepare.add_argument('--name', required=True, help='what config.data.name will say')
    prepare.add_argument('--data-dir', help="where data sets live; default: TFDS's directory")
    prepare.add_argument(
        '--test-fraction',
        type=float,
        default=0.1,
        help='share of each class for the split test, where the folder has no splits',
    )
    prepare.add_argument('--seed', type=int, default=0, help='of that draw')
    prepare.add_argument(
        '--skip-damaged', action='store_true', help='leave damaged images out, and list them'
    )
    prepare.add_argument('--overwrite', action='store_true', help='replace a set of that name')
    prepare.set_defaults(run=_prepare)


def _prepare(options: argparse.Namespace) -> None:
    from gcnet_jax.data.folder import prepare_folder

    prepared = prepare_folder(
        options.directory,
        options.name,
        options.data_dir,
        test_fraction=options.test_fraction,
        seed=options.seed,
        skip_damaged=options.skip_damaged,
        overwrite=options.overwrite,
        progress=sys.stderr.isatty(),
    )
    for problem in prepared.damaged:
        print_lines([f'left out: {problem}'])
    for folder in prepared.empty:
        print_lines([f'no class: {folder} (an empty folder)'])
    splits = ', '.join(f'{split} {size:,}' for split, size in prepared.split_sizes.items())
    print(f'{prepared.name}: {len(prepared.label_names)} classes, images: {splits}')
    print(f'in {one_line(prepared.path)}')
    settings = [
        prepared.train_settings()[0],
        *([f'data.data_dir={options.data_dir}'] if options.data_dir else []),
        *prepared.train_settings()[1:],
    ]
    flags = ' '.join(shlex.quote(f'--config.{setting}') for setting in settings)
    print(f'train on it: python -m gcnet_jax train folder {flags}')
