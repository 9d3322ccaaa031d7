"""Reading metrics.jsonl, whatever is in it."""

import pytest

from gcnet_jax.errors import CheckpointError
from gcnet_jax.metrics_file import read_metrics


def write(directory, data):
    (directory / 'metrics.jsonl').write_bytes(data)


def test_lines_are_read_and_a_cut_off_last_one_is_left_out(tmp_path):
    write(tmp_path, b'{"step": 1}\n{"step": 2, "eval/loss": 0.5}\n{"step": 3, "ev')
    assert read_metrics(tmp_path) == [{'step': 1}, {'step': 2, 'eval/loss': 0.5}]


def test_no_file_is_no_line(tmp_path):
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize(
    'line',
    [b'nonsense', b'', b'[1]', b'{"loss": 1}', b'{"step": "1"}', b'\xff\xfe', b'[' * 100_000],
)
def test_a_damaged_line_is_named(tmp_path, line):
    write(tmp_path, b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(CheckpointError, match=r'metrics\.jsonl, line 2 is not JSON with a step'):
        read_metrics(tmp_path)


def test_a_directory_of_that_name_is_an_error(tmp_path):
    (tmp_path / 'metrics.jsonl').mkdir()
    with pytest.raises(CheckpointError, match='cannot be read: Is a directory'):
        read_metrics(tmp_path)
