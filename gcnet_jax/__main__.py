"""The command line: `python -m gcnet_jax COMMAND`. Reads flags, calls the package, prints.

Exit codes: 0 all done; 1 an error that one line explains, nothing was done; 2 wrong usage; 3 some
images could not be read, each is named in a line on stderr, and the others were done; 141 whoever
read the output stopped (`| head`).
"""

import argparse
import contextlib
import json
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gcnet_jax.errors import UserError

EXIT_ERROR = 1
EXIT_SOME_IMAGES_FAILED = 3
EXIT_PIPE_CLOSED = 141
IMAGES_HELP = (
    'images, and folders of them; exit code 3: some could not be read (named on stderr), the '
    'others were done'
)
CACHING_COMMANDS = ('predict', 'evaluate', 'features', 'attention')
EXPORT_FORMATS = ('jaxexport', 'onnx', 'safetensors')


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; an error is printed as one line."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # Settings of a config are not known here; the command that takes them checks them.
    options.settings = [text for text in rest if re.match(r'--(no)?config\.', text)]
    if len(rest) > (len(options.settings) if options.command == 'plan' else 0):
        parser.error(f'unrecognized arguments: {" ".join(rest)}')
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
        print(f'gcnet_jax {options.command}: {error}', file=sys.stderr)
        return EXIT_ERROR


def _cache(command: str) -> contextlib.AbstractContextManager:
    """Lets the commands that run a network keep what they compile, among the user's own files."""
    if command not in CACHING_COMMANDS:
        return contextlib.nullcontext()
    from gcnet_jax.compilation_cache import compilation_cache, user_directory

    return compilation_cache(user_directory())


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
    _add_predict(commands)
    _add_evaluate(commands)
    _add_features(commands)
    _add_attention(commands)

    curves = commands.add_parser('curves', help='draw loss and accuracy of one or more runs')
    curves.add_argument('runs', nargs='+', metavar='RUN', help='a working directory of train.py')
    curves.add_argument('--out', required=True, metavar='PNG', help='the picture')
    curves.add_argument('--by', choices=('epoch', 'step'), default='epoch', help='horizontal axis')
    curves.set_defaults(run=_curves)
    _add_plan(commands)
    _add_export(commands)
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


def _add_checkpoint_flags(command: argparse.ArgumentParser, batch_size: int) -> None:
    command.add_argument(
        '--checkpoint', required=True, help='a workdir of train.py, a checkpoint or a ported one'
    )
    command.add_argument(
        '--choose', choices=('best', 'newest'), default='best', help='of several checkpoints'
    )
    command.add_argument('--batch-size', type=int, default=batch_size, help='images at once')
    command.add_argument(
        '--dtype', choices=('float32', 'bfloat16'), help='of the computation; default: as trained'
    )
    command.add_argument('--weights', choices=('int8',), help='keep kernels as 8-bit integers')


def _add_predict(commands: argparse._SubParsersAction) -> None:
    predict = commands.add_parser('predict', help='what is in these images')
    _add_checkpoint_flags(predict, batch_size=32)
    predict.add_argument('images', nargs='+', metavar='IMAGE', help=IMAGES_HELP)
    predict.add_argument('--top-k', type=int, default=5, help='classes to tell')
    predict.add_argument('--json', action='store_true', help='one JSON object a line and image')
    predict.set_defaults(run=_predict)


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    evaluate = commands.add_parser('evaluate', help='accuracy, loss and confusions on a data set')
    _add_checkpoint_flags(evaluate, batch_size=64)
    evaluate.add_argument('--data', required=True, help='what config.data.name says')
    evaluate.add_argument('--split', default='test', help="such as 'test' or 'train[:10%%]'")
    evaluate.add_argument('--data-dir', help="where data sets live; default: TFDS's directory")
    evaluate.add_argument(
        '--skip-damaged', action='store_true', help='leave damaged images out, counted'
    )
    evaluate.add_argument(
        '--fold',
        action='store_true',
        help='fold BatchNorm as predict does: faster, other last bits than in training',
    )
    evaluate.add_argument('--out', metavar='DIR', help='write evaluation.json and confusion.png')
    evaluate.add_argument('--json', action='store_true', help='print everything as JSON')
    evaluate.set_defaults(run=_evaluate)


def _add_features(commands: argparse._SubParsersAction) -> None:
    features = commands.add_parser('features', help="images' feature vectors or maps, in a file")
    _add_checkpoint_flags(features, batch_size=32)
    features.add_argument('images', nargs='+', metavar='IMAGE_OR_FOLDER', help=IMAGES_HELP)
    features.add_argument(
        '--layer', default='pooled', help="'pooled', 'logits', or a map such as 'stage4'"
    )
    features.add_argument('--out', required=True, metavar='FILE', help='.npz or .safetensors')
    features.add_argument('--overwrite', action='store_true', help='replace that file')
    features.set_defaults(run=_features)


def _add_attention(commands: argparse._SubParsersAction) -> None:
    attention = commands.add_parser(
        'attention', help='draw what each context block of a network looks at'
    )
    attention.add_argument('images', nargs='+', metavar='IMAGE', help=IMAGES_HELP)
    attention.add_argument('--checkpoint', required=True, metavar='DIR', help='trained or ported')
    attention.add_argument('--out', required=True, metavar='DIR', help='where the pictures go')
    attention.add_argument('--choose', choices=('best', 'newest'), default='best')
    attention.add_argument(
        '--all-blocks', action='store_true', help='every block, not the last one of each stage'
    )
    attention.add_argument(
        '--size', type=int, help='pixels that the network gets; default: its own; more: finer maps'
    )
    attention.add_argument(
        '--query',
        action='append',
        type=_fractions,
        metavar='ROW,COLUMN',
        help='of non-local blocks: a position, as parts of the height and width; several times',
    )
    attention.set_defaults(run=_attention)


def _add_export(commands: argparse._SubParsersAction) -> None:
    export = commands.add_parser('export', help='write a network as one file that runs elsewhere')
    export.add_argument('--checkpoint', required=True, metavar='DIR', help='trained or ported')
    export.add_argument(
        '--out', required=True, metavar='FILE', help='ends in .jaxexport, .onnx or .safetensors'
    )
    export.add_argument(
        '--format', choices=EXPORT_FORMATS, help="default: what the file's name ends in"
    )
    export.add_argument('--choose', choices=('best', 'newest'), default='best')
    export.add_argument('--size', type=int, help="of the images, in pixels; default: the network's")
    export.add_argument(
        '--family', help='with .safetensors: whose names, such as torchvision; default: timm'
    )
    export.add_argument('--overwrite', action='store_true', help='replace a file of that name')
    export.set_defaults(run=_export)


def _fractions(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(','))


def _add_plan(commands: argparse._SubParsersAction) -> None:
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


def _models(options: argparse.Namespace) -> None:
    from gcnet_jax.models import list_models, model_entry

    names = list_models(options.pattern)
    if not names:
        raise UserError(f'no network matches {options.pattern!r}; leave the pattern out for all')
    width = max(map(len, names))
    for name in names:
        print(f'{name:<{width}}  {model_entry(name).description}')


def _summary(options: argparse.Namespace) -> None:
    import jax

    from gcnet_jax.models import create_model, model_entry
    from gcnet_jax.models.summary import format_summary, summarize

    model = create_model(options.name)
    size = model_entry(options.name).preprocessing.test_size
    if options.size is not None:
        size = options.size
    if size < 1:
        raise UserError(f'--size must be 1 or more, got {size}')
    images = jax.ShapeDtypeStruct((1, size, size, 3), 'float32')
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


def _load_classifier(options: argparse.Namespace, **more: Any) -> Any:
    from gcnet_jax import Classifier

    # Pillow warns of damaged files, which have a line of ours.
    warnings.filterwarnings('ignore', module=r'PIL\.')
    return Classifier.load(
        options.checkpoint,
        choose=options.choose,
        batch_size=options.batch_size,
        dtype=options.dtype,
        weights=options.weights,
        **more,
    )


class _ImageStream:
    """Passes on what could be computed, and names and counts the images that could not."""

    def __init__(self, command: str, results: Iterable[tuple[Any, Any]], as_json: bool = False):
        self.command, self.results, self.as_json = command, results, as_json
        self.done = self.failed = 0

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for path, result in self.results:
            if isinstance(result, UserError):
                self.failed += 1
                print(f'gcnet_jax {self.command}: {result}', file=sys.stderr)
                if self.as_json:
                    print(json.dumps({'image': str(path), 'error': str(result)}))
            else:
                self.done += 1
                yield path, result

    def exit_code(self) -> int:
        if not self.failed:
            return 0
        return EXIT_SOME_IMAGES_FAILED if self.done else EXIT_ERROR


def _predict(options: argparse.Namespace) -> int:
    from gcnet_jax.inference.images import one_line

    results = _load_classifier(options).stream(options.images, top_k=options.top_k)
    stream = _ImageStream(options.command, results, options.json)
    for path, prediction in stream:
        if options.json:
            columns = (prediction.labels, prediction.classes, prediction.probabilities)
            classes = [
                dict(zip(('label', 'class', 'probability'), row, strict=True))
                for row in zip(*columns, strict=True)
            ]
            print(json.dumps({'image': str(path), 'predictions': classes}))
        else:
            print(f'{one_line(path)}: {prediction}')
    return stream.exit_code()


def _evaluate(options: argparse.Namespace) -> None:
    from gcnet_jax.data.sources import load_source
    from gcnet_jax.inference.evaluation import evaluate, format_evaluation, write_evaluation

    classifier = _load_classifier(options, fold=options.fold)
    source = load_source(options.data, options.split, options.data_dir)
    evaluation = evaluate(
        classifier, source, skip_damaged=options.skip_damaged, progress=sys.stderr.isatty()
    )
    print(json.dumps(evaluation.to_json()) if options.json else format_evaluation(evaluation))
    if options.out is not None:
        written = write_evaluation(evaluation, options.out)
        if not options.json:
            print('wrote ' + ' and '.join(map(str, written)))


def _features(options: argparse.Namespace) -> int:
    from gcnet_jax.inference.feature_files import check_feature_file, write_features

    check_feature_file(options.out, overwrite=options.overwrite)
    classifier = _load_classifier(options)
    results = classifier.stream_features(options.images, options.layer)
    stream = _ImageStream(options.command, results)
    name = classifier.description.name
    shape = write_features(
        options.out, stream, layer=options.layer, source=name, overwrite=options.overwrite
    )
    print(f'wrote {list(shape)} of {options.layer} of {name} to {options.out}')
    return stream.exit_code()


def _attention(options: argparse.Namespace) -> int:
    from gcnet_jax.inference.attention_pictures import mean_distances, write_pictures
    from gcnet_jax.inference.images import one_line
    from gcnet_jax.inference.pictures import QUERIES

    results = write_pictures(
        options.checkpoint,
        options.images,
        options.out,
        choose=options.choose,
        size=options.size,
        all_blocks=options.all_blocks,
        queries=options.query or QUERIES,
    )
    stream, distances = _ImageStream(options.command, results), []
    for path, drawn in stream:
        distances.append(drawn.distances)
        parts = (path, drawn.prediction, *drawn.files)
        print(': '.join(one_line(part) for part in parts if part))
    for path, mean in mean_distances(distances).items():
        print(f'{path}, mean over all pairs of positions of {stream.done} images: {mean}')
    return stream.exit_code()


def _curves(options: argparse.Namespace) -> None:
    from gcnet_jax.inference.curves import write_curves

    print(f'wrote {write_curves(options.runs, options.out, by=options.by)}')


def _plan(options: argparse.Namespace) -> None:
    from gcnet_jax import planning
    from gcnet_jax.training.command import read_flags

    arguments = ['plan', '--config', options.config, *options.settings]
    config, _, _ = read_flags(arguments, Path(options.config))
    planning.prepare_process()

    def tell(plan: planning.Plan) -> None:
        print(planning.format_progress(plan), file=sys.stderr, flush=True)

    plans = planning.make_plans(
        config,
        options.topology,
        options.batch_per_chip,
        find_largest=options.largest_batch,
        tell=tell,
    )
    if options.json:
        print(json.dumps([planning.plan_to_dict(plan) for plan in plans], indent=2))
    else:
        print(planning.format_plans(plans))


def _export(options: argparse.Namespace) -> None:
    kind = options.format or Path(options.out).suffix.removeprefix('.')
    common = {'choose': options.choose, 'overwrite': options.overwrite}
    if kind == 'safetensors':
        from gcnet_jax import porting

        _refuse_flags(options, '.safetensors', ('size',))
        report = porting.port_reverse(
            options.checkpoint, options.family or 'timm', options.out, **common
        )
        print('\n'.join(report.lines()))
    elif kind in EXPORT_FORMATS:
        from gcnet_jax.inference import export

        _refuse_flags(options, f'.{kind}', ('family',))
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
    print(f'wrote {options.out}')


def _refuse_flags(options: argparse.Namespace, command: str, names: Sequence[str]) -> None:
    for name in names:
        if getattr(options, name):
            raise UserError(f'--{name.replace("_", "-")} has no meaning with {command}')


if __name__ == '__main__':
    sys.exit(main())
