"""Commands that run a network on images: predict, evaluate, features, attention."""

import argparse
import contextlib
import json
import sys
import warnings
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

from gcnet_jax.commands.common import (
    EXIT_ERROR,
    EXIT_SOME_IMAGES_FAILED,
    image_size,
    report_choice,
)
from gcnet_jax.errors import UserError, one_line, print_error

if TYPE_CHECKING:
    from gcnet_jax.inference.images import LeftOut

IMAGES_HELP = (
    'images, and folders of them; exit code 3: some could not be read (named on stderr), the '
    'others were done'
)


def add_predict(commands: argparse._SubParsersAction) -> None:
    predict = commands.add_parser('predict', help='what is in these images')
    _add_checkpoint_flags(predict, batch_size=32)
    predict.add_argument('images', nargs='+', metavar='IMAGE', help=IMAGES_HELP)
    predict.add_argument('--top-k', type=int, default=5, help='number of classes to print')
    predict.add_argument('--json', action='store_true', help='one JSON object a line and image')
    predict.set_defaults(run=_predict)


def add_evaluate(commands: argparse._SubParsersAction) -> None:
    evaluate = commands.add_parser('evaluate', help='accuracy, loss and confusions on a data set')
    _add_checkpoint_flags(evaluate, batch_size=64)
    evaluate.add_argument('--data', required=True, help='what config.data.name says')
    evaluate.add_argument(
        '--split',
        help="such as 'test' or 'train[:10%%]'; default: test, or validation where there is none",
    )
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


def add_features(commands: argparse._SubParsersAction) -> None:
    features = commands.add_parser('features', help="images' feature vectors or maps, in a file")
    _add_checkpoint_flags(features, batch_size=32)
    features.add_argument('images', nargs='+', metavar='IMAGE_OR_FOLDER', help=IMAGES_HELP)
    features.add_argument(
        '--layer', default='pooled', help="'pooled', 'logits', or a map such as 'stage4'"
    )
    features.add_argument('--out', required=True, metavar='FILE', help='.npz or .safetensors')
    features.add_argument('--overwrite', action='store_true', help='replace that file')
    features.set_defaults(run=_features)


def add_attention(commands: argparse._SubParsersAction) -> None:
    attention = commands.add_parser(
        'attention', help='draw what each context block of a network looks at'
    )
    attention.add_argument('images', nargs='+', metavar='IMAGE', help=IMAGES_HELP)
    attention.add_argument('--checkpoint', required=True, metavar='DIR', help='trained or ported')
    attention.add_argument('--out', required=True, metavar='DIR', help='where the pictures go')
    attention.add_argument(
        '--choose', choices=('best', 'newest'), default='best', help='of several checkpoints'
    )
    attention.add_argument(
        '--all-blocks', action='store_true', help='every block, not the last one of each stage'
    )
    attention.add_argument(
        '--size',
        type=image_size,
        metavar='PIXELS',
        help='that the network gets, such as 224 or 96x160 (height first); default: its own; more: '
        'finer maps',
    )
    attention.add_argument(
        '--query',
        action='append',
        type=_fractions,
        metavar='ROW,COLUMN',
        help='of non-local blocks: a position, as parts of the height and width; several times',
    )
    attention.set_defaults(run=_attention)


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


def _fractions(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(','))


def _load_classifier(options: argparse.Namespace, **more: Any) -> Any:
    from gcnet_jax.inference.classifier import Classifier

    # Pillow warns of damaged files, which have a line of ours.
    warnings.filterwarnings('ignore', module=r'PIL\.')
    report_choice(options.checkpoint, options.choose)
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


def _predict(options: argparse.Namespace) -> int:
    from gcnet_jax.inference.images import LeftOut

    left_out = LeftOut()
    classifier = _load_classifier(options)
    results = classifier.stream(options.images, top_k=options.top_k, left_out=left_out)
    stream = _ImageStream(options.command, results, left_out, options.json)
    for path, prediction in stream:
        if options.json:
            columns = (prediction.labels, prediction.classes, prediction.probabilities)
            classes = [
                dict(zip(('label', 'class', 'probability'), row, strict=True))
                for row in zip(*columns, strict=True)
            ]
            print(json.dumps({'image': str(path), 'predictions': classes}))
        else:
            print(f'{one_line(path)}: {one_line(prediction, 2000)}')
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
            print('wrote ' + ' and '.join(map(one_line, written)))


def _features(options: argparse.Namespace) -> int:
    from gcnet_jax.inference.feature_files import check_feature_file, write_features
    from gcnet_jax.inference.images import LeftOut

    check_feature_file(options.out, overwrite=options.overwrite)
    classifier = _load_classifier(options)
    left_out = LeftOut()
    results = classifier.stream_features(options.images, options.layer, left_out=left_out)
    stream = _ImageStream(options.command, results, left_out)
    name = classifier.description.name
    shape = write_features(
        options.out, stream, layer=options.layer, source=name, overwrite=options.overwrite
    )
    print(f'wrote {list(shape)} of {options.layer} of {one_line(name)} to {one_line(options.out)}')
    return stream.exit_code()


def _attention(options: argparse.Namespace) -> int:
    from gcnet_jax.analysis.attention_pictures import mean_distances, write_pictures
    from gcnet_jax.analysis.pictures import QUERIES
    from gcnet_jax.analysis.query_distances import format_distances
    from gcnet_jax.inference.images import LeftOut

    report_choice(options.checkpoint, options.choose)
    left_out = LeftOut()
    results = write_pictures(
        options.checkpoint,
        options.images,
        options.out,
        choose=options.choose,
        size=options.size,
        all_blocks=options.all_blocks,
        queries=options.query or QUERIES,
        left_out=left_out,
    )
    stream, distances = _ImageStream(options.command, results, left_out), []
    for path, drawn in stream:
        distances.append(drawn.distances)
        parts = (path, drawn.prediction, *drawn.files)
        print(': '.join(one_line(part) for part in parts if part))
    if means := mean_distances(distances):
        print(format_distances(means, stream.done))
    return stream.exit_code()
