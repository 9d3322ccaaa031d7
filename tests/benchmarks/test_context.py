"""The table of the context blocks has a row for each of them; what cannot fit says so."""

import json

import pytest

from benchmarks import context

pytestmark = pytest.mark.usefixtures('in_this_process')


def test_every_block_has_a_row_at_every_size(capsys):
    context.main(['--maps', '3x32', '--rounds', '2', '--json'])
    rows = json.loads(capsys.readouterr().out)['rows']
    blocks = [context.CONVOLUTIONS, *context.BLOCKS]
    assert [(row['pass'], row['block']) for row in rows] == [
        (name, block) for name in ('forward', 'forward+backward') for block in blocks
    ]
    assert all(row['ms'] == 250 and row['MiB'] >= 0 for row in rows)
    assert rows[0]['of a block'] == 1


def test_a_block_that_cannot_fit_is_skipped_and_says_so(capsys, monkeypatch):
    monkeypatch.setattr(context, 'LARGEST_ATTENTION', 100)
    context.main(['--maps', '3x32', '--rounds', '2', '--json', '--blocks', 'NonLocal'])
    rows = json.loads(capsys.readouterr().out)['rows']
    assert [row['block'] for row in rows] == ['convolutions', 'NonLocal'] * 2
    assert rows[1]['ms'] is None
    assert 'skipped: its attention maps alone' in rows[1]['note']
