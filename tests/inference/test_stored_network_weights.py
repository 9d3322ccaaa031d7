"""Weights that a classifier must not answer from, wherever they come from."""

import functools
import operator

import jax
import numpy as np
import pytest

from gcnet_jax.errors import CheckpointError
from gcnet_jax.inference import stored_network
from gcnet_jax.inference.classifier import Classifier
from gcnet_jax.stored import variables as stored_variables
from gcnet_jax.stored import write_ported


@pytest.fixture
def pictures(make):
    return [make.picture(0)]


@pytest.mark.parametrize(
    ('leaf', 'value', 'message'),
    [
        ('params/classifier/bias', np.inf, 'classifier/bias has 1 values that are NaN or infinite'),
        ('params/stage1_0/conv1/kernel', np.nan, 'conv1/kernel has 1 values that are NaN'),
        ('batch_stats/stage1_0/norm1/var', -1, 'norm1/var has negative variances'),
    ],
)
@pytest.mark.parametrize('as_jax', [False, True])
def test_weights_that_are_not_finite_are_refused_by_name(stored, leaf, value, message, as_jax):
    variables = jax.tree.map(np.copy, stored.variables)
    broken = functools.reduce(operator.getitem, leaf.split('/'), variables)
    broken.flat[0] = value
    variables = jax.tree.map(jax.numpy.asarray, variables) if as_jax else variables
    with pytest.raises(CheckpointError, match=f'^1 of its arrays .* the first: .*{message}'):
        Classifier(stored.description, variables, devices=stored.one_device)


def test_loading_checks_the_weights_once(stored, tmp_path, monkeypatch):
    checked = []
    check = stored_network.check_weights
    for module in (stored_network, stored_variables):
        monkeypatch.setattr(module, 'check_weights', lambda *a: checked.append(a) or check(*a))
    Classifier.load(stored.directory, devices=stored.one_device)
    assert len(checked) == 1

    variables = jax.tree.map(np.copy, stored.variables)
    variables['params']['classifier']['bias'][0] = np.nan
    write_ported(tmp_path / 'nan', stored.description, variables)
    with pytest.raises(CheckpointError, match=r'nan.checkpoints.0: 1 of its arrays .*/bias has 1'):
        Classifier.load(tmp_path / 'nan', devices=stored.one_device)


@pytest.mark.parametrize('options', [{'fold': False}, {}, {'weights': 'int8'}])
def test_weights_beyond_the_dtype_are_refused_by_name(stored, pictures, options):
    options['devices'] = stored.one_device
    variables = jax.tree.map(np.copy, stored.variables)
    variables['params']['stage1_0']['conv2']['kernel'][0, 0, 0, :2] = 1e6
    message = (
        'conv2/kernel has 2 values that are infinite in float16, whose largest is 65504: choose'
    )
    with pytest.raises(CheckpointError, match=message):
        Classifier(stored.description, variables, dtype='float16', **options)
    for dtype in ('float32', 'bfloat16'):
        classifier = Classifier(stored.description, variables, dtype=dtype, **options)
        assert np.isfinite(classifier.features(pictures[0], 'logits')).all()


def test_weights_beyond_bfloat16_are_refused_too(stored):
    variables = jax.tree.map(np.copy, stored.variables)
    variables['params']['stage1_0']['conv1']['kernel'][0, 0, 0, 0] = np.finfo(np.float32).max
    options = {'fold': False, 'devices': stored.one_device}
    with pytest.raises(CheckpointError, match=r'^params/stage1_0/conv1/kernel .* in bfloat16'):
        Classifier(stored.description, variables, dtype='bfloat16', **options)
    Classifier(stored.description, variables, **options)


def test_what_is_computed_in_float32_may_be_beyond_the_dtype(stored, pictures):
    """Classifier and statistics; and a value that float16 rounds down to its largest."""
    variables = jax.tree.map(np.copy, stored.variables)
    variables['params']['classifier']['kernel'][0, 0] = 1e6
    variables['batch_stats']['stage1_0']['norm1']['var'][:] = 1e6
    variables['params']['stage1_0']['conv2']['kernel'][0, 0, 0, 0] = 65_510
    options = {'dtype': 'float16', 'fold': False, 'devices': stored.one_device}
    assert Classifier(stored.description, variables, **options).num_classes == 6
