"""One run at a time in a working directory."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from gcnet_jax.errors import CheckpointError
from gcnet_jax.files import as_place
from gcnet_jax.training import lock
from gcnet_jax.training.lock import LOCK_FILE, WorkdirLock, hold_workdir, this_process
from tests.bucket import local_bucket

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
from gcnet_jax.training.lock import hold_workdir
with hold_workdir(Path(sys.argv[1])):
    print('held', flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, seconds in (('BEAT_SECONDS', 0.05), ('STALE_SECONDS', 0.4), ('SETTLE_SECONDS', 0.0)):
        monkeypatch.setattr(lock, name, seconds)


@pytest.fixture
def without_flock(monkeypatch):
    """As on the file systems that have none."""
    monkeypatch.setattr(lock, '_flock', lambda file: None)


@pytest.fixture
def other_process(tmp_path):
    """A real process that holds the directory."""
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
    command = [sys.executable, '-c', HOLD, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == 'held\n'
        yield process
        process.kill()


def write_lock(workdir, age=0.0, **changes):
    """Leaves the lock of a process that does not renew it."""
    holder = dataclasses.replace(this_process(), **changes)
    path = workdir / LOCK_FILE
    path.write_text(json.dumps(dataclasses.asdict(holder)))
    os.utime(path, (time.time() - age,) * 2)
    return path


def gone(workdir):
    return not list(workdir.iterdir())


def test_a_second_run_is_refused_with_the_first_ones_process_host_and_time(tmp_path):
    with hold_workdir(tmp_path / 'new' / 'run'):
        with pytest.raises(CheckpointError, match=r'in use by process') as caught:
            WorkdirLock(tmp_path / 'new' / 'run')
        message = str(caught.value)
        assert f'process {os.getpid()} on {os.uname().nodename} since 20' in message
        assert '\n' not in message
    assert gone(tmp_path / 'new' / 'run')
    with hold_workdir(tmp_path / 'new' / 'run'):
        pass


def test_another_process_holds_it_until_it_is_killed(tmp_path, other_process):
    with pytest.raises(CheckpointError, match=f'in use by process {other_process.pid} on'):
        WorkdirLock(tmp_path)
    other_process.send_signal(signal.SIGKILL)
    other_process.wait()
    assert (tmp_path / LOCK_FILE).exists()
    with hold_workdir(tmp_path):
        pass
    assert gone(tmp_path)


def test_without_flock_the_process_itself_tells(tmp_path, other_process, without_flock):
    with pytest.raises(CheckpointError, match=f'in use by process {other_process.pid} on'):
        WorkdirLock(tmp_path)
    other_process.send_signal(signal.SIGKILL)
    other_process.wait()
    with hold_workdir(tmp_path, say=pytest.fail):
        pass


def test_a_reused_process_id_is_another_process(tmp_path, without_flock):
    write_lock(tmp_path, started='1')
    with hold_workdir(tmp_path, say=pytest.fail):
        pass
    write_lock(tmp_path)
    with pytest.raises(CheckpointError, match='in use'):
        WorkdirLock(tmp_path)


def test_a_forked_child_of_a_dead_run_does_not_block(tmp_path, monkeypatch):
    write_lock(tmp_path, started='1')
    found = iter([False, True])
    monkeypatch.setattr(lock, '_flock', lambda file: next(found))
    with hold_workdir(tmp_path):
        pass


def test_another_hosts_lock_that_is_renewed_is_respected(tmp_path):
    path = write_lock(tmp_path, host='far', machine='other')
    said = []

    def say(text):
        said.append(text)
        os.utime(path, (time.time() + 1,) * 2)

    with pytest.raises(CheckpointError, match=r'in use by process \d+ on far since'):
        WorkdirLock(tmp_path, say)
    assert len(said) == 1
    assert 'watching whether it still runs' in said[0]


def test_another_hosts_lock_that_is_not_renewed_is_left_over(tmp_path):
    write_lock(tmp_path, host='far', machine='other')
    said = []
    with hold_workdir(tmp_path, said.append):
        assert len(said) == 1
    write_lock(tmp_path, age=100, host='far', machine='other')
    with hold_workdir(tmp_path, say=pytest.fail):  # Not even watched.
        pass
    # A clock that is ahead does not keep it for ever.
    write_lock(tmp_path, age=-10_000, host='far', machine='other')
    with hold_workdir(tmp_path, say=said.append):
        pass


@pytest.mark.parametrize('content', ['', '{', '[]', 'null', '\x00' * 20, '{"pid": "x"}'])
def test_a_damaged_lock_does_not_block(tmp_path, content):
    (tmp_path / LOCK_FILE).write_text(content)
    with hold_workdir(tmp_path, say=pytest.fail):
        pass


def test_the_holder_renews_its_lock(tmp_path):
    with hold_workdir(tmp_path):
        os.utime(tmp_path / LOCK_FILE, (0, 0))
        deadline = time.monotonic() + 5
        while (tmp_path / LOCK_FILE).stat().st_mtime < 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize('how', ['taken', 'removed'])
def test_a_run_that_lost_its_lock_stops(tmp_path, how):
    with hold_workdir(tmp_path) as held:
        held.check()
        if how == 'taken':
            write_lock(tmp_path)
        else:
            (tmp_path / LOCK_FILE).unlink()
        held._thread.join(5)
        with pytest.raises(CheckpointError, match='removed or taken over by another run'):
            held.check()
    assert (tmp_path / LOCK_FILE).exists() == (how == 'taken')  # Not ours to remove.


def test_only_the_first_process_locks_and_all_are_refused_together(tmp_path, monkeypatch):
    with hold_workdir(tmp_path):
        monkeypatch.setattr(jax, 'process_index', lambda: 1)
        with hold_workdir(tmp_path) as none:
            assert none is None
        monkeypatch.setattr(lock, 'any_process', lambda failed: True)
        with (
            pytest.raises(CheckpointError, match='the first process cannot lock'),
            hold_workdir(tmp_path),
        ):
            pass


def test_a_directory_that_cannot_be_locked_is_one_line(tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('')
    for place, message in (('file', 'is a file'), ('file/run', 'cannot be written: Not a dir')):
        with pytest.raises(CheckpointError, match=message), hold_workdir(tmp_path / place):
            pass

    def refuse(*arguments):
        raise OSError(30, 'Read-only file system')

    monkeypatch.setattr(lock.os, 'open', refuse)
    with pytest.raises(CheckpointError, match='Read-only file system'), hold_workdir(tmp_path):
        pass


def test_a_bucket_is_locked_by_its_heartbeat(tmp_path):
    with local_bucket(tmp_path) as bucket:
        workdir = as_place(f'{bucket}/run')
        with hold_workdir(workdir):
            with pytest.raises(CheckpointError, match=r'gs://bucket/run is in use by process'):
                WorkdirLock(workdir)
            first = json.loads((workdir / LOCK_FILE).read_text())
            deadline = time.monotonic() + 5
            while json.loads((workdir / LOCK_FILE).read_text()) == first:
                assert time.monotonic() < deadline
                time.sleep(0.06)
        assert not (workdir / LOCK_FILE).exists()
        said = []
        for changes in ({'started': '1'}, {'machine': 'other'}):
            holder = dataclasses.asdict(dataclasses.replace(this_process(), **changes))
            content = json.dumps(holder | {'beat': time.time()})
            (workdir / LOCK_FILE).write_text(content)
            with hold_workdir(workdir, said.append):
                pass
        assert len(said) == 1  # Only another machine's has to be watched.


def test_a_bucket_that_refuses_is_one_line(tmp_path, monkeypatch):
    with local_bucket(tmp_path) as bucket:
        workdir = as_place(f'{bucket}/run')

        def refuse(self, place):
            raise KeyError('Anonymous caller does not have access\nto the bucket')

        monkeypatch.setattr(WorkdirLock, '_content', refuse)
        with (
            pytest.raises(CheckpointError, match=r'^--workdir gs://bucket/run cannot be used') as c,
            hold_workdir(workdir),
        ):
            pass
        assert str(c.value).isprintable()
