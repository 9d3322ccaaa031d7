"""Jobs run in several processes, each with its own cores; one that fails stops the others."""

import functools
import os
import signal
import time

import pytest

from benchmarks.workers import run_all
from gcnet_jax.errors import ConfigError, UserError

CORES = sorted(os.sched_getaffinity(0))
several = pytest.mark.skipif(len(CORES) < 2, reason='there is one core')


def where(name):
    return f'{name} {os.getpid()} {sorted(os.sched_getaffinity(0))}'


def fail():
    raise ConfigError('this job cannot work')


def wait_for_signal(place):
    signal.signal(signal.SIGTERM, functools.partial(save, place))
    (place / 'began').touch()
    time.sleep(60)


def save(place, *unused):
    (place / 'saved').touch()
    raise UserError('stopped')


def fail_when_other_began(place):
    while not (place / 'began').exists():
        time.sleep(0.05)
    fail()


def test_one_process_is_this_one():
    jobs = [functools.partial(where, name) for name in 'ab']
    assert list(run_all(jobs, 1)) == [f'{name} {os.getpid()} {CORES}' for name in 'ab']


@several
def test_two_processes_share_the_cores():
    lines = list(run_all([functools.partial(where, name) for name in 'abc'], 2))
    assert sorted(line[0] for line in lines) == ['a', 'b', 'c']
    places = {line.partition(' ')[2] for line in lines}
    assert len({place.partition(' ')[0] for place in places} - {str(os.getpid())}) == len(places)
    assert {place.partition(' ')[2] for place in places} <= {str(CORES[0::2]), str(CORES[1::2])}


@several
def test_a_job_that_fails_lets_the_others_save(tmp_path):
    jobs = [functools.partial(job, tmp_path) for job in (wait_for_signal, fail_when_other_began)]
    with pytest.raises(UserError, match='this job cannot work'):
        list(run_all(jobs, 2))
    assert (tmp_path / 'saved').exists()


@several
def test_a_process_that_ends_is_reported():
    with pytest.raises(UserError, match='a process ended'):
        list(run_all([functools.partial(os._exit, 3)], 2))


@pytest.mark.parametrize('processes', [0, len(CORES) + 1])
def test_more_processes_than_cores_are_refused(processes):
    with pytest.raises(ConfigError, match='it must be from 1 to'):
        list(run_all([], processes))
