"""The command line: `python -m gcnet_jax COMMAND`. Reads flags, calls the package, prints.

Exit codes: 0 all done; 1 an error that one line explains, nothing was done; 2 wrong usage; 3 some
images could not be read, each is named in a line on stderr, and the others were done; 130 Ctrl-C;
141 whoever read the output stopped (`| head`).
"""

import argparse
import contextlib
import difflib
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from gcnet_jax import __version__
from gcnet_jax.commands import (
    attention,
    conversion,
    curves,
    evaluate,
    features,
    networks,
    plan,
    predict,
    prepare,
    train,
)
from gcnet_jax.commands.common import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_PIPE_CLOSED
from gcnet_jax.errors import UserError, make_output_safe, one_line, print_error

# In the order in which the help lists them.
COMMANDS = (
    networks.add_models,
    networks.add_summary,
    prepare.add_prepare,
    train.add_train,
    conversion.add_port,
    predict.add_predict,
    evaluate.add_evaluate,
    features.add_features,
    attention.add_attention,
    curves.add_curves,
    plan.add_plan,
    conversion.add_export,
)
SETTING = re.compile(r'--(no)?config\.')
CACHING_COMMANDS = ('predict', 'evaluate', 'features', 'attention')


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; an error is printed as one line."""
    make_output_safe()
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # Settings of a config are not known here; the command that takes them checks them.
    options.settings = [text for text in rest if SETTING.match(text)]
    takes_settings = options.command in ('plan', 'train')
    if len(rest) > (len(options.settings) if takes_settings else 0):
        unknown = [text for text in rest if not (takes_settings and text in options.settings)]
        options.parser.error(
            f'unrecognized arguments: {" ".join(map(options.parser.with_nearest, unknown))}'
        )
    try:
        with _cache(options.command):
            code = options.run(options) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Python would flush once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE_CLOSED
    except UserError as error:
        print_error(f'gcnet_jax {options.command}', error)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print(f'gcnet_jax {options.command}: interrupted', file=sys.stderr)
        return EXIT_INTERRUPTED


def _cache(command: str) -> contextlib.AbstractContextManager:
    """Lets the commands that run a network keep what they compile, among the user's own files."""
    if command not in CACHING_COMMANDS:
        return contextlib.nullcontext()
    from gcnet_jax.compilation_cache import compilation_cache, user_directory

    return compilation_cache(user_directory())


class _Parser(argparse.ArgumentParser):
    """Names a misspelt flag also where that leaves a required one missing."""

    def parse_known_args(self, args=None, namespace=None):
        self._given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        if 'arguments are required' in message:
            flags = [text for text in self._given if text.startswith('--')]
            unknown = [text for text in flags if not self._knows(text.partition('=')[0])]
            if unknown:
                message = f'{message}; unrecognized: {" ".join(map(self.with_nearest, unknown))}'
        super().error(one_line(message, 2000))

    def with_nearest(self, text: str) -> str:
        """Returns an unknown argument with the flag that was probably meant, if there is one."""
        known = difflib.get_close_matches(text.partition('=')[0], self._option_string_actions, n=1)
        return f'{text} (did you mean {known[0]}?)' if text.startswith('-') and known else text

    def _knows(self, flag: str) -> bool:
        known = (name.startswith(flag) for name in self._option_string_actions)
        return any(known) or SETTING.match(flag) is not None


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog='python -m gcnet_jax', description='Global-context networks in Flax.')
    parser.add_argument('--version', action='version', version=f'gcnet_jax {__version__}')
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    for add_command in COMMANDS:
        add_command(commands)
    for command in commands.choices.values():
        command.set_defaults(parser=command)
        _show_defaults(command)
    return parser


def _show_defaults(command: argparse.ArgumentParser) -> None:
    """Names the default of every flag that has one, where its help does not say it in words."""
    for action in command._actions:
        has_none = any(action.default is nothing for nothing in (None, False, argparse.SUPPRESS))
        if not has_none and 'default' not in (action.help or ''):
            action.help = f'{action.help}; default: %(default)s' if action.help else '%(default)s'


if __name__ == '__main__':
    sys.exit(main())
