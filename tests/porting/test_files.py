import argparse
import json
import os
import pickle
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from gcnet_jax.errors import CheckpointError
from gcnet_jax.porting.files import read_checkpoint


def write(path, tensors, **options):
    save_file(tensors, path, **options)
    return path


@pytest.fixture
def tensors():
    generator = np.random.default_rng(3)
    return {
        'conv.weight': generator.normal(size=(4, 3, 3, 3)).astype(np.float32),
        'bn.num_batches_tracked': np.array(7, np.int64),
    }


def test_safetensors_gives_names_shapes_and_values(tmp_path, tensors):
    path = write(tmp_path / 'model.safetensors', tensors, metadata={'format': 'pt'})
    opened = read_checkpoint(path)
    assert opened.tensors.shapes == {'conv.weight': (4, 3, 3, 3), 'bn.num_batches_tracked': ()}
    np.testing.assert_array_equal(opened.tensors['conv.weight'], tensors['conv.weight'])
    assert opened.tensors['bn.num_batches_tracked'] == 7
    assert opened.metadata == {'format': 'pt'}
    assert (opened.wrapper, opened.prefix) == ('', '')


def test_the_name_of_the_file_does_not_matter(tmp_path, tensors):
    path = write(tmp_path / 'model.bin', tensors)
    assert set(read_checkpoint(path).tensors) == set(tensors)


@pytest.mark.parametrize('dtype', [np.float16, np.float64, ml_dtypes.bfloat16])
def test_other_floating_types_become_float32(tmp_path, dtype):
    values = np.array([0.5, -3.0, 1 / 256], dtype)
    read = read_checkpoint(write(tmp_path / 'a.safetensors', {'w': values})).tensors['w']
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, [0.5, -3.0, 1 / 256])


@pytest.mark.parametrize('prefix', ['module.', '_orig_mod.', 'module._orig_mod.'])
def test_a_prefix_of_every_name_is_taken_off(tmp_path, tensors, prefix):
    path = write(tmp_path / 'a.safetensors', {prefix + k: v for k, v in tensors.items()})
    opened = read_checkpoint(path)
    assert set(opened.tensors) == set(tensors)
    assert opened.prefix == prefix
    np.testing.assert_array_equal(opened.tensors['conv.weight'], tensors['conv.weight'])


def test_a_prefix_of_some_names_stays(tmp_path, tensors):
    path = write(tmp_path / 'a.safetensors', {**tensors, 'module.x': np.zeros(2, np.float32)})
    assert set(read_checkpoint(path).tensors) == {*tensors, 'module.x'}


def test_reading_names_does_not_read_values(tmp_path):
    """A file of 400 MB is opened without its pages: the file is sparse and the limit is tight."""
    resource = pytest.importorskip('resource', reason='needs POSIX')
    header = json.dumps(
        {'w': {'dtype': 'F32', 'shape': [10**8], 'data_offsets': [0, 4 * 10**8]}}
    ).encode()
    path = tmp_path / 'big.safetensors'
    with path.open('wb') as file:
        file.write(struct.pack('<Q', len(header)) + header)
        file.truncate(8 + len(header) + 4 * 10**8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert read_checkpoint(path).tensors.shapes == {'w': (10**8,)}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_bad_files_are_named_in_one_line(tmp_path, tensors):
    good = write(tmp_path / 'good.safetensors', tensors).read_bytes()
    cases = {
        'empty': (b'', 'is empty'),
        'cut': (good[:-9], 'damaged or truncated'),
        'cut_header': (good[:30], 'damaged or truncated'),
        'text': (b'<!DOCTYPE html><html>', 'neither a safetensors nor a PyTorch file'),
        'no_tensors': (struct.pack('<Q', 8) + b'{}      ', 'holds no tensors'),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / f'{name}.safetensors'
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message) as error:
            read_checkpoint(path)
        assert str(path) in str(error.value)
        assert '\n' not in str(error.value)


def test_missing_files_and_directories(tmp_path):
    with pytest.raises(CheckpointError, match='no such checkpoint'):
        read_checkpoint(tmp_path / 'nothing.pth')
    with pytest.raises(CheckpointError, match='is a directory'):
        read_checkpoint(tmp_path)


def test_unknown_choice_of_weights(tmp_path, tensors):
    path = write(tmp_path / 'a.safetensors', tensors)
    with pytest.raises(CheckpointError, match="did you mean 'ema'"):
        read_checkpoint(path, weights='emma')
    with pytest.raises(CheckpointError, match='one set of weights'):
        read_checkpoint(path, weights='ema')


def test_a_pickle_that_torch_did_not_write_says_what_to_do(tmp_path):
    path = tmp_path / 'a.pth'
    path.write_bytes(pickle.dumps({'a': 1}))
    with pytest.raises(CheckpointError, match=r'torch\.save did not write.*pip install torch'):
        read_checkpoint(path)


# With torch ---------------------------------------------------------------------------------------


@pytest.fixture
def torch():
    return pytest.importorskip('torch', reason='marked torch: needs requirements-torch.txt')


@pytest.mark.torch
@pytest.mark.parametrize('zipped', [True, False])
def test_pth_in_both_containers(tmp_path, torch, tensors, zipped):
    state = {name: torch.tensor(value) for name, value in tensors.items()}
    torch.save(state, tmp_path / 'a.pth', _use_new_zipfile_serialization=zipped)
    opened = read_checkpoint(tmp_path / 'a.pth')
    assert opened.tensors.shapes == {name: value.shape for name, value in tensors.items()}
    np.testing.assert_array_equal(opened.tensors['conv.weight'], tensors['conv.weight'])


@pytest.mark.torch
@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', 'float64'])
def test_pth_of_other_types(tmp_path, torch, dtype):
    torch.save({'w': torch.tensor([0.5, -3.0], dtype=getattr(torch, dtype))}, tmp_path / 'a.pt')
    read = read_checkpoint(tmp_path / 'a.pt').tensors['w']
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, [0.5, -3.0])


@pytest.mark.torch
@pytest.mark.parametrize('zipped', [True, False])
def test_every_layout_reads_as_torch_reads_it(tmp_path, torch, zipped):
    base = torch.arange(24.0).reshape(2, 3, 4)
    state = {
        'transposed': base.permute(2, 0, 1),
        'part': base[1:, ::2],
        'same storage': base,
        'parameter': torch.nn.Parameter(base.half()),
        'channels last': torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        'expanded': torch.ones(3, 1).expand(3, 4),
        'double': base.double(),
        'empty': torch.zeros(0, 3),
        'number': torch.tensor(2.5),
    }
    tagged = torch.nn.Parameter(torch.ones(2))
    tagged.kind = 'an attribute'
    state['tagged'] = tagged
    torch.save(state, tmp_path / 'a.pth', _use_new_zipfile_serialization=zipped)
    tensors = read_checkpoint(tmp_path / 'a.pth').tensors
    for name, value in state.items():
        np.testing.assert_array_equal(tensors[name], value.detach().float().numpy())


@pytest.mark.torch
@pytest.mark.parametrize('zipped', [True, False])
def test_tensors_that_are_not_read(tmp_path, torch, zipped):
    dense = torch.eye(2)
    cases = {
        'sparse': dense.to_sparse(),
        'bool': dense > 0,
        'complex64': dense + 1j,
        'meta': dense.to('meta'),
        'float8_e4m3fn': dense.to(torch.float8_e4m3fn),
    }
    for kind, value in cases.items():
        torch.save({'fc.weight': value}, tmp_path / 'a', _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match=f'the tensor fc.weight is {kind}'):
            read_checkpoint(tmp_path / 'a')


@pytest.mark.torch
def test_wrappers_and_the_choice_between_them(tmp_path, torch):
    path = tmp_path / 'last.pth.tar'
    torch.save(
        {
            'epoch': 3,
            'arch': 'gcresnet50t',
            'state_dict': {'module.w': torch.zeros(2)},
            'state_dict_ema': {'module.w': torch.ones(2)},
            'optimizer': {'state': {0: {'exp_avg': torch.ones(1)}}, 'param_groups': [{'lr': 0.1}]},
            'args': argparse.Namespace(lr=0.1, momentum=np.float64(0.9)),
            'metric': np.float32(77.8),
            'history': np.arange(4.0),
        },
        path,
    )
    for weights, key, value in [
        ('auto', 'state_dict_ema', 1),
        ('ema', 'state_dict_ema', 1),
        ('model', 'state_dict', 0),
    ]:
        opened = read_checkpoint(path, weights=weights)
        assert (opened.wrapper, opened.prefix) == (key, 'module.')
        np.testing.assert_array_equal(opened.tensors['w'], [value, value])
    assert opened.metadata['arch'] == 'gcresnet50t'

    torch.save({'model': {'w': torch.zeros(2)}}, path)
    assert read_checkpoint(path).wrapper == 'model'
    with pytest.raises(CheckpointError, match='holds no ema weights; it holds: model'):
        read_checkpoint(path, weights='ema')


class Exploit:
    def __reduce__(self):
        return os.mkdir, (os.environ['GCNET_EXPLOIT'],)


@pytest.mark.torch
@pytest.mark.parametrize('zipped', [True, False])
def test_a_pickle_that_runs_code_does_not(tmp_path, torch, monkeypatch, zipped):
    monkeypatch.setenv('GCNET_EXPLOIT', str(tmp_path / 'ran'))
    path = tmp_path / 'a.pth'
    torch.save(
        {'state_dict': {'w': torch.zeros(2)}, 'meta': Exploit()},
        path,
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(CheckpointError, match='could run code when loaded') as error:
        read_checkpoint(path)
    assert 'mkdir' in str(error.value)
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'ran').exists()
    (tmp_path / 'plain.pkl').write_bytes(pickle.dumps(Exploit()))
    with pytest.raises(CheckpointError, match=r'a pickle that torch\.save did not write'):
        read_checkpoint(tmp_path / 'plain.pkl')
    assert not (tmp_path / 'ran').exists()


@pytest.mark.torch
def test_what_is_not_a_state_dict(tmp_path, torch):
    path = tmp_path / 'a.pth'
    for content, message in [
        ([torch.zeros(2)], 'holds a list'),
        ({'w': torch.zeros(2), 'lr': 0.1}, 'holds lr: float among 1 tensors'),
        ({}, 'holds no tensors'),
        (torch.nn.Linear(2, 2), 'could run code'),
    ]:
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(path)
    with pytest.warns(FutureWarning, match='deprecated'):
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(CheckpointError, match='TorchScript'):
        read_checkpoint(path)


@pytest.mark.torch
@pytest.mark.parametrize('zipped', [True, False])
def test_truncated_pth(tmp_path, torch, zipped):
    path = tmp_path / 'a.pth'
    torch.save({'w': torch.zeros(5000)}, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    for size in (len(content) - 300, len(content) // 2, 40):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match='damaged or truncated') as error:
            read_checkpoint(path)
        assert '\n' not in str(error.value)
