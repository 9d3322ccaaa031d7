"""How long a user waits: from a new process to the first training step, or the first prediction.

    python -m benchmarks.startup

`python train.py` and `python -m gcnet_jax predict`, as a user starts them, each first without what
an earlier run compiled and then again with it. The columns after the total say where the time went,
and the last two how much of it JAX traced and lowered, and compiled or read compiled programs.
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Timing, argument_parser, report

ROOT = Path(__file__).parents[1]
STAGES = ('imports', 'data and checks', 'weights', 'first result')
TRACING = (
    '/jax/core/compile/jaxpr_trace_duration',
    '/jax/core/compile/jaxpr_to_mlir_module_duration',
)
COMPILING = ('/jax/core/compile/backend_compile_duration',)
CLASSES = 1000


class Stopwatch:
    """In the process that is measured: when each stage was done, and what JAX did meanwhile.

    Args:
      began: When the process was started, by a clock that all processes share.
    """

    def __init__(self, began: float) -> None:
        self.began = began
        self.done: dict[str, float] = {}
        self.events: dict[str, float] = {}

    def listen(self) -> None:
        """Adds up how long JAX takes for what it reports; imports JAX."""
        import jax

        def add(event: str, seconds: float, **_: Any) -> None:
            self.events[event] = self.events.get(event, 0.0) + seconds

        jax.monitoring.register_event_duration_secs_listener(add)

    def mark(self, stage: str) -> None:
        """Notes that a stage is done."""
        self.done[stage] = time.monotonic() - self.began

    def after(self, function: Callable, stage: str) -> Callable:
        """Returns a function that notes when it is done."""

        def timed(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            self.mark(stage)
            return result

        return timed

    def tell(self, file: str) -> None:
        """Writes the seconds of each stage."""
        last, seconds = 0.0, {}
        for stage in STAGES:
            seconds[stage] = self.done[stage] - last
            last = self.done[stage]
        seconds['total'] = last
        for name, events in (('tracing', TRACING), ('compiling', COMPILING)):
            seconds[name] = sum(self.events.get(event, 0.0) for event in events)
        Path(file).write_text(json.dumps(seconds))


class _FirstStepDone(BaseException):
    pass


def train_once(watch: Stopwatch, arguments: Sequence[str]) -> None:
    """Does what train.py does until the metrics of the first step are there."""
    from gcnet_jax.commands.train import run
    from gcnet_jax.training import loop, start

    watch.mark('imports')
    watch.listen()
    loop.build = watch.after(loop.build, 'data and checks')
    start.create_state = watch.after(start.create_state, 'weights')

    def stop(*_: Any) -> None:
        watch.mark('first result')
        raise _FirstStepDone

    loop.MetricsWriter.write = stop
    try:
        run(['train.py', *arguments, '--config.training.log_steps=1'], ROOT / 'configs/digits.py')
    except _FirstStepDone:
        return
    raise SystemExit('train.py ended before its first step')


def predict_once(watch: Stopwatch, arguments: Sequence[str]) -> None:
    """Does what `python -m gcnet_jax predict` does."""
    from gcnet_jax.__main__ import main
    from gcnet_jax.inference import stored_network
    from gcnet_jax.inference.classifier import Classifier

    watch.mark('imports')
    watch.listen()
    stored_network.find_checkpoint = watch.after(stored_network.find_checkpoint, 'data and checks')
    Classifier.load = watch.after(Classifier.load, 'weights')
    if main(['predict', *arguments]) != 0:
        raise SystemExit('predict failed')
    watch.mark('first result')


def start(what: str, arguments: Sequence[str], cache: Path) -> dict[str, float]:
    """Starts a process and returns how long each stage of it took, in seconds.

    Args:
      what: 'train' or 'predict'.
      arguments: Of the command.
      cache: The user's cache directory.
    """
    environment = {
        name: value for name, value in os.environ.items() if 'COMPILATION_CACHE' not in name
    } | {'XDG_CACHE_HOME': str(cache), 'PYTHONPATH': str(ROOT)}
    with tempfile.TemporaryDirectory() as directory:
        told = Path(directory) / 'seconds.json'
        command = [sys.executable, __file__, what, str(time.monotonic()), str(told), *arguments]
        run = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if run.returncode or not told.exists():
            raise RuntimeError(f'{what} failed: {run.stdout}')
        return json.loads(told.read_text())


def write_network(directory: Path, name: str, size: int) -> None:
    """Writes a network with random weights for images of some size, and one such image."""
    import jax
    from PIL import Image

    from gcnet_jax.models import model_entry
    from gcnet_jax.stored import ModelDescription, write_ported

    preprocessing = dataclasses.replace(model_entry(name).preprocessing, test_size=size)
    description = ModelDescription(name, {'num_classes': CLASSES}, preprocessing=preprocessing)
    model, generator = description.build(), np.random.default_rng(0)
    images = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    shapes = jax.eval_shape(
        lambda images: model.init(jax.random.key(0), images, train=False), images
    )

    def draw(path: Any, leaf: Any) -> np.ndarray:
        if path[-1].key == 'kernel':
            values = generator.normal(size=leaf.shape) / math.sqrt(math.prod(leaf.shape[:-1]))
        else:
            values = np.full(leaf.shape, path[-1].key in ('scale', 'var'))
        return values.astype(np.float32)

    write_ported(directory / 'network', description, jax.tree_util.tree_map_with_path(draw, shapes))
    pixels = generator.integers(0, 256, (size * 3 // 2, size * 2, 3), np.uint8)
    Image.fromarray(pixels).save(directory / 'image.jpg')


def measure(options: argparse.Namespace, place: Path) -> list[dict[str, Any]]:
    """Returns a row for training and one for prediction, without and with a cache."""
    from gcnet_jax.data.sources import load_source

    data = place / 'data'
    data.mkdir()
    load_source('digits', 'train', str(data))  # Written once, not at each start.
    write_network(place, options.network, options.size)
    predict = ['--checkpoint', str(place / 'network'), str(place / 'image.jpg')]
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for turn in range(options.rounds):
        # In a working directory and with a user's cache of its own: the first start is cold.
        workdir, cache = place / f'run{turn}', place / f'cache{turn}'
        train = [f'--config={options.config}', f'--workdir={workdir}']
        train += [f'--config.data.data_dir={data}']
        for state in ('cold', 'warm'):
            for what, arguments in (('train', train), ('predict', predict)):
                seconds = start(what, arguments, cache)
                found.setdefault((what, state), []).append(seconds)
    names = {'train': Path(options.config).stem, 'predict': f'{options.network} {options.size} px'}
    return [
        {'start': f'{what} {names[what]}', 'cache': state, **_summary(found[what, state])}
        for what in names
        for state in ('cold', 'warm')
    ]


def _summary(runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    total = Timing(tuple(run['total'] for run in runs), 0)
    return {
        'seconds': total.median,
        'spread': total.spread if len(runs) > 1 else None,
        **{
            name: statistics.median(run[name] for run in runs)
            for name in (*STAGES, 'tracing', 'compiling')
        },
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argument_parser(__doc__)
    parser.add_argument('--rounds', type=int, default=5, help='starts of each kind')
    parser.add_argument('--config', default=str(ROOT / 'configs/digits.py'), help='of train.py')
    parser.add_argument('--network', default='gc_resnet50', help='that predicts')
    parser.add_argument('--size', type=int, default=224, help='of its image, in pixels')
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as directory:
        report(measure(options, Path(directory)), as_json=options.json)


if __name__ == '__main__':
    if sys.argv[1:2] in (['train'], ['predict']):
        what, began, told, *rest = sys.argv[1:]
        stopwatch = Stopwatch(float(began))
        (train_once if what == 'train' else predict_once)(stopwatch, rest)
        stopwatch.tell(told)
    else:
        main()
