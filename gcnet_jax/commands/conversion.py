"""Commands that turn checkpoints into other files, or others' into ours: port, export."""

import argparse
from pathlib import Path

from gcnet_jax.commands.common import (
    image_size,
    is_given,
    print_lines,
    refuse_flags,
    report_choice,
)
from gcnet_jax.errors import UserError

EXPORT_FORMATS = ('jaxexport', 'onnx', 'safetensors', 'pth')


def add_port(commands: argparse._SubParsersAction) -> None:
    port = commands.add_parser('port', help='turn a PyTorch checkpoint into one of ours, or back')
    port.add_argument(
        'checkpoint',
        nargs='?',
        help="a .safetensors or .pth file, a directory of the hub's form, or 'hf-hub:OWNER/NAME'",
    )
    port.add_argument('--model', help='the network; default: recognised from the file')
    port.add_argument(
        '--out',
        required=True,
        help='the directory; with --reverse a .safetensors or .pth file, or a directory of the '
        "hub's form",
    )
    port.add_argument(
        '--weights',
        choices=('auto', 'model', 'ema'),
        help='which of the weights of a file that holds both; default: the averaged ones',
    )
    port.add_argument('--num-classes', type=int, help='with --drop-classifier: of the new one')
    port.add_argument(
        '--drop-classifier', action='store_true', help='start a new classifier at random'
    )
    port.add_argument(
        '--label-names', metavar='FILE', help='a text file with the name of a class on each line'
    )
    port.add_argument(
        '--allow-nonfinite', action='store_true', help='take weights that are NaN or infinite'
    )
    port.add_argument(
        '--ignore-architecture',
        action='store_true',
        help='take the weights although the file names another network',
    )
    port.add_argument('--reverse', metavar='DIR', help='a checkpoint of ours to turn back')
    port.add_argument(
        '--family',
        help='whose names: timm, torchvision, mmdetection, mmsegmentation, gccnn or '
        'pytorch_resnet_cifar10',
    )
    port.add_argument('--overwrite', action='store_true', help='replace what --out names')
    port.set_defaults(run=_port)


def add_export(commands: argparse._SubParsersAction) -> None:
    export = commands.add_parser('export', help='write a network as one file that runs elsewhere')
    export.add_argument('--checkpoint', required=True, metavar='DIR', help='trained or ported')
    export.add_argument(
        '--out',
        required=True,
        metavar='FILE',
        help='ends in .jaxexport, .onnx, .safetensors or .pth',
    )
    export.add_argument(
        '--format', choices=EXPORT_FORMATS, help="default: what the file's name ends in"
    )
    export.add_argument(
        '--choose', choices=('best', 'newest'), default='best', help='of several checkpoints'
    )
    export.add_argument(
        '--size',
        type=image_size,
        metavar='PIXELS',
        help="of the images, such as 224 or 96x160 (height first); default: the network's; of a "
        'detector the canvas that they are laid on, of a segmenter the resized images; default of '
        'both: that of landscapes',
    )
    export.add_argument(
        '--family',
        help='with .safetensors or .pth: whose names, such as torchvision; default: timm',
    )
    export.add_argument('--overwrite', action='store_true', help='replace a file of that name')
    export.set_defaults(run=_export)


def _port(options: argparse.Namespace) -> None:
    from gcnet_jax import porting

    if (options.checkpoint is None) == (options.reverse is None):
        raise UserError('give either a CHECKPOINT to port, or --reverse DIR')
    if options.reverse is not None:
        flags = ('model', 'weights', 'num_classes', 'drop_classifier', 'label_names')
        flags += ('allow_nonfinite', 'ignore_architecture')
        refuse_flags(options, '--reverse', flags)
        if options.family is None:
            raise UserError('--reverse needs --family, such as timm or torchvision')
        report = porting.port_reverse(
            options.reverse, options.family, options.out, overwrite=options.overwrite
        )
        print_lines(report.lines())
        print_lines([f'wrote {options.out}'])
        return
    # What is not given is left to the file.
    names = ('weights', 'family', 'num_classes', 'drop_classifier', 'label_names')
    names += ('allow_nonfinite', 'ignore_architecture')
    choices = {name: getattr(options, name) for name in names if is_given(getattr(options, name))}
    description, report = porting.port(
        options.checkpoint, options.out, options.model, overwrite=options.overwrite, **choices
    )
    print_lines(report.lines())
    print_lines([f'wrote {description.name} to {options.out}'])


def _export(options: argparse.Namespace) -> None:
    kind = options.format or Path(options.out).suffix.removeprefix('.')
    common = {'choose': options.choose, 'overwrite': options.overwrite}
    if kind in EXPORT_FORMATS:
        report_choice(options.checkpoint, options.choose)
    if kind in ('safetensors', 'pth'):
        from gcnet_jax import porting

        refuse_flags(options, f'.{kind}', ('size',))
        report = porting.port_reverse(
            options.checkpoint, options.family or 'timm', options.out, **common
        )
        print_lines(report.lines())
    elif kind in EXPORT_FORMATS:
        from gcnet_jax.inference import export

        refuse_flags(options, f'.{kind}', ('family',))
        common['size'] = options.size
        if kind == 'onnx':
            difference = export.export_onnx(options.checkpoint, options.out, **common)
            print(f'opset {export.OPSET}; differs from the network by {difference:.1g} at most')
        else:
            size = export.export_jax(options.checkpoint, options.out, **common)
            print(f'{size / 1e6:.1f} MB for {", ".join(export.PLATFORMS)}')
    else:
        raise UserError(
            f'--out {options.out}: end it in .{", .".join(EXPORT_FORMATS)}, or say which with '
            '--format'
        )
    print_lines([f'wrote {options.out}'])
