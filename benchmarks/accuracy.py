"""Trains grids of (network, seed) under one budget each: a table of accuracies, and a plot.

    python -m benchmarks.accuracy GRID ... [--workdir DIR] [--networks ...] [--seeds N]
        [--processes N] [--report-only] [--config.GROUP.KEY=VALUE ...]

`benchmarks/accuracy_grids.py` lists the grids. Every run has a directory of its own,
`WORKDIR/GRID/NETWORK/seedN`: one that has finished is read, one that was interrupted goes on from
its last checkpoint, and settings other than it was begun with are refused. `table.md` and
`accuracy.png` are in `WORKDIR/GRID`.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.accuracy_grids import GRIDS, Grid, find_grid
from benchmarks.accuracy_report import NOTES, comparison_rows, draw, shown
from benchmarks.workers import run_all
from gcnet_jax.commands.train import FAILED, INTERRUPTED, PREEMPTED
from gcnet_jax.errors import CheckpointError, ConfigError, UserError, print_error, unknown_name
from gcnet_jax.files import read_json, write_whole

RESULT, TABLE, PLOT = 'result.json', 'table.md', 'accuracy.png'
# What a grid compares is not set by hand, but for the type and the norms of all its networks.
FIXED = ('config.data.name', 'config.model.', 'config.task.name', 'config.training.seed')
FREE = ('config.model.dtype', 'config.model.norm.')


@dataclasses.dataclass(frozen=True)
class Run:
    """One network with one seed.

    Attributes:
      grid: The grid's name.
      network: The network's name in the grid.
      seed: Of weights, order of the data and augmentation.
      settings: The flags `--config.GROUP.KEY=VALUE` of the command line.
      directory: That of the grid.
    """

    grid: str
    network: str
    seed: int
    settings: tuple[str, ...]
    directory: Path

    @property
    def workdir(self) -> Path:
        """Where this run is."""
        return self.directory / self.network / f'seed{self.seed}'

    @property
    def in_torch(self) -> bool:
        """Whether PyTorch trains it."""
        return self.network in GRIDS[self.grid].in_torch

    def config(self) -> Any:
        """Returns every setting of the run.

        Raises:
          ConfigError: A setting that does not exist, or one that belongs to the grid.
        """
        from gcnet_jax.commands.config_files import load_config
        from gcnet_jax.training.config import name_network
        from gcnet_jax.training.overrides import override

        grid = find_grid(self.grid)
        config = load_config(f'configs/{grid.config}.py')
        config = override(config, [f'--config.{key}={v}' for key, v in grid.settings.items()])
        options = dict(grid.networks[self.network])
        name_network(config, options.pop('name'))
        config.model.update(options)
        config.training.seed = self.seed
        config.training.keep_checkpoints = 1
        config.runtime.progress = 'none'
        config.runtime.tensorboard = False
        # All seeds of a network run the same programs.
        config.runtime.compilation_cache = str(self.directory / 'compilation_cache')
        return override(config, self.settings)

    def result(self) -> dict[str, Any] | None:
        """Returns what the finished run left; None where it has not finished.

        Raises:
          CheckpointError: The directory holds a run with other settings, or a damaged result.
        """
        from gcnet_jax.training.config import changed_keys, plain
        from gcnet_jax.training.workdir import read_own_config

        before = read_own_config(self.workdir)
        if before is None:
            return None
        if changed := changed_keys(before, plain(self.config())):
            keys = ', '.join(f'config.{key}' for key in changed[:5])
            raise CheckpointError(
                f'{self.workdir} holds a run with other settings ({keys}); choose another '
                '--workdir, or give the same settings'
            )
        path = self.workdir / RESULT
        return read_json(path, CheckpointError) if path.exists() else None

    def train(self) -> str:
        """Trains it to its end, or what is left of it; writes its result and returns a line."""
        import jax

        began = time.perf_counter()
        if self.in_torch:
            from benchmarks.torch_training import train_torch as train
        else:
            from gcnet_jax.training.loop import train
        final = train(self.config(), self.workdir)
        jax.clear_caches()  # The next run traces functions of its own.
        seconds = time.perf_counter() - began
        result = {
            'accuracy': final['eval/accuracy'],
            'step': final['step'],
            'epoch': final['epoch'],
            'examples': final['eval/examples'],
            'seconds': seconds,
            'machine': common.machine(),
        }
        with write_whole(self.workdir / RESULT, CheckpointError) as partial:
            partial.write_text(json.dumps(result, indent=2) + '\n')
        accuracy = f'accuracy {result["accuracy"]:.2%}'
        return f'{self.grid}/{self.network} seed {self.seed}: {accuracy}, {seconds:.0f} s'


def runs_of(flags: argparse.Namespace, settings: Sequence[str], name: str) -> list[Run]:
    """Returns the runs of a grid, seed by seed, so that an early table has all networks.

    Raises:
      ConfigError: There is no such grid or network, or a setting belongs to the grid.
    """
    grid = find_grid(name)
    for text in settings:
        path = text.lstrip('-').partition('=')[0].removeprefix('no')
        if path.startswith((*FIXED, 'config.training.init_from')) and not path.startswith(FREE):
            raise ConfigError(
                f'{text}: data set, networks and seeds are those of the grid; leave it out'
            )
        if path.startswith('config.training.early_stopping'):
            raise ConfigError(f'{text}: all runs of a grid have the same length; leave it out')
    for network in flags.networks or ():
        if network not in grid.networks:
            raise ConfigError(unknown_name(f'network of grid {name}', network, grid.networks))
    if flags.seeds is not None and flags.seeds < 1:
        raise ConfigError(f'--seeds is {flags.seeds}; it must be 1 or more')
    return [
        Run(name, network, seed, tuple(settings), flags.workdir.absolute() / name)
        for seed in range(flags.seeds or grid.seeds)
        for network in flags.networks or grid.networks
    ]


def with_earlier_runs(runs: Sequence[Run]) -> list[Run]:
    """Adds what other commands have finished in the same directory with the same settings."""
    first, found = runs[0], list(runs)
    for network in find_grid(first.grid).networks:
        for place in (first.directory / network).glob('seed*'):
            seed = place.name.removeprefix('seed')
            if not seed.isdigit():
                continue
            run = dataclasses.replace(first, network=network, seed=int(seed))
            with contextlib.suppress(CheckpointError):
                if run not in found and run.result():
                    found.append(run)
    return found


def check_start(runs: Sequence[Run]) -> None:
    """Opens the data set of a grid, and looks for what its runs need, before any is trained.

    Raises:
      UserError: Something is missing, or a setting cannot work.
    """
    from gcnet_jax.training.experiment import assemble

    if runs:
        assemble(runs[0].config())
    for run in runs:
        if run.in_torch:
            if importlib.util.find_spec('torch') is None:
                raise UserError(
                    f'{run.grid}/{run.network} needs PyTorch: pip install -r '
                    'requirements-torch.txt, or name other --networks'
                )
            from benchmarks.torch_training import check_settings

            check_settings(run.config())


def report(runs: Sequence[Run], command: str) -> str:
    """Writes table and plot of the runs of one grid that have finished; returns the table."""
    from gcnet_jax.analysis.pictures import save_figure

    grid, directory = find_grid(runs[0].grid), runs[0].directory
    runs = with_earlier_runs(runs)
    results = {run: result for run in runs if (result := run.result())}
    accuracies: dict[str, dict[int, float]] = {}
    for run, result in results.items():
        accuracies.setdefault(run.network, {})[run.seed] = result['accuracy']
    parameters = {name: _parameters(run) for name, run in {r.network: r for r in results}.items()}
    lines = [f'# {runs[0].grid}', f'```\n{command}\n```', *_budget(grid, runs, results)]
    for comparison in shown(grid.comparisons, accuracies):
        rows = comparison_rows(comparison, accuracies, parameters)
        lines += [f'## {comparison.title}', common.markdown_table(rows)]
    text = '\n\n'.join([*lines, NOTES]) + '\n'
    directory.mkdir(parents=True, exist_ok=True)
    with write_whole(directory / TABLE, UserError) as partial:
        partial.write_text(text)
    if accuracies:
        save_figure(draw(grid.comparisons, accuracies), directory / PLOT)
    return text


def _budget(grid: Grid, runs: Sequence[Run], results: Mapping[Run, Mapping]) -> list[str]:
    """Returns paragraphs about the budget of the finished runs, and where they ran."""
    lines = [f'{len(results)} of {len(runs)} runs have finished.']
    if not results:
        return lines
    minutes = sum(result['seconds'] for result in results.values()) / 60
    lines[0] += f' They took {minutes:,.0f} minutes in sum, each since its last start.'
    batch = runs[0].config().training.batch_size
    settings = [f'{key}={value}' for key, value in grid.settings.items()] + list(runs[0].settings)
    budgets = {(r['step'], round(r['epoch'], 1), r['examples']) for r in results.values()}
    lines += [
        f'Budget: {step:,} steps of {batch} images ({epochs:g} epochs), evaluated on {examples:,} '
        f'images. Config: `configs/{grid.config}.py` with `{" ".join(settings)}`.'
        for step, epochs, examples in sorted(budgets)
    ]
    dates = sorted({result['machine']['date'] for result in results.values()})
    lines.append(f'Date: {" to ".join(dict.fromkeys((dates[0], dates[-1])))}.')
    return lines + sorted({common.machine_line(r['machine']) for r in results.values()})


def _parameters(run: Run) -> int:
    """Counts the parameters of a run's network without computing any."""
    import jax

    from gcnet_jax.training.experiment import assemble

    state = jax.eval_shape(assemble(run.config()).initialize, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(state.params))


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, tuple[str, ...]]:
    """Returns the flags, and apart from them those that are settings."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('grids', nargs='+', metavar='GRID', help=', '.join(GRIDS))
    parser.add_argument('--workdir', type=Path, default=Path('runs/accuracy'), metavar='DIR')
    parser.add_argument('--networks', nargs='+', help='some of the grid, not all')
    parser.add_argument('--seeds', type=int, help='runs of each network, not what the grid has')
    parser.add_argument('--processes', type=int, default=1, help='runs at once; they share cores')
    parser.add_argument('--report-only', action='store_true', help='train nothing')
    settings = tuple(text for text in arguments if text.startswith(('--config.', '--noconfig.')))
    return parser.parse_args([text for text in arguments if text not in settings]), settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains what is left of each grid and prints its table; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    flags, settings = parse(arguments)
    command = shlex.join(['python', '-m', 'benchmarks.accuracy', *arguments])
    # Several runs share a GPU: none may take most of its memory for itself.
    os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
    from gcnet_jax.training.processes import Interrupted, Preempted

    try:
        grids = [runs_of(flags, settings, name) for name in flags.grids]
        left = [[run for run in runs if run.result() is None] for runs in grids]
        if not flags.report_only:
            # All of them before the first is trained: what is refused is refused at once.
            for runs in left:
                check_start(runs)
        for runs, missing in zip(grids, left, strict=True):
            if not flags.report_only:
                for line in run_all([run.train for run in missing], flags.processes):
                    print(line, flush=True)
            print(report(runs, command), flush=True)
    except Preempted as stop:
        print_error('benchmarks.accuracy', stop)
        return INTERRUPTED if isinstance(stop, Interrupted) else PREEMPTED
    except UserError as error:
        print_error('benchmarks.accuracy', error)
        return FAILED
    except KeyboardInterrupt:
        print('interrupted; the same command goes on', file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == '__main__':
    sys.exit(main())
