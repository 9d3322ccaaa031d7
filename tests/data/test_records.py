"""Preparing aside: what is visible meanwhile, and what becomes of what a killed process left."""

import os
import stat
import subprocess
import sys

import pytest

from gcnet_jax.data import digits, records


def age(place, seconds):
    """Makes a directory look as if it had last changed that long ago."""
    then = place.stat().st_mtime - seconds
    os.utime(place, (then, then))


@pytest.fixture
def killed(tmp_path):
    """The directory that a process left which was killed while it prepared a set."""
    script = (
        'import os, pathlib, sys\n'
        'from gcnet_jax.data import records\n'
        'with records._directory_aside(pathlib.Path(sys.argv[1])) as aside:\n'
        '    os.kill(os.getpid(), 9)\n'
    )
    result = subprocess.run([sys.executable, '-c', script, str(tmp_path)], check=False)
    assert result.returncode == -9
    (left,) = tmp_path.iterdir()
    return left


def test_what_a_killed_process_left_is_removed(killed, tmp_path):
    digits.prepare_digits(str(tmp_path / 'other'))
    assert killed.exists()
    age(killed, 3600)
    digits.prepare_digits(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ['digits', 'other']


def test_what_is_in_use_or_young_or_somebody_elses_stays(tmp_path):
    stranger = tmp_path / f'{records.ASIDE_PREFIX}elsewhere-1'
    stranger.mkdir()
    age(stranger, 3600)
    linked = tmp_path / 'precious'
    linked.mkdir()
    (linked / 'file').write_text('')
    (tmp_path / f'{records._own_prefix()}link').symlink_to(linked)
    young = tmp_path / f'{records._own_prefix()}young'
    young.mkdir()
    with records._directory_aside(tmp_path) as aside:
        place = tmp_path / aside
        age(place, 3600)
        digits.prepare_digits(str(tmp_path))
        assert place.is_dir()
    assert stranger.is_dir()
    assert young.is_dir()
    assert (linked / 'file').exists()
    age(stranger, 30 * 24 * 3600)
    records._remove_leftovers(tmp_path)
    assert not stranger.exists()


def test_it_is_private_meanwhile_and_readable_as_the_umask_says_at_the_end(tmp_path, monkeypatch):
    modes = []
    prepare = records.ImageSet.download_and_prepare

    def spy(self, **options):
        (aside,) = tmp_path.glob(f'{records.ASIDE_PREFIX}*')
        modes.append(stat.S_IMODE(aside.stat().st_mode))
        prepare(self, **options)

    monkeypatch.setattr(records.ImageSet, 'download_and_prepare', spy)
    old = os.umask(0o022)
    try:
        place = digits.prepare_digits(str(tmp_path))
    finally:
        os.umask(old)
    assert modes == [0o700]
    assert stat.S_IMODE(place.parent.stat().st_mode) == 0o755
    assert stat.S_IMODE(place.stat().st_mode) == 0o755
    for path in place.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o644, path
