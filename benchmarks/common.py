"""Candidates that take turns, and the table of what each of them took.

Every candidate lives in a process of its own, so that no library's threads or memory disturb
another's. They run one at a time, in turns: what slows the machine down slows all of them alike.
"""

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.settings import gpus, peak_bytes

# Makes a candidate ready (imports, weights, compilation) and returns the function to be timed,
# which returns when its work is done.
Setup = Callable[[], Callable[[], Any]]

LIBRARIES = (
    *('jax', 'jaxlib', 'flax', 'torch', 'torchvision', 'timm', 'onnxruntime', 'openvino'),
    *('tensorflow-cpu', 'grain'),
)


@dataclasses.dataclass(frozen=True)
class Timing:
    """What one candidate took.

    Attributes:
      seconds: Of each run, in order.
      peak_bytes: The most memory that its process held, libraries included; on a GPU that of the
        GPU.
    """

    seconds: tuple[float, ...]
    peak_bytes: int

    @property
    def median(self) -> float:
        """The median of the runs, in seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """The distance between the quartiles as a share of the median."""
        first, _, third = statistics.quantiles(self.seconds, n=4)
        return (third - first) / self.median


def compare(
    candidates: Mapping[str, Setup], *, rounds: int, warmups: int = 2, alone: bool = False
) -> dict[str, Timing]:
    """Times candidates in turns.

    Args:
      candidates: By name; each is picklable: a module's function, or a `functools.partial` of one.
      rounds: How often each is timed; at least 2.
      warmups: Runs of each before the first that is timed.
      alone: One after the other instead, each gone before the next starts, because a GPU has not
        the memory for all.

    Raises:
      RuntimeError: A candidate failed; its own traceback is on standard error.
      ValueError: There are too few rounds to tell a spread.
    """
    if rounds < 2:
        raise ValueError(f'rounds is {rounds}; it must be 2 or more')
    if alone:
        timings = {}
        for name, setup in candidates.items():
            timings |= compare({name: setup}, rounds=rounds, warmups=warmups)
        return timings
    context = multiprocessing.get_context('spawn')
    workers = {}
    with contextlib.ExitStack() as stack:
        for name, setup in candidates.items():
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(setup, theirs), daemon=True)
            process.start()
            theirs.close()
            stack.callback(process.join)
            stack.callback(ours.close)  # It ends when it finds the pipe closed.
            workers[name] = ours
            _ask(name, ours, None)  # One at a time gets ready too.
        seconds = {name: [] for name in workers}
        for turn in range(warmups + rounds):
            for name, worker in workers.items():
                taken = _ask(name, worker, 'run')
                if turn >= warmups:
                    seconds[name].append(taken)
        return {
            name: Timing(tuple(seconds[name]), _ask(name, worker, 'memory'))
            for name, worker in workers.items()
        }


def _ask(name: str, worker: Any, question: str | None) -> Any:
    try:
        if question is not None:
            worker.send(question)
        return worker.recv()
    except (EOFError, BrokenPipeError) as error:
        raise RuntimeError(f'{name} failed, see above') from error


def _work(setup: Setup, pipe: Any) -> None:
    run = setup()
    pipe.send('ready')
    with contextlib.suppress(EOFError):
        while True:
            if pipe.recv() == 'memory':
                pipe.send(peak_bytes())
                continue
            began = time.perf_counter()
            run()
            pipe.send(time.perf_counter() - began)


def machine() -> dict[str, Any]:
    """Says where and with what the figures were measured."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open('/proc/cpuinfo') as file:
        models = [line.split(':', 1)[1].strip() for line in file if line.startswith('model name')]
        name = models[0] if models else name
    versions = {}
    for library in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[library] = importlib.metadata.version(library)
    return {
        'processor': name,
        'cores': len(os.sched_getaffinity(0)),
        'gpus': gpus(),
        'python': platform.python_version(),
        'versions': versions,
        'date': datetime.date.today().isoformat(),
    }


def throughput_rows(
    columns: Mapping[str, Any], timings: Mapping[str, Timing], batch: int, reference: str
) -> list[dict[str, Any]]:
    """Makes one row a candidate.

    Args:
      columns: What the candidates have in common, in front.
      timings: Of each candidate, for `batch` images.
      batch: Number of images a run.
      reference: The candidate that the others are compared with; its name is in the heading.
    """
    base = timings[reference].median if reference in timings else None
    return [
        {
            **columns,
            'candidate': name,
            'images/s': batch / timing.median,
            'spread': timing.spread,
            f'ratio to {reference}': base / timing.median if base else None,
            'peak MiB': timing.peak_bytes / 2**20,
        }
        for name, timing in timings.items()
    ]


def variable_shapes(model: Any, size: int) -> dict[str, Any]:
    """Returns the shapes of a network's variables for images of this height and width."""
    import jax
    import jax.numpy as jnp

    images = jnp.zeros((1, size, size, 3))
    return dict(jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False)))


def random_variables(shapes: Mapping[str, Any]) -> Any:
    """Draws variables of these shapes, without compiling an initialisation."""
    import jax
    import numpy as np

    generator = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        values = generator.uniform(0.5, 1.5, leaf.shape)
        if path[-1].key == 'kernel':
            values = (values - 1) / np.sqrt(np.prod(leaf.shape[:-1]))
        return values.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def training_step(
    model: Any,
    task: Any,
    variables: Mapping[str, Any],
    batch: Mapping[str, Any],
    *,
    learning_rate: float,
    frozen: tuple[str, ...] = (),
) -> Callable[[], Any]:
    """Returns a function that takes the package's own step, SGD with momentum, on one device.

    It returns the metrics of the step when they are there.
    """
    import jax
    import jax.numpy as jnp

    from gcnet_jax.training.mesh import batch_shardings, make_mesh, state_shardings
    from gcnet_jax.training.optimizers import make_optimizer
    from gcnet_jax.training.state import TrainState
    from gcnet_jax.training.steps import StepOptions, jit_train_step, make_train_step

    optimizer = make_optimizer('sgd', learning_rate, nesterov=False)
    mesh = make_mesh(devices=jax.devices()[:1])
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key_data(jax.random.key(1)),
        params=variables['params'],
        batch_stats=variables['batch_stats'],
        opt_state=optimizer.init(variables['params']),
        ema=None,
    )
    shardings = state_shardings(state, mesh)
    state = jax.device_put(state, shardings)
    inputs = jax.device_put(batch, batch_shardings(mesh, task.batch_spec()))
    step = make_train_step(model, optimizer, task, StepOptions(frozen=frozen), mesh)
    step = jit_train_step(step, task, mesh, shardings)

    def run():
        nonlocal state
        state, metrics = step(state, inputs)
        return jax.block_until_ready(metrics)

    return run


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """Returns a parser of the flags that all benchmarks share."""
    parser = argparse.ArgumentParser(description=(description or '').split('\n')[0])
    parser.add_argument('--json', action='store_true', help='print one JSON object, no table')
    return parser


def report(rows: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    """Prints rows, all with the same keys, as a Markdown table below the machine, or as JSON."""
    where = machine()
    if as_json:
        print(json.dumps({'machine': where, 'rows': list(rows)}))
        return
    print(f'{where["date"]}: {machine_line(where)}\n')
    print(markdown_table(rows))


def machine_line(where: Mapping[str, Any]) -> str:
    """Returns what `machine` found as text, without the date."""
    versions = ', '.join(f'{library} {version}' for library, version in where['versions'].items())
    parts = [where['processor'], f'{where["cores"]} cores', *where['gpus']]
    return f'{", ".join(parts)}\nPython {where["python"]}, {versions}'


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns rows, all with the same keys, as a Markdown table."""
    cells = [list(rows[0])] + [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ['-' * width for width in widths])
    lines = []
    for row in cells:
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append(f'| {" | ".join(padded)} |')
    return '\n'.join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f'{value:.4g}' if abs(value) < 1000 else f'{value:,.0f}'
    return '-' if value is None else str(value)
