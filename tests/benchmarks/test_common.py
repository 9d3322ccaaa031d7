"""Candidates take turns in processes of their own; the table says what was compared, and where."""

import functools
import json
import os
import time

import pytest

from benchmarks.common import Timing, compare, machine, report


def sleeper(seconds, log=None):
    def run():
        if log is not None:
            with open(log, 'a') as file:
                file.write(f'{seconds} {os.getpid()}\n')
        time.sleep(seconds)

    return run


def broken():
    raise ValueError('this candidate cannot be made')


def test_candidates_take_turns_in_processes_of_their_own(tmp_path):
    log = tmp_path / 'log'
    candidates = {
        'short': functools.partial(sleeper, 0.001, log),
        'long': functools.partial(sleeper, 0.05, log),
    }
    timings = compare(candidates, rounds=3, warmups=1)
    lines = [line.split() for line in log.read_text().splitlines()]
    assert [name for name, _ in lines] == ['0.001', '0.05'] * 4
    assert len({process for _, process in lines} | {str(os.getpid())}) == 3
    assert [len(timing.seconds) for timing in timings.values()] == [3, 3]
    assert timings['long'].median >= 0.05
    assert timings['short'].peak_bytes > 2**20


def test_a_candidate_that_fails_is_named(capfd):
    with pytest.raises(RuntimeError, match='second failed'):
        compare({'first': functools.partial(sleeper, 0.0), 'second': broken}, rounds=2)
    assert 'this candidate cannot be made' in capfd.readouterr().err


def test_median_and_spread_are_of_the_runs():
    timing = Timing((1.0, 2.0, 3.0, 4.0, 100.0), 0)
    assert timing.median == 3.0
    # The quartiles of five values by numpy's 'weibull' method: 1.5 and 52.
    assert timing.spread == pytest.approx((52 - 1.5) / 3)


def test_report_is_a_table_or_json(capsys):
    rows = [
        {'network': 'resnet50', 'images/s': 12.3456, 'ratio': None},
        {'network': 'x', 'images/s': 1234.5, 'ratio': 1.0},
    ]
    report(rows, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert str(machine()['cores']) in lines[0]
    assert lines[-4:] == [
        '| network  | images/s | ratio |',
        '| -------- | -------- | ----- |',
        '| resnet50 | 12.35    | -     |',
        '| x        | 1,234    | 1     |',
    ]
    report(rows, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told['rows'] == rows
    assert told['machine']['versions']['jax']


def test_a_spread_needs_two_rounds():
    with pytest.raises(ValueError, match='2 or more'):
        compare({'first': functools.partial(sleeper, 0.0)}, rounds=1)
