"""The one command for a GPU: every part's command is understood, and a run can be gone on with."""

import sys

import pytest

from benchmarks import accuracy, detection, gpu, inference, settings, training

MMDETECTION = ['--mmdetection-python', 'python', '--mmdetection-config', 'config.py']


def command(text):
    return [sys.executable, '-c', text]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs two parts, of which one prints where it runs; returns the exit status."""

    def run(first, *flags):
        known = {'first': command(first), 'second': command('print("| a table |")')}
        monkeypatch.setattr(gpu, 'parts', lambda flags: known)
        return gpu.main(['--out', str(tmp_path), '--small', *flags])

    return run


def test_a_part_that_fails_is_named_and_stops_no_other(run, tmp_path, capsys):
    assert run('import sys; print("half"); sys.exit("no such card")') == 1
    assert capsys.readouterr().err.startswith('failed: first; see')
    assert not (tmp_path / 'first.md').exists()
    assert (tmp_path / 'first.log').read_text() == 'no such card\n'
    assert (tmp_path / 'second.md').read_text().endswith('\n| a table |\n')


def test_what_is_there_is_left_out(run, tmp_path, capsys):
    once = f'import pathlib; pathlib.Path({str(tmp_path / "once")!r}).touch(exist_ok=False)'
    assert run(once) == 0
    assert run(once) == 0  # It would fail.
    assert 'first: there already\nsecond: there already\n' in capsys.readouterr().out


def test_the_table_of_another_command_does_not_count(run, tmp_path, monkeypatch):
    assert run('print(1)') == 0
    assert run('print(2)') == 0
    assert (tmp_path / 'first.md').read_text().endswith('\n2\n')
    monkeypatch.setattr(settings, 'gpus', lambda: ['another'])
    assert run('raise SystemExit(3)') == 1


def test_parts_can_be_chosen(run, tmp_path, capsys):
    assert run('pass', '--only', 'second') == 0
    assert not (tmp_path / 'first.md').exists()
    with pytest.raises(SystemExit):
        run('pass', '--only', 'third')
    assert "no part 'third'; there are first, second" in capsys.readouterr().err


def test_without_a_gpu_only_the_small_ones_run(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(settings, 'gpus', list)
    with pytest.raises(SystemExit):
        gpu.main(['--out', str(tmp_path)])
    assert 'there is no GPU here' in capsys.readouterr().err


@pytest.mark.parametrize('small', [[], ['--small']])
def test_every_benchmark_understands_its_command(monkeypatch, small):
    """Each is called as the part calls it, and times nothing."""
    known, reported = {}, []
    monkeypatch.setattr(settings, 'gpus', lambda: ['a card'])
    monkeypatch.setattr(settings, 'require_packages', lambda *_: None)
    monkeypatch.setattr(gpu, 'run', lambda name, command, out: known.update({name: command}))
    gpu.main(['--out', '.', *small, *MMDETECTION])
    for module in (inference, training, detection):
        monkeypatch.setattr(module.common, 'report', lambda rows, **_: reported.append(rows))
    for module in (inference, training):
        monkeypatch.setattr(
            module, 'rows_of', lambda *arguments: [{'setting': arguments[-2], 'what': arguments}]
        )
    monkeypatch.setattr(detection, 'compare', lambda flags: flags)
    monkeypatch.setattr(detection, 'rows', lambda flags: [{'setting': flags}])
    modules = {'inference': inference, 'training': training, 'detection': detection}
    for name, (_, _, module, *arguments) in known.items():
        if name not in ('tests', 'accuracy'):
            modules[module.removeprefix('benchmarks.')].main(arguments)
    flags, overrides = accuracy.parse(known['accuracy'][3:])
    assert all(accuracy.runs_of(flags, overrides, grid) for grid in flags.grids)
    assert known['tests'][:3] == [
        *('env', 'JAX_PLATFORMS=cuda,cpu', 'JAX_DEFAULT_MATMUL_PRECISION=float32')
    ]
    assert len(reported) == len(known) - 2 == 8
    assert {row['setting'].device for rows in reported for row in rows} == {'gpu'}
    precisions = {row['setting'].precision for rows in reported[:6] for row in rows}
    assert precisions == set(settings.PRECISIONS)


def test_the_tests_are_there():
    assert all((gpu.ROOT / path).exists() for path in (*gpu.TESTS, *gpu.SMALL_TESTS))
