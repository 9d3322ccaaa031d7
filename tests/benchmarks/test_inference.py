"""The table of inference has a row for each network, batch size and candidate."""

import json

import pytest

from benchmarks import inference

SMALL = ['--size', '32', '--rounds', '2', '--json']


def rows_of(capsys, *flags):
    inference.main([*SMALL, *flags])
    return json.loads(capsys.readouterr().out)['rows']


def test_ours_alone_needs_no_torch(capsys):
    rows = rows_of(
        capsys, '--networks', 'gc_resnet20', '--batches', '1', '2', '--candidates', 'gcnet_jax'
    )
    assert [(row['network'], row['batch'], row['candidate']) for row in rows] == [
        ('gc_resnet20', 1, 'gcnet_jax'),
        ('gc_resnet20', 2, 'gcnet_jax'),
    ]
    assert all(row['images/s'] > 0 and row['ratio to torch eager'] is None for row in rows)


def test_an_unknown_network_is_refused(capsys):
    with pytest.raises(SystemExit):
        inference.main(['--networks', 'gc_resnet5'])
    assert "invalid choice: 'gc_resnet5' (choose from" in capsys.readouterr().err


@pytest.mark.torch
def test_torch_stands_beside_it(capsys):
    rows = rows_of(
        capsys,
        *('--networks', 'gc_resnet20', '--batches', '2'),
        *('--candidates', 'gcnet_jax', 'torch eager'),
    )
    assert [row['candidate'] for row in rows] == ['gcnet_jax', 'torch eager']
    assert rows[1]['ratio to torch eager'] == 1
