"""The command train, which is also train.py: one line for each error, and an exit code.

Exit codes: 0 finished; 1 an error that one line explains; 75 stopped by SIGTERM and saved, so that
the same command continues; 130 interrupted (Ctrl-C), saved as well once a step is done.
"""

import argparse
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from gcnet_jax.errors import UserError, make_output_safe, print_error

FAILED = 1
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, try again.
INTERRUPTED = 130


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


def _train(options: argparse.Namespace) -> int:
    workdir = ['--workdir', options.workdir] if options.workdir else []
    arguments = ['train', '--config', options.config, *workdir, *options.settings]
    return run(arguments, Path(options.config), 'gcnet_jax train')


def run(arguments: Sequence[str], default_config_file: Path, program: str = 'train.py') -> int:
    """Runs `train.py` with its command-line arguments.

    Args:
      arguments: Command line, the program's name first.
      default_config_file: The config where `--config` is not given.
      program: What errors begin with.

    Returns:
      The exit code.
    """
    from gcnet_jax.commands.config_files import default_workdir, read_flags

    make_output_safe()
    try:
        config, name, workdir = read_flags(arguments, default_config_file)
    except UserError as error:
        return _fail(program, error)
    workdir = workdir or default_workdir(name)
    # After the flags are read: a wrong flag should not wait for the imports.
    import jax

    from gcnet_jax.training.loop import train
    from gcnet_jax.training.processes import Interrupted, Preempted, leave

    try:
        train(config, workdir)
        return 0
    except Preempted as stop:
        if jax.process_index() == 0:
            _fail(program, stop)
        return INTERRUPTED if isinstance(stop, Interrupted) else PREEMPTED
    except UserError as error:
        code = _fail(program, error)
    except KeyboardInterrupt:
        print(f'interrupted; the same command {_where(workdir)}', file=sys.stderr)
        code = INTERRUPTED
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        code = FAILED
    return leave(code)


def _where(workdir: Path) -> str:
    from gcnet_jax.stored import step_directories

    steps = step_directories(workdir)
    return f'continues from step {max(steps)}' if steps else 'starts again, nothing was saved yet'


def _fail(program: str, error: UserError) -> int:
    print_error(program, error)
    return FAILED
