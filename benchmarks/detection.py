"""Detectors, ours against mmdetection's: seconds by part and of the whole, and memory.

    python -m benchmarks.detection [--train] [--model NAME] [--size HEIGHT WIDTH] [--rounds N]
        [--mmdetection-python PYTHON --mmdetection-config CONFIG [--mmdetection-setup MODULE]]
        [--device cpu|gpu] [--threads N] [--json]

Each side is a process of its own on the same `--threads` processors, and on the GPU where there is
one, in float32 without TF32; they take turns. Both have the same random weights and the same image,
and count from the normalised, padded image to one boolean mask of the image's size for each
detection. Ours is timed as the one program that it is, and part by part; the latter in a process of
its own, so that its memory is not the program's. Memory, on a GPU that of the GPU, is given for a
first run, which compiles, and for one that finds the program in JAX's compilation cache, as every
later run does. With `--train` it is a training step that is timed, see
`benchmarks.detection_steps`, as one part.

mmdetection's is timed if an interpreter that can import mmdet is given, with the path of a
configuration. `--mmdetection-setup` names a module that it imports first, from the current
directory or PYTHONPATH: on a CPU without mmcv's compiled operators one that puts stand-ins in their
place.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import common, settings
from benchmarks.detection_sides import OURS, OURS_BY_PART, THEIRS, WHOLE
from gcnet_jax.errors import unknown_name

PARTS = ('backbone', 'neck', 'proposals', 'boxes', 'masks', 'paste')
WARMUPS = 1
FIRST = 'gcnet_jax, first run'


def _start(side: str, python: str, options: Mapping[str, Any]) -> subprocess.Popen:
    command = [python, '-m', 'benchmarks.detection_sides', side, json.dumps(options)]
    environment = {
        **os.environ,
        'OMP_NUM_THREADS': str(options['threads']),
        'JAX_COMPILATION_CACHE_DIR': os.path.join(options['directory'], 'compiled'),
        'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',  # The sides share a GPU.
    }
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)


def _answer(side: str, process: subprocess.Popen) -> dict[str, Any]:
    process.stdin.write('run\n')
    process.stdin.flush()
    while line := process.stdout.readline():
        if line.startswith('{"seconds"'):  # A library may print something too.
            return json.loads(line)
    raise RuntimeError(f'{side} failed, see above')


def compare(flags: argparse.Namespace) -> dict[str, list[dict]]:
    """Runs every side in turns; returns what each answered in each round."""
    pythons = dict.fromkeys((OURS,) if flags.train else (OURS, OURS_BY_PART), sys.executable)
    if flags.mmdetection_python:
        pythons[THEIRS] = flags.mmdetection_python
    answers = {side: [] for side in (FIRST, *pythons)}
    with tempfile.TemporaryDirectory() as directory:
        options = {**vars(flags), 'directory': directory}
        if _start('weights', sys.executable, options).wait():
            raise RuntimeError('the weights could not be drawn, see above')
        first = _start(OURS, sys.executable, options)
        answers[FIRST].append(_answer(OURS, first))
        _end(first)
        processes = {side: _start(side, python, options) for side, python in pythons.items()}
        try:
            for turn in range(WARMUPS + flags.rounds):
                for side, process in processes.items():
                    answer = _answer(side, process)
                    if turn >= WARMUPS:
                        answers[side].append(answer)
        finally:
            for process in processes.values():
                _end(process)
    return answers


def _end(process: subprocess.Popen) -> None:
    process.stdin.close()
    process.wait()


def rows(answers: Mapping[str, Sequence[Mapping]]) -> list[dict[str, Any]]:
    """Makes a row for each part and one for the whole."""

    def median(side: str, part: str, which: int) -> float | None:
        values = [answer['seconds'][part][which] for answer in answers.get(side, ())]
        return statistics.median(values) if values else None

    def spread(side: str, part: str) -> float | None:
        values = [answer['seconds'][part][0] for answer in answers.get(side, ())]
        return (max(values) - min(values)) / statistics.median(values) if values else None

    def ratio(ours: float, theirs: float | None) -> float | None:
        return theirs / ours if theirs else None

    def peak(side: str) -> float | None:
        values = [answer['peak_bytes'] / 2**20 for answer in answers.get(side, ())]
        return max(values, default=None)

    sides = (given for side, given in answers.items() if side != FIRST)
    found = ', '.join(str(given[0]['boxes']) for given in sides)
    table = []
    for part in (*(PARTS if OURS_BY_PART in answers else ()), WHOLE):
        side = OURS if part == WHOLE else OURS_BY_PART
        wall, processor = median(side, part, 0), median(side, part, 1)
        their_wall, their_processor = median(THEIRS, part, 0), median(THEIRS, part, 1)
        table.append(
            {
                'part': part,
                'seconds': wall,
                'spread': spread(side, part),
                'mmdetection': their_wall,
                'their spread': spread(THEIRS, part),
                'speed ratio': ratio(wall, their_wall),
                'CPU s': processor,
                'their CPU s': their_processor,
                'CPU ratio': ratio(processor, their_processor),
                'peak MiB': peak(side) if part == WHOLE else None,
                'first peak MiB': peak(FIRST) if part == WHOLE else None,
                'their peak MiB': peak(THEIRS) if part == WHOLE else None,
                'boxes': found if part == WHOLE else None,
            }
        )
    return table


def _parser() -> argparse.ArgumentParser:
    parser = common.argument_parser(__doc__)
    parser.add_argument('--train', action='store_true', help='a training step, in place of finding')
    parser.add_argument('--model', default='gc_mask_rcnn_resnet50_fpn', help='a detector of ours')
    parser.add_argument('--size', nargs=2, type=int, default=(800, 1333), metavar='PIXELS')
    parser.add_argument('--rounds', type=int, default=5, help='runs of each side that are timed')
    settings.add_device_flag(parser)
    parser.add_argument('--threads', type=int, default=2, help='processors of each side')
    parser.add_argument('--mmdetection-python', help='an interpreter that can import mmdet')
    parser.add_argument('--mmdetection-config', help='the same detector, a file of mmdetection')
    parser.add_argument('--mmdetection-setup', help='a module that is imported before mmdet')
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Compares the sides and prints a table."""
    parser = _parser()
    flags = parser.parse_args(arguments)
    if bool(flags.mmdetection_python) != bool(flags.mmdetection_config):
        parser.error('--mmdetection-python and --mmdetection-config go together')
    from gcnet_jax.models import list_models

    if flags.model not in (known := list_models(task='detection')):
        parser.error(unknown_name('detector', flags.model, known))
    flags.device = settings.choose_device(flags.device)
    common.report(rows(compare(flags)), as_json=flags.json)


if __name__ == '__main__':
    main()
