"""The table says how long each start took, and where the time went."""

import json
from pathlib import Path

import pytest

from benchmarks import startup

CONFIG = Path(__file__).parents[1] / 'training' / 'tiny_config.py'


@pytest.mark.slow
def test_a_row_for_each_start(capsys, monkeypatch):
    """One of each is started; cold and warm differ in what an earlier one left behind."""
    real, started = startup.start, {}

    def start(what, arguments, cache):
        calls = started.setdefault((what, *arguments, cache), [])
        if what not in measured:
            measured[what] = real(what, arguments, cache)
        calls.append(measured[what])
        return measured[what]

    measured = {}
    monkeypatch.setattr(startup, 'start', start)
    arguments = ['--json', '--rounds=2', f'--config={CONFIG}', '--network=gccnn', '--size=8']
    startup.main(arguments)
    rows = json.loads(capsys.readouterr().out)['rows']
    assert [(row['start'], row['cache']) for row in rows] == [
        ('train tiny_config', 'cold'),
        ('train tiny_config', 'warm'),
        ('predict gccnn 8 px', 'cold'),
        ('predict gccnn 8 px', 'warm'),
    ]
    for row in rows:
        assert row['seconds'] == pytest.approx(sum(row[stage] for stage in startup.STAGES))
        assert min(row[name] for name in (*startup.STAGES, 'tracing', 'compiling')) > 0
    # Two rounds in places of their own, in each of which one start follows another.
    assert [len(calls) for calls in started.values()] == [2, 2, 2, 2]


def test_a_start_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match='no such directory'):
        startup.start('predict', ['--checkpoint', str(tmp_path / 'none'), 'x.png'], tmp_path)
