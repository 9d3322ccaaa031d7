"""Reading files of strangers, and writing whole or not at all."""

import os

import pytest

from gcnet_jax.errors import CheckpointError
from gcnet_jax.files import read_bytes, read_json, read_text, write_whole


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
