"""Commands around a training run: prepare, train, curves, plan."""

import argparse
import json
import shlex
import sys
from pathlib import Path

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


def add_train(commands: argparse._SubParsersAction) -> None:
    train = commands.add_parser(
        'train',
        help='train a network, or continue a run',
        epilog='Settings: --config.GROUP.KEY=VALUE. Exit codes: 0 finished, 1 failed, 75 stopped '
        'by SIGTERM and saved, 130 by Ctrl-C and saved; the same command continues a run.',
    )
    train.add_argument(
        'config',
        nargs='?',
        default='digits',
        metavar='CONFIG[:VARIANT]',
        help='a config file, or the name of one that comes with the package, such as folder',
    )
    train.add_argument('--workdir', metavar='DIR', help='of the run; default: runs/CONFIG')
    train.set_defaults(run=_train)


def add_curves(commands: argparse._SubParsersAction) -> None:
    curves = commands.add_parser('curves', help='draw loss and accuracy of one or more runs')
    curves.add_argument('runs', nargs='+', metavar='RUN', help='a working directory of train.py')
    curves.add_argument('--out', required=True, metavar='PNG', help='the picture')
    curves.add_argument('--by', choices=('epoch', 'step'), default='epoch', help='horizontal axis')
    curves.set_defaults(run=_curves)


def add_plan(commands: argparse._SubParsersAction) -> None:
    plan = commands.add_parser(
        'plan',
        help='compile a training step for TPUs that are not here: does it fit, how fast at most',
        epilog='Settings are given as for train.py: --config.GROUP.KEY=VALUE.',
    )
    plan.add_argument('--config', required=True, metavar='FILE[:VARIANT]', help='as for train.py')
    plan.add_argument(
        '--topology',
        required=True,
        action='append',
        help='such as v5e:1x1, v5e:16x16, v6e:4x4 or v5p:2x2x4; can be given several times',
    )
    plan.add_argument(
        '--batch-per-chip', type=int, help="images of a step for each chip; default: the config's"
    )
    plan.add_argument(
        '--largest-batch', action='store_true', help='find the largest batch a chip that fits'
    )
    plan.add_argument('--json', action='store_true', help='print JSON')
    plan.set_defaults(run=_plan)


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


def _train(options: argparse.Namespace) -> int:
    from gcnet_jax.training.command import run

    workdir = ['--workdir', options.workdir] if options.workdir else []
    arguments = ['train', '--config', options.config, *workdir, *options.settings]
    return run(arguments, Path(options.config), 'gcnet_jax train')


def _curves(options: argparse.Namespace) -> None:
    from gcnet_jax.inference.curves import write_curves

    print_lines([f'wrote {write_curves(options.runs, options.out, by=options.by)}'])


def _plan(options: argparse.Namespace) -> None:
    from gcnet_jax import planning
    from gcnet_jax.training.command import read_flags

    arguments = ['plan', '--config', options.config, *options.settings]
    config, _, _ = read_flags(arguments, Path(options.config))
    planning.prepare_process()

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    plans = planning.make_plans(
        config,
        options.topology,
        options.batch_per_chip,
        find_largest=options.largest_batch,
        tell=lambda plan: say(planning.format_progress(plan)),
        compiling=planning.announcer(say),
    )
    if options.json:
        print(json.dumps([planning.plan_to_dict(plan) for plan in plans], indent=2))
    else:
        print(planning.format_plans(plans))
