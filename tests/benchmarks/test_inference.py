"""The table of inference has a row for each network, batch size and candidate."""

import json

import numpy as np
import pytest

from benchmarks import inference
from benchmarks.settings import Setting

SMALL = ['--size', '32', '--rounds', '2', '--device', 'cpu', '--json']


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
    assert {(row['device'], row['precision']) for row in rows} == {('cpu', 'float32')}


def test_it_computes_in_bfloat16():
    wide, narrow = (
        np.asarray(inference.ours('gc_resnet20', 2, 32, Setting('cpu', precision))(), np.float32)
        for precision in ('float32', 'bfloat16')
    )
    error = np.abs(narrow - wide).max() / np.abs(wide).max()
    assert 1e-4 < error < 0.1


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


@pytest.mark.torch
@pytest.mark.parametrize('precision', ['tf32', 'bfloat16'])
def test_torch_computes_in_every_precision(precision):
    import torch

    run = inference.torch_peer('gc_resnet20', 2, 32, Setting('cpu', precision), compiled=False)
    assert run().dtype == (torch.bfloat16 if precision == 'bfloat16' else torch.float32)


@pytest.mark.onnx
@pytest.mark.filterwarnings('default')  # Those of other libraries.
def test_onnx_files_stand_beside_it(capsys, in_this_process):
    rows = rows_of(
        capsys,
        *('--networks', 'gc_resnet20', '--batches', '2'),
        *('--candidates', 'gcnet_jax', 'onnxruntime', 'OpenVINO'),
    )
    assert [row['candidate'] for row in rows] == ['gcnet_jax', 'onnxruntime', 'OpenVINO']
