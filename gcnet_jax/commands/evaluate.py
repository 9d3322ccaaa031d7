"""The command evaluate: how good a network is on a data set."""

import argparse
import json
import sys
from typing import Any

from gcnet_jax.commands.common import refuse_flags
from gcnet_jax.commands.images import add_checkpoint_flags, load_network
from gcnet_jax.errors import one_line
from gcnet_jax.files import make_directory


def add_evaluate(commands: argparse._SubParsersAction) -> None:
    evaluate = commands.add_parser(
        'evaluate',
        help='accuracy, loss and confusions on a data set; average precision of a detector, mean '
        'IoU of a segmenter',
    )
    add_checkpoint_flags(evaluate)
    evaluate.add_argument(
        '--data',
        required=True,
        help="what config.data.name says; for a detector, a folder in COCO's format; for a "
        'segmenter, also a folder with images/SPLIT and labels/SPLIT',
    )
    evaluate.add_argument(
        '--split',
        help="such as 'test' or 'train[:10%%]'; default: test, or validation where there is none; "
        'for a detector, the SPLIT of its annotation file instances_SPLIT.json; for a folder of a '
        'segmenter, val',
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
    evaluate.add_argument(
        '--out', metavar='DIR', help='write evaluation.json and a picture: confusions, or precision'
    )
    evaluate.add_argument('--json', action='store_true', help='print everything as JSON')
    evaluate.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> None:
    from gcnet_jax.inference.detector import Detector
    from gcnet_jax.inference.segmenter import Segmenter

    if options.out is not None:
        make_directory(options.out, '--out')  # Before hours of evaluation.
    network = load_network(options, fold=options.fold)
    kinds = {Detector: _evaluate_detector, Segmenter: _evaluate_segmenter}
    run = kinds.get(type(network), _evaluate_classifier)
    evaluation, text, written = run(network, options)
    print(json.dumps(evaluation.to_json()) if options.json else text)
    if written and not options.json:
        print('wrote ' + ' and '.join(map(one_line, written)))


def _evaluate_classifier(classifier: Any, options: argparse.Namespace) -> tuple[Any, str, list]:
    from gcnet_jax.data.sources import load_source
    from gcnet_jax.inference.evaluation import evaluate, format_evaluation, write_evaluation

    source = load_source(options.data, options.split, options.data_dir)
    evaluation = evaluate(
        classifier, source, skip_damaged=options.skip_damaged, progress=sys.stderr.isatty()
    )
    written = [] if options.out is None else write_evaluation(evaluation, options.out)
    return evaluation, format_evaluation(evaluation), written


def _evaluate_detector(detector: Any, options: argparse.Namespace) -> tuple[Any, str, list]:
    from gcnet_jax.data.coco import load_coco
    from gcnet_jax.inference.coco_evaluation import format_coco_evaluation, write_coco_evaluation
    from gcnet_jax.inference.detector_evaluation import evaluate_detector

    refuse_flags(options, 'a detector', ('data_dir',))
    evaluation = evaluate_detector(
        detector,
        load_coco(options.data, options.split),
        skip_damaged=options.skip_damaged,
        progress=sys.stderr.isatty(),
    )
    written = [] if options.out is None else write_coco_evaluation(evaluation, options.out)
    return evaluation, format_coco_evaluation(evaluation), written


def _evaluate_segmenter(segmenter: Any, options: argparse.Namespace) -> tuple[Any, str, list]:
    from gcnet_jax.data.segmentation_sources import load_segmentation
    from gcnet_jax.inference.segmentation_evaluation import (
        evaluate_segmenter,
        format_segmentation,
        write_segmentation,
    )

    evaluation = evaluate_segmenter(
        segmenter,
        load_segmentation(options.data, options.split, options.data_dir),
        skip_damaged=options.skip_damaged,
        progress=sys.stderr.isatty(),
    )
    written = [] if options.out is None else write_segmentation(evaluation, options.out)
    return evaluation, format_segmentation(evaluation), written
