"""The command line: `python -m gcnet_jax COMMAND`. Reads flags, calls the package, prints."""

import argparse
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from gcnet_jax.errors import UserError

EXIT_ERROR = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0, or 1 after an error that is printed as one line."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except UserError as error:
        print(f'gcnet_jax {options.command}: {error}', file=sys.stderr)
        return EXIT_ERROR
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='python -m gcnet_jax', description='Global-context networks in Flax.'
    )
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')

    models = commands.add_parser('models', help='list the networks')
    models.add_argument('pattern', nargs='?', default='*', help="a glob such as 'gc_*'")
    models.set_defaults(run=_models)

    summary = commands.add_parser(
        'summary', help="a network's parameters, multiply-adds, and what its context costs"
    )
    summary.add_argument('name', help='a name that the command models lists')
    summary.add_argument('--size', type=int, help="image size in pixels; default: the network's")
    summary.set_defaults(run=_summary)

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

    _add_port(commands)
    return parser


def _add_port(commands: argparse._SubParsersAction) -> None:
    port = commands.add_parser('port', help='turn a PyTorch checkpoint into one of ours, or back')
    port.add_argument(
        'checkpoint', nargs='?', help="a .safetensors or .pth file, or 'hf-hub:OWNER/NAME'"
    )
    port.add_argument('--model', help='the network; default: recognised from the file')
    port.add_argument('--out', required=True, help='the directory, or with --reverse the file')
    port.add_argument(
        '--weights',
        choices=('auto', 'model', 'ema'),
        help='which of the weights of a file that holds both; default: the averaged ones',
    )
    port.add_argument('--num-classes', type=int, help='with --drop-classifier: of the new one')
    port.add_argument(
        '--drop-classifier', action='store_true', help='start a new classifier at random'
    )
    port.add_argument('--reverse', metavar='DIR', help='a checkpoint of ours to turn back')
    port.add_argument('--family', help='whose names: timm, torchvision, mmdetection or gccnn')
    port.add_argument('--overwrite', action='store_true', help='replace what --out names')
    port.set_defaults(run=_port)


def _models(options: argparse.Namespace) -> None:
    from gcnet_jax.models import list_models, model_entry

    names = list_models(options.pattern)
    if not names:
        raise UserError(f'no network matches {options.pattern!r}; leave the pattern out for all')
    width = max(map(len, names))
    for name in names:
        print(f'{name:<{width}}  {model_entry(name).description}')


def _summary(options: argparse.Namespace) -> None:
    from gcnet_jax.models import create_model, model_entry
    from gcnet_jax.models.summary import format_summary, summarize

    model = create_model(options.name)
    size = model_entry(options.name).preprocessing.test_size
    if options.size is not None:
        size = options.size
    if size < 1:
        raise UserError(f'--size must be 1 or more, got {size}')
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    print(format_summary(options.name, images.shape, summarize(model, images, train=False)))


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
        print(f'left out: {problem}')
    splits = ', '.join(f'{split} {size:,}' for split, size in prepared.split_sizes.items())
    print(f'{prepared.name}: {len(prepared.label_names)} classes, images: {splits}')
    print(f'in {prepared.path}')
    place = f' --config.data.data_dir={options.data_dir}' if options.data_dir else ''
    print(
        f'train on it: python train.py --config configs/folder.py '
        f'--config.data.name={prepared.name}{place}'
    )


def _port(options: argparse.Namespace) -> None:
    from gcnet_jax import porting

    if (options.checkpoint is None) == (options.reverse is None):
        raise UserError('give either a CHECKPOINT to port, or --reverse DIR')
    if options.reverse is not None:
        _refuse_flags(options, '--reverse', ('model', 'weights', 'num_classes', 'drop_classifier'))
        if options.family is None:
            raise UserError('--reverse needs --family, such as timm or torchvision')
        report = porting.port_reverse(
            options.reverse, options.family, options.out, overwrite=options.overwrite
        )
        print('\n'.join(report.lines()))
        print(f'wrote {options.out}')
        return
    # What is not given is left to the file; --num-classes 0 is given.
    choices = {
        name: getattr(options, name)
        for name in ('weights', 'family', 'num_classes', 'drop_classifier')
        if getattr(options, name) is not None and getattr(options, name) is not False
    }
    description, report = porting.port(
        options.checkpoint, options.out, options.model, overwrite=options.overwrite, **choices
    )
    print('\n'.join(report.lines()))
    print(f'wrote {description.name} to {options.out}')


def _refuse_flags(options: argparse.Namespace, command: str, names: Sequence[str]) -> None:
    for name in names:
        if getattr(options, name):
            raise UserError(f'--{name.replace("_", "-")} has no meaning with {command}')


if __name__ == '__main__':
    sys.exit(main())
