"""The command predict: what is in images, as labels or as objects."""

import argparse
import json
from pathlib import Path
from typing import Any

from gcnet_jax.commands.common import refuse_flags
from gcnet_jax.commands.images import (
    IMAGES_HELP,
    ImageStream,
    add_checkpoint_flags,
    load_network,
)
from gcnet_jax.errors import one_line

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
        '--draw', metavar='DIR', help='detectors only: write NAME.png with boxes and masks there'
    )
    predict.set_defaults(run=_predict)


def _predict(options: argparse.Namespace) -> int:
    from gcnet_jax.inference.detector import Detector

    network = load_network(options)
    if isinstance(network, Detector):
        refuse_flags(options, 'a detector', ('top_k',))
        return _detect(network, options)
    refuse_flags(options, 'a classifier', ('threshold', 'classes', 'draw'))
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
    pictures = _Pictures(options.draw) if options.draw is not None else None
    for path, instances in stream:
        picture = '' if pictures is None else pictures.draw(path, instances)
        if options.json:
            shown = {'picture': str(picture)} if picture else {}
            print(json.dumps({'image': str(path), 'objects': instances.to_json(), **shown}))
        else:
            parts = (path, one_line(instances, 2000), picture)
            print(': '.join(one_line(part, 2000) for part in parts if part))
    return stream.exit_code()


class _Pictures:
    """Writes what was found in each image as a picture, in a directory."""

    def __init__(self, directory: str) -> None:
        from gcnet_jax.files import make_directory

        self._directory, self._taken = make_directory(directory, '--draw'), set()

    def draw(self, path: Path, instances: Any) -> Path:
        from gcnet_jax.analysis.instance_pictures import write_instances
        from gcnet_jax.files import unique_name
        from gcnet_jax.inference.images import load_upright

        name = unique_name(path.stem, self._taken)
        return write_instances(load_upright(path), instances, self._directory / f'{name}.png')
