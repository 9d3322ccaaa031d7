"""Real runs that are killed or told to stop, and continued with the same command."""

import os
import random
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest

from gcnet_jax.stored import load_variables
from tests.training.compare_runs import without_timing
from tests.training.real_runs import complete, running, stored_sums

pytestmark = pytest.mark.slow

STEPS = 100
SETTINGS = (
    f'--config.training.total_steps={STEPS}',
    '--config.training.checkpoint_steps=7',
    '--config.training.evaluation_steps=50',
    '--config.data.augmentation=pad_crop',
)
KILLS = 6


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    return tmp_path_factory.mktemp('runs')


@pytest.fixture(scope='module')
def whole(place):
    """The workdir of a run that nothing disturbed."""
    complete(place / 'whole', *SETTINGS, place=place)
    return place / 'whole'


def saving(workdir):
    """Whether a checkpoint is being written: until it is whole it has another name."""
    return any(not path.name.isdigit() for path in (workdir / 'checkpoints').glob('*'))


def the_same(workdir, whole):
    """Asserts that two runs gave the same, bit for bit."""
    lines = without_timing(whole)
    assert len(lines) == STEPS + STEPS // 50
    assert without_timing(workdir) == lines
    assert stored_sums(workdir, STEPS) == stored_sums(whole, STEPS)
    one, two = load_variables(workdir)[1], load_variables(whole)[1]
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_killed_at_six_random_moments_it_gives_the_same_bit_for_bit(place, whole):
    """Three times during a save, once before anything was saved, else at any moment."""
    workdir, rng = place / 'killed', random.Random(1)
    # Compiled programs of its own, which the kills may cut short too.
    settings = (*SETTINGS, f'--config.runtime.compilation_cache={workdir / "compilation_cache"}')
    during_a_save, reached = 0, []
    for number in range(KILLS):
        with running(workdir, *settings, place=place) as run:
            if number == 0:
                run.wait_until((workdir / 'config.json').exists)
            else:
                target = run.step() + rng.randint(1, 6)
                run.wait_until(lambda target=target: run.step() >= target)
            if number in (1, 3, 5):
                run.wait_until(lambda: saving(workdir))
            else:
                time.sleep(rng.uniform(0, 0.1))
            run.send(signal.SIGKILL)
            assert run.codes() == [-signal.SIGKILL]
        during_a_save += saving(workdir)
        reached.append(run.step())
    assert during_a_save >= 3
    assert reached[0] == 0
    assert reached[-1] < STEPS
    run = complete(workdir, *settings, place=place)
    assert 'continuing from step' in run.printed()
    assert list(workdir.glob('compilation_cache/*/jit_step-*'))
    print(f'killed after the lines of steps {reached}, {during_a_save} times during a save')
    the_same(workdir, whole)


def test_sigterm_saves_at_once_and_has_a_code_of_its_own(place, whole):
    workdir = place / 'stopped'
    with running(workdir, *SETTINGS, '--config.data.num_workers=1', place=place) as run:
        run.wait_until(lambda: run.step() >= 30)
        run.send(signal.SIGTERM)
        run.send(signal.SIGTERM)  # Schedulers repeat it.
        assert run.codes() == [75]
    newest = max(int(path.name) for path in (workdir / 'checkpoints').iterdir())
    assert newest >= 30
    assert f'stopped after step {newest} of {STEPS}, which is saved' in run.printed()
    assert newest == run.step()
    run = complete(workdir, *SETTINGS, place=place)
    assert f'continuing from step {newest}\n' in run.printed()
    the_same(workdir, whole)


def test_sigterm_before_the_first_step_stops_there_too(place):
    workdir = place / 'early'
    with running(workdir, *SETTINGS, place=place) as run:
        run.wait_until((workdir / 'checkpoints').exists)
        run.send(signal.SIGTERM)
        assert run.codes() == [75]
    assert 'SIGTERM: stopped after step' in run.printed()


def test_ctrl_c_saves_too(place, whole):
    """A terminal sends it to the processes that read the data as well."""
    workdir = place / 'interrupted'
    settings = (*SETTINGS, '--config.data.num_workers=2')
    with running(workdir, *settings, place=place) as run:
        run.wait_until(lambda: run.step() >= 30)
        command = ['pgrep', '-P', str(run.processes[0].pid)]
        children = subprocess.run(command, capture_output=True, text=True).stdout.split()
        assert len(children) >= 2
        for child in map(int, children):
            os.kill(child, signal.SIGINT)
        run.send(signal.SIGINT)
        assert run.codes() == [130]
    printed = run.printed()
    newest = max(int(path.name) for path in (workdir / 'checkpoints').iterdir())
    assert f'Ctrl-C: stopped after step {newest} of {STEPS}, which is saved' in printed
    assert 'Traceback' not in printed
    complete(workdir, *settings, place=place)
    the_same(workdir, whole)


def test_a_second_run_is_refused_and_leaves_the_first_alone(place, whole):
    workdir = place / 'shared'
    with running(workdir, *SETTINGS, place=place) as first:
        first.wait_until(lambda: first.step() >= 1)
        with running(workdir, *SETTINGS, place=place) as second:
            assert second.codes() == [1]
        assert f'is in use by process {first.processes[0].pid} on ' in second.printed()
        assert second.printed().count('\n') == 1
        assert first.codes() == [0]
    the_same(workdir, whole)


@pytest.mark.skipif(os.geteuid() != 0, reason='only root may mount a file system')
def test_a_disk_that_fills_up_is_one_line(place):
    disk = place / 'disk'
    disk.mkdir()
    subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=900k', 'tmpfs', str(disk)], check=True)
    try:
        settings = ('--config.training.checkpoint_steps=2', '--config.training.keep_checkpoints=9')
        with running(disk / 'run', *SETTINGS, *settings, place=place) as run:
            assert run.codes() == [1]
    finally:
        subprocess.run(['umount', str(disk)], check=True)
    lines = [line for line in run.printed().splitlines() if not line.startswith('step ')]
    assert len(lines) == 3, lines
    assert lines[1] == 'compiling the training step'
    assert lines[2].startswith('train.py: no space left on the device of ')


def test_a_damaged_newest_checkpoint_costs_steps_and_nothing_else(place, whole):
    """The last checkpoint of a run is damaged; the run continues from the one before.

    Other damage is in test_checkpoints.py.
    """
    workdir = place / 'damaged'
    shutil.copytree(whole, workdir)
    newest = workdir / 'checkpoints' / str(STEPS)
    for path in (newest / 'training').rglob('d/*'):
        content = bytearray(path.read_bytes())
        # All over the file: which parts hold the newest version of a node is not known.
        content[32::64] = bytes(byte ^ 1 for byte in content[32::64])
        path.write_bytes(content)
    run = complete(workdir, *SETTINGS, place=place)
    assert f'checkpoint {newest} is damaged, trying the one before' in run.printed()
    assert f'continuing from step {STEPS - STEPS % 7}\n' in run.printed()
    assert 'Traceback' not in run.printed()
    the_same(workdir, whole)
