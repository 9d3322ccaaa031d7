"""The command plan: a training step compiled for TPUs that are not here."""

import argparse
import json
import sys
from pathlib import Path


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


def _plan(options: argparse.Namespace) -> None:
    from gcnet_jax import planning
    from gcnet_jax.commands.config_files import read_flags

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
