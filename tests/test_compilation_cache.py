"""What was compiled is kept where it should be, is used again, and never stands in the way."""

import contextlib
import os
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import monitoring

from gcnet_jax import compilation_cache as module
from gcnet_jax.__main__ import main
from gcnet_jax.compilation_cache import compilation_cache, tidy, user_directory
from gcnet_jax.errors import ConfigError

HIT = '/jax/compilation_cache/cache_hits'


@pytest.fixture(autouse=True)
def enabled():
    with settings(jax_enable_compilation_cache=True):
        yield


@contextlib.contextmanager
def settings(**values):
    before = {name: getattr(jax.config, name) for name in values}
    for name, value in values.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope='module')
def heard():
    seen = []
    monitoring.register_event_listener(lambda event, **_: seen.append(event))
    return seen


@pytest.fixture
def hits(heard):
    """A function that counts the programs that were found."""
    heard.clear()
    return lambda: heard.count(HIT)


def compute():
    """Compiles afresh, as a new process does: nothing of it is in memory."""
    jax.clear_caches()
    return np.asarray(jax.jit(lambda x: x * 3 + 1)(np.arange(4.0, dtype=np.float32)))


def entries(directory):
    return sorted(directory.rglob('*-cache'))


def test_what_was_compiled_is_found_again(tmp_path, hits):
    with compilation_cache(tmp_path):
        first = compute()
    (entry,) = entries(tmp_path)
    assert entry.parent == tmp_path / module._machine()
    assert hits() == 0
    with compilation_cache(tmp_path):
        np.testing.assert_array_equal(compute(), first)
    assert hits() == 1
    assert jax.config.jax_compilation_cache_dir is None
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 1.0
    compute()
    assert hits() == 1  # No longer looked for.


def test_each_kind_of_processor_has_its_own(monkeypatch, tmp_path):
    name = module._machine()
    assert name.startswith('cpu-')
    monkeypatch.setattr(os, 'sched_getaffinity', lambda process: set(range(99)))
    assert module._machine() != name
    monkeypatch.undo()
    information = Path('/proc/cpuinfo').read_text()
    assert 'MHz' in information  # It changes all the time.
    monkeypatch.setattr(Path, 'read_text', lambda self: information.replace('cpu MHz\t', 'x\t'))
    assert module._machine() == name
    monkeypatch.setattr(Path, 'read_text', lambda self: information.replace(' sse2', ''))
    assert module._machine() != name


def test_a_setting_is_for_a_directory_or_off(tmp_path):
    with compilation_cache(tmp_path / 'default', str(tmp_path / 'shared')):
        compute()
    assert len(entries(tmp_path / 'shared')) == 1
    with compilation_cache(tmp_path / 'default', 'off'):
        compute()
    assert not (tmp_path / 'default').exists()


def test_the_settings_of_jax_win_over_the_default(tmp_path):
    own = tmp_path / 'own'
    with settings(jax_compilation_cache_dir=str(own), jax_persistent_cache_min_compile_time_secs=0):
        module.reset_cache()
        with compilation_cache(tmp_path / 'default'):
            compute()
        assert len(entries(own)) == 1
        with compilation_cache(tmp_path / 'default', str(tmp_path / 'shared')):
            compute()
        with compilation_cache(tmp_path / 'default', 'off'):
            compute()
        assert len(entries(own)) == len(entries(tmp_path / 'shared')) == 1
    module.reset_cache()
    with settings(jax_enable_compilation_cache=False), compilation_cache(tmp_path / 'default'):
        compute()
    assert not (tmp_path / 'default').exists()


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    'damage', [lambda content: content[: len(content) // 2], lambda content: b'', flipped]
)
def test_a_damaged_entry_is_replaced(tmp_path, hits, damage):
    with compilation_cache(tmp_path):
        first = compute()
    (entry,) = entries(tmp_path)
    entry.write_bytes(damage(entry.read_bytes()))
    with compilation_cache(tmp_path):  # And no warning, which would be an error here.
        np.testing.assert_array_equal(compute(), first)
    assert hits() == 0
    zlib.decompress(entry.read_bytes())


def test_an_entry_that_rots_later_is_compiled_again(tmp_path, hits):
    """It was found whole before, so it is not looked at again; JAX itself sees the damage."""
    with compilation_cache(tmp_path):
        compute()
    (entry,) = entries(tmp_path)
    old = entry.stat().st_mtime - 100
    with compilation_cache(tmp_path):
        entry.write_bytes(entry.read_bytes()[:-9])
        os.utime(entry, (old, old))
    with compilation_cache(tmp_path), pytest.warns(UserWarning, match='Error reading persistent'):
        assert compute()[1] == 4.0
    assert hits() == 0


def test_the_oldest_go_when_there_are_too_many(tmp_path):
    content = zlib.compress(bytes(range(256)) * 10, 0)
    for age in range(5):
        path = tmp_path / f'{age}-cache'
        path.write_bytes(content)
        os.utime(path, (1e9 - age, 1e9 - age))
    (tmp_path / 'note').write_bytes(b'not an entry')
    tidy(tmp_path, max_bytes=3 * len(content))
    assert [path.name for path in entries(tmp_path)] == ['0-cache', '1-cache', '2-cache']
    assert (tmp_path / 'note').exists()


def test_a_place_that_cannot_be_used(tmp_path):
    blocked = tmp_path / 'file'
    blocked.write_text('')
    with compilation_cache(blocked):  # Nobody asked for it.
        assert compute()[1] == 4.0
    with pytest.raises(ConfigError, match=r'compilation_cache .*file cannot be used: Not a dir'):
        compilation_cache(tmp_path, str(blocked)).__enter__()


def test_a_user_without_a_home_computes_without_a_cache(tmp_path, monkeypatch):
    def homeless(self):
        raise RuntimeError('Could not determine home directory.')

    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
    monkeypatch.setattr(Path, 'expanduser', homeless)
    with compilation_cache(user_directory()):
        assert jax.config.jax_compilation_cache_dir is None
    with pytest.raises(ConfigError, match='~nobody/x cannot be used: Could not determine home'):
        compilation_cache(tmp_path, '~nobody/x').__enter__()


def test_a_place_that_others_can_write_to_is_not_used(tmp_path, monkeypatch):
    """Its programs would be run; so it is with every directory above it."""
    parent = tmp_path / 'parent'
    place = parent / module._machine()
    place.mkdir(0o700, parents=True)

    def used():
        with compilation_cache(parent):
            return jax.config.jax_compilation_cache_dir is not None

    assert used()
    for directory in (place, parent):
        directory.chmod(0o702)
        assert not used()
        with pytest.raises(ConfigError, match=r'its programs would be run, and others can write'):
            compilation_cache(tmp_path, str(parent)).__enter__()
        directory.chmod(0o700)
    assert used()
    monkeypatch.setattr(os, 'geteuid', lambda: place.stat().st_uid + 1)
    if place.stat().st_uid:  # What belongs to root is trusted.
        assert not used()


@pytest.mark.parametrize('plant', ['link', 'fifo', 'writable', 'directory'])
def test_an_entry_that_is_not_the_users_own_file_is_never_read(tmp_path, plant, hits):
    with compilation_cache(tmp_path):
        compute()
    (entry,) = entries(tmp_path)
    elsewhere = tmp_path / 'elsewhere'
    entry.rename(elsewhere)
    if plant == 'link':
        entry.symlink_to(elsewhere)
    elif plant == 'fifo':
        os.mkfifo(entry)
    elif plant == 'directory':
        entry.mkdir()
    else:
        entry.write_bytes(elsewhere.read_bytes())
        entry.chmod(0o666)
    with compilation_cache(tmp_path):
        assert compute()[1] == 4.0
    assert hits() == 0


def test_an_entry_that_swells_is_removed_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'MAX_PROGRAM_BYTES', 10**7)
    bomb, large = tmp_path / 'bomb-cache', tmp_path / 'large-cache'
    bomb.write_bytes(zlib.compress(bytes(10**7 + 1)))
    large.write_bytes(zlib.compress(bytes(10**7)))
    tidy(tmp_path)
    assert entries(tmp_path) == [large]


def test_an_entry_that_is_cut_short_during_the_check_is_found_by_the_next(tmp_path, monkeypatch):
    (tmp_path / 'whole-cache').write_bytes(zlib.compress(b'program'))
    cut, is_damaged = tmp_path / 'cut-cache', module._is_damaged

    def write_meanwhile(entry):
        cut.write_bytes(b'progr')
        return is_damaged(entry)

    monkeypatch.setattr(module, '_is_damaged', write_meanwhile)
    tidy(tmp_path)
    monkeypatch.undo()
    assert cut.exists()
    tidy(tmp_path)
    assert [path.name for path in entries(tmp_path)] == ['whole-cache']


def test_a_command_keeps_it_among_the_users_files_and_not_in_the_checkpoint(
    tmp_path, monkeypatch, capsys, random_variables
):
    from PIL import Image

    from gcnet_jax.stored import ModelDescription, write_ported

    options = {'num_classes': 2, 'widths': (8,), 'stage_sizes': (1,), 'context': None}
    description = ModelDescription('gccnn', options)
    images = np.zeros((1, 8, 8, 3), np.float32)
    checkpoint = tmp_path / 'checkpoint'
    variables = random_variables(description.build(), images, train=False)
    write_ported(checkpoint, description, variables)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / 'black.png')
    files = set(checkpoint.rglob('*'))
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'caches'))
    assert user_directory() == tmp_path / 'caches' / 'gcnet_jax' / 'compiled'
    assert main(['predict', '--checkpoint', str(checkpoint), str(tmp_path / 'black.png')]) == 0
    assert 'class' in capsys.readouterr().out
    assert set(checkpoint.rglob('*')) == files
    place = entries(user_directory())[0].parent
    assert place.stat().st_mode & 0o077 == 0  # Who can write there can run programs.
    assert jax.config.jax_compilation_cache_dir is None
    monkeypatch.delenv('XDG_CACHE_HOME')
    assert user_directory().expanduser() == Path.home() / '.cache' / 'gcnet_jax' / 'compiled'


def test_the_library_sets_no_cache():
    code = (
        'import jax, gcnet_jax.inference.classifier, gcnet_jax.training.loop, gcnet_jax.__main__\n'
        'assert jax.config.jax_compilation_cache_dir is None'
    )
    environment = {name: value for name, value in os.environ.items() if 'CACHE' not in name}
    subprocess.run([sys.executable, '-c', code], check=True, env=environment)


def test_a_bucket_is_no_place_for_programs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(ConfigError, match=r'compilation_cache gs:/b/c is a URL; name a local path'),
        compilation_cache(tmp_path, 'gs://b/c'),
    ):
        pass
    assert not list(tmp_path.iterdir())
