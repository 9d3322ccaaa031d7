"""Ported directories and files: complete, or not there at all and one line that says why."""

import errno

import pytest

from gcnet_jax.__main__ import main
from gcnet_jax.errors import CheckpointError, ConfigError
from gcnet_jax.porting import port, port_reverse
from tests.porting.test_load import saved


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    return saved(tmp_path_factory.mktemp('plain') / 'a.safetensors', 'resnet20', 'torchvision')


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'cat\ndog\n', 'has 2 lines and resnet20 has 10 classes'),
        (b'cat\n\ndog\n', 'an empty line'),
        (b'', 'an empty line'),
        (b'\xff\xfe\xff', 'cannot be read'),
        (None, 'is not a file'),
    ],
)
def test_label_names_that_cannot_be_leave_no_directory(tmp_path, plain, content, message):
    names = tmp_path / 'names.txt'
    if content is not None:
        names.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        port(plain, tmp_path / 'ported', label_names=names)
    assert not (tmp_path / 'ported').exists()


def test_no_space_leaves_no_directory(tmp_path, plain, monkeypatch):
    def full(directory, *_):
        directory.mkdir()
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr('gcnet_jax.porting.port_checkpoint.write_ported', full)
    with pytest.raises(CheckpointError, match=r'cannot write .*No space left on device'):
        port(plain, tmp_path / 'out')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', ['out.safetensors', 'out'])
def test_a_reverse_port_that_cannot_be_written_ends_in_one_line(tmp_path, plain, name, capsys):
    """A file stands where the directory of the target should be."""
    port(plain, tmp_path / 'ours')
    (tmp_path / 'file').write_text('')
    arguments = ['--reverse', str(tmp_path / 'ours'), '--family', 'torchvision']
    assert main(['port', *arguments, '--out', str(tmp_path / 'file' / name)]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert 'cannot write' in lines[0]
    assert 'Not a directory' in lines[0]


def test_the_home_directory_in_every_path_of_a_port(tmp_path, plain, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'a.safetensors').symlink_to(plain)
    (tmp_path / 'names.txt').write_text(''.join(f'class {n}\n' for n in range(10)))
    port('~/a.safetensors', '~/ours', label_names='~/names.txt')
    port_reverse('~/ours', 'torchvision', '~/back.safetensors')
    assert (tmp_path / 'ours').is_dir()
    assert (tmp_path / 'back.safetensors').is_file()


def test_label_names_with_other_line_breaks_are_refused(tmp_path, plain):
    """A form feed or U+2028 inside a name would otherwise make two of it."""
    for letter in ('\f', '\u2028', '\x1b'):
        (tmp_path / 'names.txt').write_text(f'a{letter}b\n' + 'x\n' * 9, encoding='utf-8')
        with pytest.raises(ConfigError, match=r'line 1 of .*names.txt, .* line break') as caught:
            port(plain, tmp_path / 'out', label_names=tmp_path / 'names.txt')
        assert str(caught.value).isprintable()
