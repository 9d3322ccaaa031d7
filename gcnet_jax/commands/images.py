"""What the commands share that run a network on images: predict, evaluate, features, attention."""

import argparse
import contextlib
import json
import sys
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gcnet_jax.commands.common import EXIT_ERROR, EXIT_SOME_IMAGES_FAILED, report_choice
from gcnet_jax.errors import UserError, one_line, print_error

if TYPE_CHECKING:
    from gcnet_jax.inference.images import LeftOut

IMAGES_HELP = (
    'images, and folders of them; exit code 3: some could not be read (named on stderr), the '
    'others were done'
)


def add_checkpoint_flags(command: argparse.ArgumentParser) -> None:
    """Adds the flags that `load_network` reads."""
    command.add_argument(
        '--checkpoint', required=True, help='a workdir of train.py, a checkpoint or a ported one'
    )
    command.add_argument(
        '--choose', choices=('best', 'newest'), default='best', help='of several checkpoints'
    )
    command.add_argument(
        '--batch-size',
        type=int,
        help='images at once; default: 32, or 1 for a detector or a segmenter',
    )
    command.add_argument(
        '--dtype', choices=('float32', 'bfloat16'), help='of the computation; default: as trained'
    )
    command.add_argument('--weights', choices=('int8',), help='keep kernels as 8-bit integers')


def load_network(options: argparse.Namespace, **more: Any) -> Any:
    """Loads the checkpoint that the flags name: a Classifier, a Detector or a Segmenter."""
    from gcnet_jax.inference.load import load_network

    # Pillow warns of damaged files, which have a line of ours.
    warnings.filterwarnings('ignore', module=r'PIL\.')
    report_choice(options.checkpoint, options.choose)
    return load_network(
        options.checkpoint,
        choose=options.choose,
        batch_size=options.batch_size,
        dtype=options.dtype,
        weights=options.weights,
        **more,
    )


def check_directories(images: Iterable[str], directories: Mapping[str, str | None]) -> None:
    """Refuses directories for output where a file could take the place of an image or of another.

    Args:
      images: As the command got them.
      directories: By their flags; None for a flag that was not given.

    Raises:
      UserError: A directory holds the images, is inside a folder of them, or has two flags.
    """
    given = {flag: Path(place).resolve() for flag, place in directories.items() if place}
    flags = list(given)
    for number, flag in enumerate(flags):
        for other in flags[:number]:
            if given[flag] == given[other]:
                raise UserError(f'{other} and {flag} are one directory; give each one of its own')
    for source in images:
        path = Path(source).resolve()
        is_folder = path.is_dir()
        holder = path if is_folder else path.parent
        for flag, place in given.items():
            if place == holder or (is_folder and holder in place.parents):
                what = 'where the images are,' if is_folder else 'where an image is,'
                raise UserError(
                    f'{flag} {one_line(directories[flag])} is {what} {one_line(source)}: they '
                    'could be overwritten, or results be taken for images next time; give another '
                    'directory'
                )


class ImageStream:
    """Passes on what could be computed, and names and counts the images that could not."""

    def __init__(
        self,
        command: str,
        results: Generator[tuple[Any, Any]],
        left_out: 'LeftOut',
        as_json: bool = False,
    ) -> None:
        self.command, self.results, self.as_json = command, results, as_json
        self.left_out = left_out
        self.done = self.failed = 0

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        # Closing ends the threads that decode, also where the user has interrupted.
        with contextlib.closing(self.results):
            for path, result in self.results:
                if isinstance(result, UserError):
                    self.failed += 1
                    print_error(f'gcnet_jax {self.command}', result)
                    if self.as_json:
                        print(json.dumps({'image': str(path), 'error': str(result)}))
                else:
                    self.done += 1
                    yield path, result
        if self.left_out.count:
            print(f'gcnet_jax {self.command}: {self.left_out}', file=sys.stderr)

    def exit_code(self) -> int:
        if not self.failed:
            return 0
        return EXIT_SOME_IMAGES_FAILED if self.done else EXIT_ERROR
