"""Grids of runs: what they build, how they go on, and the statistics and tables made of them."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import accuracy, accuracy_grids, accuracy_report
from benchmarks.accuracy_grids import GRIDS, Comparison
from gcnet_jax.models import create_model

# A run of a second: one step on 16 images.
TINY = (
    '--config.training.total_steps=1',
    '--config.training.batch_size=16',
    '--config.data.train_split=train[:16]',
    '--config.data.evaluation_split=test[:16]',
    '--config.data.num_threads=1',
)
TABLE_OF_T = {1: 12.706, 2: 4.303, 4: 2.776, 9: 2.262}  # 95%, two-sided, by degrees of freedom.


@pytest.fixture
def tiny(monkeypatch):
    """A grid of two networks small enough to be compiled at once."""
    small = {'name': 'gccnn', 'widths': (4,), 'stage_sizes': (1,), 'context': None}
    place = {'stages': (1,), 'position': 'after_conv2', 'ratio': 1.0}
    grid = accuracy_grids.Grid(
        'digits',
        {'training.total_epochs': 2.0},
        2,
        {'none': small, 'gc': small | accuracy_grids.gc(**place)},
        (Comparison('Tiny', 'none', ('gc',)),),
    )
    monkeypatch.setitem(GRIDS, 'tiny', grid)


# Grids of several budgets share their networks: each is built once.
NETWORKS = {
    (network, options['name']): options
    for grid in GRIDS.values()
    for network, options in grid.networks.items()
}


@pytest.mark.parametrize(('network', 'name'), NETWORKS)
def test_every_network_builds(network, name):
    options = dict(NETWORKS[network, name])
    model = create_model(options.pop('name'), num_classes=10, **options)
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    variables = jax.eval_shape(
        lambda key, images: model.init(key, images, train=False), jax.random.key(0), images
    )
    paths = {'/'.join(key.key for key in path) for path, _ in jax.tree.leaves_with_path(variables)}
    has_context = any('context_' in path for path in paths)
    assert has_context == (network not in ('none', 'gccnn_none', 'plain', 'plain_torch'))


@pytest.mark.parametrize('name', GRIDS)
def test_comparisons_are_of_networks_and_name_all_of_them(name):
    grid = GRIDS[name]
    named = {n for c in grid.comparisons for n in (c.baseline, *c.networks)}
    assert named == grid.networks.keys()
    assert named.issuperset(grid.in_torch)


@pytest.mark.parametrize('name', GRIDS)
def test_every_grid_is_a_config_with_known_settings(name, tmp_path):
    network = next(iter(GRIDS[name].networks))
    config = accuracy.Run(name, network, 3, ('--config.data.flip=False',), tmp_path).config()
    assert config.training.seed == 3
    assert config.data.flip is False
    assert config.training.total_epochs == GRIDS[name].settings['training.total_epochs']


@pytest.mark.parametrize('freedom', TABLE_OF_T)
def test_intervals_have_the_factor_of_the_table(freedom):
    values = np.random.default_rng(freedom).normal(0.9, 0.01, freedom + 1)
    found = accuracy_report.interval(values.tolist())
    half = TABLE_OF_T[freedom] * values.std(ddof=1) / math.sqrt(freedom + 1)
    assert found.mean == pytest.approx(values.mean())
    assert found.deviation == pytest.approx(values.std(ddof=1))
    assert found.high - found.mean == pytest.approx(half, rel=2e-4)
    assert found.mean - found.low == pytest.approx(half, rel=2e-4)


def test_differences_are_paired_by_seed():
    baseline = {0: 0.5, 1: 0.7, 2: 0.9, 3: 0.1}
    better = {0: 0.51, 1: 0.71, 2: 0.912}
    found = accuracy_report.difference(better, baseline)
    assert found.count == 3
    assert found.mean == pytest.approx(0.032 / 3)
    # Unpaired, deviations of 0.2 would hide it.
    assert found.finding == 'higher'
    assert accuracy_report.difference({7: 0.5}, baseline) is None


@pytest.mark.parametrize(
    ('values', 'finding'),
    [
        ([0.01, -0.01, 0.02], 'no difference seen'),
        ([-0.02, -0.021, -0.019], 'lower'),
        ([0.0, 0.0], 'no difference seen'),
        ([0.5], 'one seed: not known'),
    ],
)
def test_what_an_interval_shows(values, finding):
    assert accuracy_report.interval(values).finding == finding


def test_rows_are_in_percent_and_leave_out_what_has_not_run():
    rows = accuracy_report.comparison_rows(
        Comparison('Title', 'none', ('gc', 'se')),
        {'none': {0: 0.9, 1: 0.92}, 'gc': {0: 0.91, 1: 0.95}},
        {'none': 1000, 'gc': 1200},
    )
    assert [list(row.values()) for row in rows] == [
        ['none', '1,000', 2, '91.00', '1.41', '-', '-', '-'],
        # The mean of 1 and 3 with the factor 12.706 and the standard error 1.
        ['gc', '1,200', 2, '93.00', '2.83', '+2.00', '-10.71 to +14.71', 'no difference seen'],
    ]


def test_runs_are_trained_once_and_read_after_that(tiny, tmp_path, capsys):
    arguments = ['tiny', f'--workdir={tmp_path}', '--networks', 'none', *TINY]
    assert accuracy.main([*arguments, '--seeds=1']) == 0
    result = tmp_path / 'tiny' / 'none' / 'seed0' / 'result.json'
    accuracy_of_run = json.loads(result.read_text())['accuracy']
    assert 'tiny/none seed 0' in capsys.readouterr().out
    # One whose result was not written yet goes on: it has no step left to take.
    result.unlink()
    assert accuracy.main([*arguments, '--seeds=1']) == 0
    assert json.loads(result.read_text())['accuracy'] == accuracy_of_run
    written = result.stat().st_mtime_ns
    assert accuracy.main([*arguments, '--seeds=2', '--report-only']) == 0
    table = capsys.readouterr().out
    assert '1 of 2 runs have finished' in table
    assert 'Budget: 1 steps of 16 images (1 epochs), evaluated on 16 images' in table
    assert result.stat().st_mtime_ns == written
    assert (tmp_path / 'tiny' / 'table.md').read_text() in table
    assert (tmp_path / 'tiny' / 'accuracy.png').read_bytes().startswith(b'\x89PNG')
    # A command for other networks leaves these in the table.
    others = [text if text != 'none' else 'gc' for text in arguments]
    assert accuracy.main([*others, '--seeds=1', '--report-only']) == 0
    assert '1 of 2 runs have finished' in capsys.readouterr().out
    # Another budget in the same place.
    arguments.remove('--config.training.batch_size=16')
    assert accuracy.main(arguments) == 1
    assert 'holds a run with other settings (config.training.batch_size)' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['digit'], "unknown grid 'digit'; did you mean 'digits'?"),
        (['tiny', '--networks', 'gcc'], "unknown network of grid tiny 'gcc'; did you mean 'gc'?"),
        (['tiny', '--seeds', '0'], '--seeds is 0'),
        (['tiny', '--processes', '999'], '--processes is 999; it must be from 1 to'),
        (['tiny', '--config.training.seed=1'], 'networks and seeds are those of the grid'),
        (['tiny', '--config.model.context=None'], 'networks and seeds are those of the grid'),
        (['tiny', '--config.data.name=mnist'], 'networks and seeds are those of the grid'),
        (['tiny', '--config.data.train_split=no'], 'split'),
        (['tiny', '--config.training.early_stopping_steps=1'], 'have the same length'),
        (['tiny', '--config.training.batchsize=1'], 'config.training.batch_size'),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(tiny, tmp_path, capsys, arguments, message):
    assert accuracy.main([*arguments, f'--workdir={tmp_path}']) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count('\n') == 1


def test_a_plot_has_a_panel_for_each_comparison_that_has_runs():
    comparisons = (Comparison('A', 'x', ('y', 'z')), Comparison('B', 'x', ('u',)))
    figure = accuracy_report.draw(comparisons, {'x': {0: 0.5, 1: 0.6}, 'y': {0: 0.7}})
    assert [axes.get_title(loc='left') for axes in figure.axes] == ['A']
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ['x', 'y']
