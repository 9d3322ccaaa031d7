"""The comparison of timm's network with ours, by timm itself."""

import sys
import types

import numpy as np
import pytest

from gcnet_jax.errors import CheckpointError, ConfigError
from gcnet_jax.porting import write_safetensors
from gcnet_jax.porting.compare import compare_with_timm


@pytest.fixture
def weights(tmp_path):
    """timm's own file of a network with random weights."""
    import timm
    import torch
    from safetensors.torch import save_model

    torch.manual_seed(0)
    network = timm.create_model('gcresnext26ts', num_classes=7)
    for name, value in network.state_dict().items():
        if name.endswith(('running_mean', 'bias')):
            value.normal_(0, 0.1)
        elif name.endswith('bn.weight'):  # The last of each block starts at zero.
            value.uniform_(0.5, 1.5)
    save_model(network, tmp_path / 'model.safetensors')
    return tmp_path / 'model.safetensors'


@pytest.mark.torch
@pytest.mark.filterwarnings('default')
def test_the_same_weights_give_the_same_logits_and_others_do_not(weights, monkeypatch):
    assert compare_with_timm(weights, size=64) < 1e-4
    # Ours sees other images.
    on_others = types.SimpleNamespace(jit=lambda apply: lambda v, x: apply(v, -x))
    monkeypatch.setattr('gcnet_jax.porting.compare.jax', on_others)
    assert compare_with_timm(weights, size=64) > 1e-2


def test_without_torch_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'torch', None)
    with pytest.raises(ConfigError, match=r'needs torch.*pip install torch'):
        compare_with_timm(tmp_path / 'model.safetensors')


def test_weights_of_another_library_are_refused(monkeypatch, tmp_path, random_variables):
    from gcnet_jax import create_model
    from gcnet_jax.porting import to_torch

    for name in ('torch', 'timm'):
        monkeypatch.setitem(sys.modules, name, object())
    model = create_model('gccnn')
    images = np.zeros((1, 8, 8, 3), np.float32)
    tensors = to_torch(model, random_variables(model, images, train=False), 'gccnn')
    write_safetensors(tmp_path / 'model.safetensors', tensors)
    with pytest.raises(CheckpointError, match='has the names of gccnn, not of timm'):
        compare_with_timm(tmp_path / 'model.safetensors')
