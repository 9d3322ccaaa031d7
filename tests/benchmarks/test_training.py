"""The table of training steps has a row for each case and candidate; all train the same network."""

import json

import flax
import jax
import jax.numpy as jnp
import pytest

from benchmarks import training
from benchmarks.plain_flax import NETWORKS
from benchmarks.settings import PRECISIONS, Setting
from gcnet_jax.models import create_model


def rows_of(capsys, *flags):
    small = ['--cases', 'digits', '--batches', '2', '--rounds', '2', '--device', 'cpu', '--json']
    training.main([*small, *flags])
    return json.loads(capsys.readouterr().out)['rows']


@pytest.mark.slow
@pytest.mark.parametrize('precision', ['float32', 'bfloat16'])
def test_ours_and_plain_flax_need_no_torch(precision, capsys, in_this_process):
    rows = rows_of(capsys, '--candidates', 'gcnet_jax', 'plain Flax', '--precision', precision)
    assert [(row['network'], row['candidate']) for row in rows] == [
        ('gccnn', 'gcnet_jax'),
        ('gccnn', 'plain Flax'),
    ]
    assert all(row['images/s'] > 0 and row['batch'] == 2 for row in rows)
    assert {row['precision'] for row in rows} == {precision}


@pytest.mark.torch
@pytest.mark.parametrize('precision', PRECISIONS)
def test_torch_stands_beside_them(precision, capsys, in_this_process):
    rows = rows_of(capsys, '--candidates', 'torch', '--precision', precision)
    assert [row['ratio to torch'] for row in rows] == [1]


@pytest.mark.torch
def test_the_compiled_step_is_of_what_the_compiler_returns(monkeypatch):
    """The compiler itself takes a minute."""
    import torch

    compiled = []
    monkeypatch.setattr(torch, 'compile', lambda model: compiled.append(model) or model)
    training.torch_peer('gccnn', 2, 8, Setting(), compiled=True)()
    assert len(compiled) == 1


def test_what_has_no_plain_network_is_told_apart():
    networks = {network for network, _, _ in training.CASES.values()}
    assert networks - set(training.NOT_PLAIN) == set(NETWORKS)


def parameter_count(model, size):
    images = jnp.zeros((1, size, size, 3))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    return sum(leaf.size for leaf in flax.traverse_util.flatten_dict(shapes['params']).values())


@pytest.mark.parametrize('name', NETWORKS)
def test_the_plain_network_is_the_same_network(name):
    size = 64 if 'resnet50' in name else 8
    assert parameter_count(NETWORKS[name], size) == parameter_count(create_model(name), size)


@pytest.mark.torch
@pytest.mark.parametrize('name', NETWORKS)
def test_the_peer_is_the_same_network(name):
    from benchmarks.torch_peers import build

    size = 64 if 'resnet50' in name else 8
    count = sum(leaf.numel() for leaf in build(name).parameters())
    assert count == parameter_count(create_model(name), size)
