"""The command curves: pictures of the loss and the task's metric."""

import argparse

from gcnet_jax.commands.common import print_lines


def add_curves(commands: argparse._SubParsersAction) -> None:
    curves = commands.add_parser('curves', help='draw loss and accuracy or mAP of one or more runs')
    curves.add_argument('runs', nargs='+', metavar='RUN', help='a working directory of train.py')
    curves.add_argument('--out', required=True, metavar='PNG', help='the picture')
    curves.add_argument('--by', choices=('epoch', 'step'), default='epoch', help='horizontal axis')
    curves.set_defaults(run=_curves)


def _curves(options: argparse.Namespace) -> None:
    from gcnet_jax.analysis.curves import write_curves

    print_lines([f'wrote {write_curves(options.runs, options.out, by=options.by)}'])
