"""How processes are connected; and, in the long tests, real ones: two and four on this machine."""

import collections
import io
import itertools
import json
import os
import signal
import threading
import time
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from gcnet_jax.data.sources import load_source
from gcnet_jax.errors import ConfigError
from gcnet_jax.training import processes
from gcnet_jax.training.config import default_config
from gcnet_jax.training.metrics import read_metrics
from gcnet_jax.training.processes import (
    Interrupted,
    Preemption,
    ProcessError,
    connect,
)
from tests.training.compare_runs import without_timing
from tests.training.real_runs import HERE, complete, running


def test_one_process_connects_to_nothing(monkeypatch):
    monkeypatch.setattr(jax.distributed, 'initialize', lambda **options: pytest.fail('connected'))
    connect(default_config())
    assert not processes.any_process(False)
    assert processes.any_process(True)
    assert processes.sum_over_processes(2.5) == 2.5
    assert processes.leave(3) == 3


def test_the_config_says_how_to_connect(monkeypatch):
    given = {}
    monkeypatch.setattr(jax.distributed, 'initialize', lambda **options: given.update(options))
    config = default_config()
    config.runtime.distributed = True
    config.runtime.coordinator_address = 'first:1234'
    config.runtime.num_processes = 4
    config.runtime.process_id = 2
    config.runtime.heartbeat_timeout_seconds = 7
    connect(config)
    assert given == {
        'coordinator_address': 'first:1234',
        'num_processes': 4,
        'process_id': 2,
        'heartbeat_timeout_seconds': 7,
    }


def test_a_cluster_that_is_not_there_is_one_line(monkeypatch):
    def refuse(**options):
        raise ValueError('coordinator_address should\nbe defined.')

    monkeypatch.setattr(jax.distributed, 'initialize', refuse)
    config = default_config()
    config.runtime.distributed = True
    with pytest.raises(ConfigError, match=r'should be defined. .*coordinator_address') as caught:
        connect(config)
    assert '\n' not in str(caught.value)


def test_processes_that_are_not_connected_are_refused(monkeypatch):
    processes.check_connected()
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    with pytest.raises(ConfigError, match=r'process 0 of 2, but config.runtime.distributed'):
        processes.check_connected()


def test_sigterm_is_heard_until_the_run_is_over():
    before = signal.getsignal(signal.SIGTERM)
    with Preemption() as preemption:
        assert not preemption.stops_at(1)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            assert preemption.stops_at(2)
    assert signal.getsignal(signal.SIGTERM) is before


def test_ctrl_c_saves_once_there_is_something_to_save():
    with Preemption() as preemption:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        preemption.begin()
        signal.raise_signal(signal.SIGINT)
        assert preemption.stops_at(2)
        assert preemption.stop is Interrupted
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize('handler', [signal.SIG_IGN, lambda number, frame: None])
def test_somebody_elses_handling_of_ctrl_c_is_left_alone(handler):
    before = signal.signal(signal.SIGINT, handler)
    try:
        with Preemption():
            assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_in_one_of_several_processes_is_passed_on(monkeypatch):
    """JAX's runtime hears SIGTERM and lets all processes stop at the same step."""
    monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
    sent = []
    monkeypatch.setattr(os, 'kill', lambda *arguments: sent.append(arguments))
    with Preemption() as preemption:
        preemption.begin()
        signal.raise_signal(signal.SIGINT)
        assert preemption.stop is Interrupted
    assert sent == [(os.getpid(), signal.SIGTERM)]


def test_a_run_in_another_thread_leaves_signals_alone():
    before = signal.getsignal(signal.SIGTERM)

    def run():
        with Preemption() as preemption:
            heard.append(preemption.stops_at(1))

    heard = []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert heard == [False]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_lost_process_is_one_line(monkeypatch):
    lost = jax.errors.JaxRuntimeError('UNKNOWN: Gloo all-reduce failed:\nConnection reset by peer')
    with pytest.raises(jax.errors.JaxRuntimeError), processes.explain_lost_process():
        raise lost  # One process has lost none.
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    message = r'lost another one .*reset by peer'
    with pytest.raises(ProcessError, match=message) as caught, processes.explain_lost_process():
        raise lost
    assert '\n' not in str(caught.value)
    with pytest.raises(jax.errors.JaxRuntimeError), processes.explain_lost_process():
        raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: out of memory')


STEPS = 48  # As tiny_config.py says.
SETTINGS = (
    # So slow that the rounding of another order of the sums stays as small as it was: at 1e-4 it
    # grows a thousandfold where a ReLU opens for one and not for the other.
    '--config.schedule.peak_learning_rate=1e-5',
    '--config.runtime.heartbeat_timeout_seconds=30',
)
RECORDING = HERE / 'record_examples.py'


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    return tmp_path_factory.mktemp('runs')


@pytest.fixture(scope='module')
def alone(place):
    """The lines of metrics of one process with one device."""
    complete(place / 'alone', *SETTINGS, place=place, program=RECORDING)
    return without_timing(place / 'alone')


def close(workdir, alone):
    """Asserts the same lines of metrics up to rounding; returns the losses' largest difference."""
    lines = without_timing(workdir)
    assert [list(line) for line in lines] == [list(line) for line in alone]
    largest = 0.0
    for one, two in zip(lines, alone, strict=True):
        for name, value in one.items():
            if name in ('step', 'eval/examples', 'eval/accuracy', 'eval/top5', 'train/accuracy'):
                assert value == two[name]
            elif name.endswith('loss'):
                assert value == pytest.approx(two[name], rel=1e-5)
                largest = max(largest, abs(value - two[name]))
            else:
                assert value == pytest.approx(two[name], rel=1e-4)
    return largest


def read(workdir, kind, count):
    """The checksums of the images of every batch, the parts of all processes put together."""
    files = [Path(f'{workdir}-{kind}-{index}.jsonl') for index in range(count)]
    parts = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    # What was read ahead when the run ended may differ.
    return [list(itertools.chain(*batch)) for batch in zip(*parts, strict=False)]


def all_images(place, split):
    source = load_source('digits', split, str(place / 'data'))
    for index in range(len(source)):
        image = Image.open(io.BytesIO(source[index]['image'])).convert('RGB')
        yield zlib.crc32(np.asarray(image).tobytes())


@pytest.mark.slow
def test_several_processes_do_what_one_does(place, alone):
    workdir, count = place / 'together', 4
    run = complete(
        workdir,
        *SETTINGS,
        '--config.mesh.fsdp=2',
        place=place,
        processes=count,
        program=RECORDING,
    )
    print(f'{count} processes: losses differ by at most {close(workdir, alone):.1e}')

    # Every example once an epoch, in the order of one process.
    batches = read(workdir, 'train', count)[:STEPS]
    assert batches == read(place / 'alone', 'train', 1)[:STEPS]
    order = list(itertools.chain(*batches))
    expected = collections.Counter(all_images(place, 'train[:300]'))
    assert sum(expected.values()) == 300
    for epoch in range(len(order) // 300):
        assert collections.Counter(order[epoch * 300 : (epoch + 1) * 300]) == expected
    # Evaluation sees every example once, twice in the run.
    seen = collections.Counter(itertools.chain(*read(workdir, 'evaluation', count)))
    twice = collections.Counter(all_images(place, 'test[:37]'))
    assert seen == twice + twice
    assert [line['eval/examples'] for line in alone if 'eval/examples' in line] == [37, 37]

    # Each wrote its own share of the checkpoint; only the first one says anything.
    parts = (workdir / 'checkpoints' / str(STEPS) / 'variables').glob('ocdbt.process_*')
    assert sorted(part.name for part in parts) == [f'ocdbt.process_{i}' for i in range(count)]
    assert f'step {STEPS}/{STEPS}' in run.printed(0)
    for index in range(1, count):
        assert 'step' not in run.printed(index)


@pytest.mark.slow
def test_sigterm_to_one_stops_all_at_one_step_and_one_process_continues(place, alone):
    workdir = place / 'stopped'
    with running(workdir, *SETTINGS, '--config.mesh.fsdp=2', place=place, processes=2) as run:
        run.wait_until(lambda: run.step() >= 3)
        run.send(signal.SIGTERM, 1)
        time.sleep(0.05)
        run.send(signal.SIGTERM, 1)
        assert run.codes() == [75, 75]
    newest = max(int(path.name) for path in (workdir / 'checkpoints').iterdir())
    assert 3 <= newest < STEPS
    assert f'SIGTERM: stopped after step {newest} of {STEPS}' in run.printed(0)
    assert 'stopped after' not in run.printed(1)
    assert read_metrics(workdir)[-1]['step'] == newest
    # Another number of processes, and another mesh: its checkpoint is anyone's.
    run = complete(workdir, *SETTINGS, '--config.mesh.spatial=2', place=place, devices=4)
    assert f'continuing from step {newest}\n' in run.printed()
    close(workdir, alone)


@pytest.mark.slow
@pytest.mark.parametrize('victim', [0, 1])
def test_when_one_is_killed_the_other_ends_and_a_restart_continues(place, alone, victim):
    workdir = place / f'killed_{victim}'
    options = {'place': place, 'processes': 2}
    with running(workdir, *SETTINGS, **options) as run:
        run.wait_until(lambda: run.step() >= 18)  # There is a checkpoint at 15.
        run.send(signal.SIGKILL, victim)
        began = time.monotonic()
        codes = run.codes()
        seconds = time.monotonic() - began
    assert codes[victim] == -signal.SIGKILL
    # 1 where the connection broke, SIGABRT where the runtime missed the heartbeat first.
    assert codes[1 - victim] in (1, -signal.SIGABRT)
    assert seconds < 60
    print(f'process {victim} killed: the other ended with {codes[1 - victim]} in {seconds:.1f} s')
    run = complete(workdir, *SETTINGS, **options)
    assert 'continuing from step' in run.printed()
    close(workdir, alone)


@pytest.mark.slow
def test_a_process_that_falls_silent_is_given_up_after_the_heartbeat_timeout(place):
    """Nothing is closed here, as when a host loses its network: only the heartbeats are missing."""
    workdir, seconds = place / 'silent', 10  # The default is 100.
    settings = (*SETTINGS[:-1], f'--config.runtime.heartbeat_timeout_seconds={seconds}')
    with running(workdir, *settings, place=place, processes=2) as run:
        run.wait_until(lambda: run.step() >= 3)
        run.send(signal.SIGSTOP, 1)
        began = time.monotonic()
        assert run.processes[0].wait(120) != 0
        waited = time.monotonic() - began
    print(f'heartbeat {seconds} s: given up after {waited:.1f} s')
    assert 0.4 * seconds < waited < seconds + 30
