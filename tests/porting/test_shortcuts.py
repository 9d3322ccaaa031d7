"""CIFAR ResNets of akamaster/pytorch_resnet_cifar10, and files of the other kind of shortcut."""

import flax.traverse_util
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gcnet_jax.__main__ import main
from gcnet_jax.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from gcnet_jax.errors import CheckpointError
from gcnet_jax.models import create_model, model_entry
from gcnet_jax.porting import load_torch, port, to_torch
from gcnet_jax.porting.architectures import check_architecture
from gcnet_jax.stored import load_variables
from tests.porting.crafted import program, tensor, zipped
from tests.porting.seeded import seeded_tensors

ROWS = {'resnet20_a': 3, 'resnet32_a': 5, 'resnet44_a': 7, 'resnet56_a': 9, 'resnet110_a': 18}


def norm(name, width):
    leaves = ('weight', 'bias', 'running_mean', 'running_var')
    return {f'{name}.{leaf}': (width,) for leaf in leaves} | {f'{name}.num_batches_tracked': ()}


def published(blocks, shortcut=None, classifier='linear'):
    """The names and shapes of a published file, written here and not by the code under test."""
    shapes = {'conv1.weight': (16, 3, 3, 3), **norm('bn1', 16)}
    width = 16
    for stage, out in enumerate((16, 32, 64), start=1):
        for block in range(blocks):
            place = f'layer{stage}.{block}'
            shapes[f'{place}.conv1.weight'] = (out, width, 3, 3)
            shapes[f'{place}.conv2.weight'] = (out, out, 3, 3)
            shapes |= norm(f'{place}.bn1', out) | norm(f'{place}.bn2', out)
            if shortcut and width != out:
                shapes[f'{place}.{shortcut}.0.weight'] = (out, width, 1, 1)
                shapes |= norm(f'{place}.{shortcut}.1', out)
            width = out
    return shapes | {f'{classifier}.weight': (10, 64), f'{classifier}.bias': (10,)}


def saved(path, shapes):
    save_file(seeded_tensors(shapes), path)
    return path


@pytest.fixture
def option_a(tmp_path):
    return saved(tmp_path / 'a.safetensors', published(3))


def write_pth(path, tensors):
    """What the published training script writes, through DataParallel: `module.` and a wrapper."""
    entries, storages = {}, {}
    for key, (name, value) in enumerate(tensors.items()):
        kind = 'torch LongStorage' if value.dtype == np.int64 else 'torch FloatStorage'
        entries[f'module.{name}'] = tensor(str(key), value.shape, kind=kind)
        storages[str(key)] = value.tobytes()
    content = {'state_dict': entries, 'best_prec1': 91.7}
    path.write_bytes(zipped(program(content), storages))


def test_a_published_file_is_ported_and_goes_back(tmp_path, capsys):
    source = seeded_tensors(published(3))
    file, directory, back = tmp_path / 'a.th', tmp_path / 'ours', tmp_path / 'back.safetensors'
    write_pth(file, source)
    assert main(['port', str(file), '--out', str(directory)]) == 0
    assert 'wrote resnet20_a to' in capsys.readouterr().out
    description, variables = load_variables(directory)
    assert (description.name, description.options) == ('resnet20_a', {'num_classes': 10})
    assert (description.preprocessing.mean, description.preprocessing.std) == (
        IMAGENET_MEAN,
        IMAGENET_STD,
    )
    ours = flax.traverse_util.flatten_dict(variables, sep='/')
    for path, name in [
        ('params/stem_conv/kernel', 'conv1.weight'),
        ('params/stage2_0/conv1/kernel', 'layer2.0.conv1.weight'),
        ('params/classifier/kernel', 'linear.weight'),
        ('batch_stats/stage3_2/norm2/var', 'layer3.2.bn2.running_var'),
    ]:
        value = source[name]
        expected = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
        np.testing.assert_array_equal(ours[path], expected)

    family = ['--family', 'pytorch_resnet_cifar10']
    assert main(['port', '--reverse', str(directory), *family, '--out', str(back)]) == 0
    tensors = load_file(back)
    assert tensors.keys() == source.keys()
    for name, value in source.items():
        if not name.endswith('num_batches_tracked'):
            np.testing.assert_array_equal(tensors[name], value)


@pytest.mark.parametrize('name', ROWS)
def test_each_depth_is_recognised(tmp_path, name):
    model, _, report = load_torch(saved(tmp_path / 'a.safetensors', published(ROWS[name])))
    assert model == create_model(name)
    assert (report.family, report.initialised) == ('pytorch_resnet_cifar10', ())
    assert model_entry(name).preprocessing.mean == IMAGENET_MEAN


def test_projections_of_these_names_are_recognised(tmp_path):
    shapes = published(3, 'shortcut')
    model, variables, _ = load_torch(saved(tmp_path / 'a.safetensors', shapes))
    assert model == create_model('resnet20')
    assert to_torch(model, variables, 'pytorch_resnet_cifar10').keys() == shapes.keys()


def test_context_goes_into_a_network_with_zero_padded_shortcuts(option_a):
    context = {'stages': (3,), 'position': 'after_conv2', 'ratio': 1 / 4}
    model, _, report = load_torch(option_a, 'resnet20_a', context=context)
    assert model.shortcut == 'zero_pad'
    assert len(report.initialised) == 3 * 8
    assert all('/context_' in path for path in report.initialised)


@pytest.mark.parametrize('name', ['resnet20', 'gc_resnet20', 'resnet56'])
def test_a_file_without_parameters_in_its_shortcuts_needs_a_network_without(
    option_a, tmp_path, name
):
    message = rf'a\.safetensors: .*\(option A\), as resnet20_a has, and {name} has projection'
    with pytest.raises(CheckpointError, match=message + '.*: name resnet20_a instead'):
        port(option_a, tmp_path / 'out', name)
    assert not (tmp_path / 'out').exists()
    with pytest.raises(CheckpointError, match='and ResNet has projection shortcuts'):
        load_torch(option_a, create_model(name))


@pytest.mark.parametrize(('shortcut', 'classifier'), [('shortcut', 'linear'), ('downsample', 'fc')])
def test_a_file_with_projections_needs_a_network_with_them(tmp_path, shortcut, classifier):
    path = saved(tmp_path / 'a.safetensors', published(3, shortcut, classifier))
    message = r'projection shortcuts \(option B\), as resnet20 has, and resnet20_a has parameter-'
    with pytest.raises(CheckpointError, match=message):
        load_torch(path, 'resnet20_a')


def test_a_network_of_no_row_is_told_by_its_option(tmp_path):
    path = saved(tmp_path / 'a.safetensors', published(2))
    with pytest.raises(CheckpointError, match=r"build the network with shortcut='zero_pad'"):
        load_torch(path, 'resnet20', stage_sizes=(2, 2, 2))
    model, _, _ = load_torch(path, 'resnet20', stage_sizes=(2, 2, 2), shortcut='zero_pad')
    assert model.stage_sizes == (2, 2, 2)


def test_names_that_do_not_tell_where_the_zeros_are_need_the_network(tmp_path):
    """Other programs with torchvision's names pad on one side: the same tensors."""
    path = saved(tmp_path / 'a.safetensors', published(3, classifier='fc'))
    with pytest.raises(CheckpointError, match='do not tell where the zeros are: name resnet20_a'):
        load_torch(path)
    assert load_torch(path, 'resnet20_a')[0] == create_model('resnet20_a')


def test_the_libraries_name_of_either_kind_passes():
    """What a file calls `resnet20` may have either: its tensors have told already."""
    check_architecture('resnet20', 'resnet20_a', 'file.th')
    check_architecture('resnet20', 'resnet20', 'file.th')
    check_architecture('resnet32', 'resnet32_a', 'file.th')  # here in one kind only
    with pytest.raises(CheckpointError, match='says that it is a resnet32, and resnet20_a would'):
        check_architecture('resnet32', 'resnet20_a', 'file.th')
