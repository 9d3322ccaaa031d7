"""Reading files of strangers, and writing whole or not at all."""

import os
from pathlib import Path

import pytest

from gcnet_jax import files
from gcnet_jax.errors import CheckpointError, ConfigError
from gcnet_jax.files import (
    as_path,
    as_place,
    explain_bucket,
    is_bucket,
    read_bytes,
    read_json,
    read_text,
    write_whole,
)
from tests.bucket import local_bucket


def test_no_more_than_the_limit_is_read(tmp_path):
    path = tmp_path / 'file'
    path.write_bytes(b'12345')
    assert read_bytes(path, 5, CheckpointError) == b'12345'
    with pytest.raises(CheckpointError, match=r'file has 5 bytes; at most 4 are read'):
        read_bytes(path, 4, CheckpointError)


def test_a_sparse_file_is_refused_by_its_size(tmp_path):
    path = tmp_path / 'sparse'
    with path.open('wb') as file:
        file.truncate(2**40)
    with pytest.raises(CheckpointError, match=r'1,099,511,627,776 bytes'):
        read_bytes(path, 10**9, CheckpointError)


@pytest.mark.parametrize('make', [os.mkfifo, os.mkdir], ids=['fifo', 'directory'])
def test_only_regular_files_are_read(tmp_path, make):
    path = tmp_path / 'place'
    make(path)
    with pytest.raises(CheckpointError, match=r'not a regular file|Is a directory'):
        read_bytes(path, 10, CheckpointError)


@pytest.mark.parametrize('path', ['/dev/zero', '/dev/null', 'no such', 'nul\0byte', '\x1b[2J'])
def test_what_cannot_be_read_is_named_on_one_line(path):
    with pytest.raises(CheckpointError) as caught:
        read_bytes(path, 10, CheckpointError)
    assert str(caught.value).isprintable()


def test_text_is_utf8_with_or_without_a_mark(tmp_path):
    path = tmp_path / 'names.txt'
    path.write_bytes(b'\xef\xbb\xbf\xc3\xa9t\xc3\xa9')
    assert read_text(path, 100, CheckpointError) == 'été'
    path.write_bytes(b'\xe9t\xe9')
    with pytest.raises(CheckpointError, match=r'not UTF-8 text: byte 0 is 0xe9'):
        read_text(path, 100, CheckpointError)


@pytest.mark.parametrize('text', ['', '{', '[' * 100_000, '\x1b', '1' * 10_000, 'nul'])
def test_damaged_json_is_one_line(tmp_path, text):
    path = tmp_path / 'file.json'
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r'file.json is damaged JSON') as caught:
        read_json(path, CheckpointError)
    assert str(caught.value).isprintable()


def test_a_file_is_written_whole(tmp_path):
    path = tmp_path / 'file'
    path.write_bytes(b'before')
    with write_whole(path, CheckpointError) as partial:
        partial.write_bytes(b'after')
        assert path.read_bytes() == b'before'
    assert path.read_bytes() == b'after'
    assert os.listdir(tmp_path) == ['file']


def test_a_failure_leaves_what_was_there(tmp_path):
    path = tmp_path / 'file'
    path.write_bytes(b'before')
    with pytest.raises(ZeroDivisionError), write_whole(path, CheckpointError) as partial:
        partial.write_bytes(b'half') and 1 / 0
    assert path.read_bytes() == b'before'
    assert os.listdir(tmp_path) == ['file']


@pytest.mark.parametrize('place', ['absent/file', 'is_file/file'])
def test_a_place_that_cannot_be_written_is_one_line(tmp_path, place):
    (tmp_path / 'is_file').write_text('')
    with (
        pytest.raises(CheckpointError, match=r'cannot write .*file: (No such|Not a)'),
        write_whole(tmp_path / place, CheckpointError) as partial,
    ):
        partial.write_bytes(b'')


@pytest.mark.parametrize('function', [as_path, as_place])
def test_a_home_directory_is_expanded(tmp_path, monkeypatch, function):
    monkeypatch.setenv('HOME', str(tmp_path))
    assert function('~') == tmp_path
    assert function('~/run') == tmp_path / 'run'
    assert function(tmp_path / '~').name == '~'
    with pytest.raises(ConfigError, match=r'--out ~nobody-at-all/x: the home directory is unknown'):
        function('~nobody-at-all/x', '--out')


@pytest.mark.parametrize(
    'url', ['s3://b/run', 'az://b/run', 'http://host/x', 'file:///tmp/x', 's3:/b/run', 'FTP://x']
)
def test_other_urls_are_no_directories(url):
    with pytest.raises(ConfigError, match=r'--workdir .*:// is not supported; name a local path'):
        as_place(url, '--workdir')
    with pytest.raises(ConfigError, match=r'--out .* is a URL; name a local path'):
        as_path(url, '--out')


@pytest.mark.parametrize('name', ['a:b', 'C:/run', 'run:', 'hf-hub:timm/resnet50', 'x/y:/z'])
def test_a_colon_alone_makes_no_url(name):
    assert as_path(name) == Path(name)


def test_a_bucket_needs_a_name_and_a_library(monkeypatch):
    monkeypatch.setattr(files, '_can_import', lambda name: name == 'google.cloud.storage')
    for place in ('gs://b/run', 'gs:/b/run', Path('gs://b/run')):
        assert is_bucket(place)
        with pytest.raises(ConfigError, match=r'gcsfs, which is not installed; pip install gcsfs'):
            as_place(place)
    with pytest.raises(ConfigError, match='names no bucket'):
        as_place('gs://')
    monkeypatch.undo()
    assert not files._can_import('no_such_package.at_all')


def test_files_in_a_bucket_are_written_whole(tmp_path):
    with local_bucket(tmp_path) as bucket:
        assert str(as_place(Path(f'{bucket}/a/'))) == f'{bucket}/a'
        path = as_place(f'{bucket}/a/file')
        with write_whole(path, CheckpointError) as partial:
            partial.write_text('1')
        with pytest.raises(KeyError), write_whole(path, CheckpointError) as partial:  # noqa: PT012
            partial.write_text('2')
            raise KeyError
        assert [(p.name, p.read_text()) for p in path.parent.iterdir()] == [('file', '1')]


def test_what_a_buckets_library_raises_is_one_line():
    with (
        pytest.raises(CheckpointError, match=r'^--workdir gs://b cannot be used: KeyError: .*no.$'),
        explain_bucket('gs://b', CheckpointError, '--workdir'),
    ):
        raise KeyError('credentials:\nno')
    with pytest.raises(KeyError), explain_bucket('b', CheckpointError):
        raise KeyError('credentials')
