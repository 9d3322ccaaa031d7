"""The command predict: what is in images, as labels, as objects or as maps of labels."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gcnet_jax.commands.common import refuse_flags
from gcnet_jax.commands.images import (
    IMAGES_HELP,
    ImageStream,
    add_checkpoint_flags,
    check_directories,
    load_network,
)
from gcnet_jax.errors import one_line

# Writes a file about an image, and returns its path.
Writer = Callable[[Path, Any], Path]

TOP_K = 5
# Objects below it are mostly wrong; mmdetection's pictures leave them out, too.
THRESHOLD = 0.3


def add_predict(commands: argparse._SubParsersAction) -> None:
    predict = commands.add_parser('predict', help='what is in these images')
    add_checkpoint_flags(predict)
    predict.add_argument('images', nargs='+', metavar='IMAGE', help=IMAGES_HELP)
    predict.add_argument(
        '--json', action='store_true', help='one JSON object per image, one per line'
    )
    predict.add_argument(
        '--top-k', type=int, help=f'classifiers only: labels per image; default: {TOP_K}'
    )
    predict.add_argument(
        '--threshold',
        type=float,
        help=f'detectors only: lowest score of an object; default: {THRESHOLD}',
    )
    predict.add_argument(
        '--classes', nargs='+', metavar='LABEL', help='detectors only: labels that are wanted'
    )
    predict.add_argument(
        '--draw',
        metavar='DIR',
        help='detectors and segmenters: write NAME.png there, with boxes and masks or with labels '
        'over the image',
    )
    predict.add_argument(
        '--maps',
        metavar='DIR',
        help="segmenters only: write NAME.png there, whose values are the pixels' labels",
    )
    predict.set_defaults(run=_predict)


def _predict(options: argparse.Namespace) -> int:
    from gcnet_jax.inference.detector import Detector
    from gcnet_jax.inference.segmenter import Segmenter

    check_directories(options.images, {'--draw': options.draw, '--maps': options.maps})
    network = load_network(options)
    if isinstance(network, Detector):
        refuse_flags(options, 'a detector', ('top_k', 'maps'))
        return _detect(network, options)
    if isinstance(network, Segmenter):
        refuse_flags(options, 'a segmenter', ('top_k', 'threshold', 'classes'))
        return _segment(network, options)
    refuse_flags(options, 'a classifier', ('threshold', 'classes', 'draw', 'maps'))
    return _classify(network, options)


def _classify(classifier: Any, options: argparse.Namespace) -> int:
    from gcnet_jax.inference.images import LeftOut

    left_out = LeftOut()
    top_k = TOP_K if options.top_k is None else options.top_k
    results = classifier.stream(options.images, top_k=top_k, left_out=left_out)
    stream = ImageStream(options.command, results, left_out, options.json)
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


def _detect(detector: Any, options: argparse.Namespace) -> int:
    from gcnet_jax.inference.images import LeftOut

    left_out = LeftOut()
    results = detector.stream(
        options.images,
        threshold=THRESHOLD if options.threshold is None else options.threshold,
        classes=options.classes,
        left_out=left_out,
    )
    stream = ImageStream(options.command, results, left_out, options.json)
    writers = _writers(('picture', '--draw', options.draw, _draw_instances))
    return _report(stream, 'objects', writers)


def _segment(segmenter: Any, options: argparse.Namespace) -> int:
    from gcnet_jax.inference.images import LeftOut

    left_out = LeftOut()
    results = segmenter.stream(options.images, left_out=left_out)
    stream = ImageStream(options.command, results, left_out, options.json)
    writers = _writers(
        ('picture', '--draw', options.draw, _draw_labels),
        ('map', '--maps', options.maps, _store_labels),
    )
    return _report(stream, 'labels', writers)


def _report(stream: ImageStream, name: str, writers: dict[str, Writer]) -> int:
    """Prints what was found in each image and which files about it were written.

    Args:
      stream: The images with what was found.
      name: What that is called in JSON.
      writers: Write the files, by what they are called in JSON.
    """
    for path, found in stream:
        files = {kind: str(write(path, found)) for kind, write in writers.items()}
        if stream.as_json:
            print(json.dumps({'image': str(path), name: found.to_json(), **files}))
        else:
            print(': '.join(one_line(part, 2000) for part in (path, found, *files.values())))
    return stream.exit_code()


def _writers(*kinds: tuple[str, str, str | None, Callable[..., Any]]) -> dict[str, Writer]:
    """Returns what writes NAME.png for an image, for each flag that names a directory.

    Args:
      *kinds: What a file is called in JSON, its flag and the flag's value, and a function of the
        image's path, what was found in it and the file.
    """
    from gcnet_jax.files import make_directory

    return {
        kind: _writer(make_directory(directory, flag), write)
        for kind, flag, directory, write in kinds
        if directory is not None
    }


def _writer(directory: Path, write: Callable[[Path, Any, Path], Any]) -> Writer:
    from gcnet_jax.files import unique_name

    taken: set[str] = set()

    def write_file(path: Path, found: Any) -> Path:
        file = directory / f'{unique_name(path.stem, taken)}.png'
        write(path, found, file)
        return file

    return write_file


def _draw_instances(path: Path, instances: Any, file: Path) -> None:
    from gcnet_jax.analysis.instance_pictures import write_instances
    from gcnet_jax.inference.images import load_upright

    write_instances(load_upright(path), instances, file)


def _draw_labels(path: Path, label_map: Any, file: Path) -> None:
    from gcnet_jax.analysis.segmentation_pictures import write_overlay
    from gcnet_jax.inference.images import load_upright

    write_overlay(load_upright(path), label_map, file)


def _store_labels(path: Path, label_map: Any, file: Path) -> None:
    from gcnet_jax.analysis.segmentation_pictures import write_label_map

    write_label_map(label_map, file)
