"""The command prepare: a data set of a folder of images."""

import argparse
import shlex
import sys
from typing import TYPE_CHECKING

from gcnet_jax.commands.common import print_lines
from gcnet_jax.errors import one_line

if TYPE_CHECKING:
    from gcnet_jax.data.folder import PreparedFolder


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
    command = _training_command(prepared, 'folder', options.data_dir, f'runs/{prepared.name}')
    print(f'train on it: {command}')
    command = _training_command(
        prepared, 'finetune', options.data_dir, f'runs/{prepared.name}_tuned', 'DIR'
    )
    print(f'or fine-tune a trained network: {command}')


def _training_command(
    prepared: 'PreparedFolder',
    config: str,
    data_dir: str | None,
    workdir: str,
    init_from: str | None = None,
) -> str:
    """Returns the command that trains on a set by a config that comes with the package."""
    from gcnet_jax.commands.config_files import load_config

    name, *others = prepared.train_settings(load_config(config).training.batch_size)
    settings = [
        *([f'training.init_from={init_from}'] if init_from else []),
        name,
        *([f'data.data_dir={data_dir}'] if data_dir else []),
        *others,
    ]
    flags = ' '.join(shlex.quote(f'--config.{setting}') for setting in settings)
    return f'python -m gcnet_jax train {config} {flags} --workdir {workdir}'
