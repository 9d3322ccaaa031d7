"""What trainers put around a state dict: keys, averages, prefixes, and values beside it."""

import numpy as np
import pytest

from gcnet_jax.errors import CheckpointError
from gcnet_jax.porting.files import read_checkpoint
from tests.porting.crafted import FORMS, Call, Name, Raw, encode, floats, program, tensor

STORAGES = {'0': floats(0, 0), '1': floats(1, 1)}
ZERO, ONE = tensor('0'), tensor('1')
MATRIX = tensor('0', shape=(1, 2))


@pytest.fixture
def opened(tmp_path):
    """A function that writes what a trainer would save, and opens it."""

    def open_it(value, weights='auto', form='zip'):
        path = tmp_path / 'a.pth'
        data = program(value)
        used = {key: values for key, values in STORAGES.items() if encode(key) in data}
        path.write_bytes(FORMS[form](data, used))
        return read_checkpoint(path, weights=weights)

    return open_it


def message_of(opened, value, **options):
    with pytest.raises(CheckpointError) as error:
        opened(value, **options)
    assert '\n' not in str(error.value)
    return str(error.value)


COUNT = tensor('0', shape=(), strides=(), size=2)


@pytest.mark.parametrize(
    'signs',
    [
        {'meta': {'mmengine_version': '0.10.7'}},
        {'message_hub': {'log_scalars': {}}},
        {},
    ],
)
def test_mmengine_keeps_the_average_in_state_dict(opened, signs):
    file = {
        **signs,
        'state_dict': {'backbone.w': ONE},
        'ema_state_dict': {'steps': COUNT, 'module.backbone.w': ZERO},
    }
    for weights, wrapper, value in [
        ('auto', 'state_dict', 1),
        ('ema', 'state_dict', 1),
        ('model', 'ema_state_dict', 0),
    ]:
        found = opened(file, weights)
        assert found.wrapper == wrapper
        assert list(found.tensors) == ['backbone.w']
        np.testing.assert_array_equal(found.tensors['backbone.w'], [value, value])


def test_elsewhere_the_average_is_in_ema_state_dict(opened):
    file = {'state_dict': {'w': ZERO}, 'ema_state_dict': {'w': ONE}, 'epoch': 3}
    for weights, value in [('auto', 1), ('ema', 1), ('model', 0)]:
        assert opened(file, weights).tensors['w'][0] == value


def test_mmengine_without_an_average(opened):
    file = {'meta': {'mmengine_version': '0.10.7'}, 'state_dict': {'w': ONE}}
    assert opened(file, 'model').wrapper == 'state_dict'
    assert 'holds no ema weights' in message_of(opened, file, weights='ema')


def test_the_history_in_mmengines_files_is_skipped(opened):
    """It names its own methods, which takes a call of getattr."""
    history = 'mmengine.logging.history_buffer HistoryBuffer'
    method = Call('__builtin__ getattr', (Name(history), 'mean'))
    buffer = Call(history, (), {'max_length': 9, 'statistics_methods': {'mean': method}}, new=True)
    assert list(opened({'message_hub': {'loss': buffer}, 'state_dict': {'w': ONE}}).tensors) == [
        'w'
    ]


def test_an_empty_average_is_none(opened):
    file = {'state_dict': {'w': ZERO}, 'state_dict_ema': {}}
    assert opened(file).wrapper == 'state_dict'
    assert 'holds no ema weights; it holds: state_dict' in message_of(opened, file, weights='ema')


def test_a_tensor_beside_the_wrapper_hides_nothing(opened):
    file = {'epoch': 3, 'best_acc1': COUNT, 'state_dict': {'module.w': ONE}}
    found = opened(file)
    assert (found.wrapper, found.prefix, list(found.tensors)) == ('state_dict', 'module.', ['w'])


def test_other_keys(opened):
    assert opened({'net': {'w': ONE}, 'acc': 3.0}).wrapper == 'net'
    assert opened({'my_weights': {'w': ONE}, 'epoch': 3}).wrapper == 'my_weights'
    text = message_of(opened, {'generator': {'w': ONE}, 'critic': {'w': ZERO}})
    assert 'several state dicts' in text
    assert 'generator, critic' in text


@pytest.mark.parametrize('prefix', ['model.', 'net.', 'network.', 'module.model.', 'student.'])
def test_a_wrappers_prefix_of_every_name(opened, prefix):
    found = opened({'state_dict': {prefix + 'conv1.weight': ONE, prefix + 'bn1.bias': ZERO}})
    assert found.prefix == prefix
    assert list(found.tensors) == ['conv1.weight', 'bn1.bias']


@pytest.mark.parametrize('prefix', ['backbone.', 'decode_head.', 'layer1.'])
def test_names_of_networks_are_no_prefix(opened, prefix):
    found = opened({'state_dict': {prefix + 'conv1.weight': ONE, prefix + 'bn1.bias': ZERO}})
    assert found.prefix == ''


def test_what_stands_beside_a_lightning_network(opened):
    network = {'model.conv1.weight': MATRIX, 'model.fc.bias': ZERO}
    beside = {'loss.weight': MATRIX, 'train_acc.total': COUNT, 'criterion.weight': ONE}
    found = opened({'pytorch-lightning_version': '2.4', 'state_dict': network | beside})
    assert found.prefix == 'model.'
    assert list(found.tensors) == ['conv1.weight', 'fc.bias']
    text = message_of(opened, {'state_dict': network | {'projector.weight': MATRIX}})
    assert "2 names start with 'model.'" in text
    assert 'projector.weight' in text
    assert 'removeprefix' in text


@pytest.mark.parametrize('average', ['ema_model.', 'model_ema.module.', 'ema.'])
def test_an_average_among_the_names(opened, average):
    state = {'model.w': ZERO, 'model.v': ZERO, average + 'w': ONE, average + 'v': ONE}
    for weights, value in [('auto', 1), ('ema', 1), ('model', 0)]:
        tensors = opened({'state_dict': state}, weights).tensors
        assert set(tensors) == {'w', 'v'}
        assert tensors['w'][0] == value


def test_a_pickled_module_is_told_to_save_its_state_dict(opened):
    module = Call('torchvision.models.resnet ResNet', (), {'_modules': {}}, new=True)
    for form in FORMS:
        text = message_of(opened, module, form=form)
        assert 'torchvision.models.resnet.ResNet' in text
        assert 'state_dict() of the module' in text
        assert "['state_dict']" not in text
    text = message_of(opened, {'epoch': 3, 'model': module})
    assert "save its ['model'].state_dict()" in text
    text = message_of(opened, {'model': {'w': ONE}, 'args': Call('my.config Config', ())})
    assert "save its ['model'] alone" in text


# Metadata -----------------------------------------------------------------------------------------


def test_metadata_is_plain_and_nested(opened):
    number = Call(
        'numpy.core.multiarray scalar',
        (Call('numpy dtype', ('f8', False, True), (3, '<', None)), floats(0, 1.8125)),
    )
    file = {
        'arch': 'resnet50',
        'epoch': 3,
        'best': number,
        'args': Call('argparse Namespace', (), {'lr': 0.1, 'out': 'x', 'f': Name('torch float32')}),
        'root': Call('pathlib PosixPath', ('/', 'data')),
        'meta': {'config': 'model = dict()\n', 'CLASSES': ('cat', 'dog'), 'env_info': {'a': None}},
        'optimizer': {'state': {0: {'exp_avg': ONE}}, 'param_groups': [{'lr': 0.1, 'params': [0]}]},
        'array': Call('numpy.core.multiarray _reconstruct', (), (1, (2,), None, False, b'ab')),
        'state_dict': {'w': ONE},
    }
    for form in FORMS:
        metadata = opened(file, form=form).metadata
        assert metadata == {
            'arch': 'resnet50',
            'epoch': 3,
            'best': 0.75,
            'args': {'lr': 0.1, 'out': 'x'},
            'root': '//data',
            'meta': {
                'config': 'model = dict()\n',
                'CLASSES': ['cat', 'dog'],
                'env_info': {'a': None},
            },
            'optimizer': {'param_groups': [{'lr': 0.1, 'params': [0]}]},
        }


def test_metadata_is_bounded(opened):
    """A list that holds itself, ten to the 30 lists of lists, a long text, and many values."""
    lists = b']q\0' + b''.join(b'](' + b'h%c' % n * 10 + b'eq%c' % (n + 1) for n in range(30))
    file = {
        'arch': 'resnet50',
        'self': Raw(b']q\x7fh\x7fa'),
        'long': 'x' * 3_000_000,
        'many': Raw(b'](' + b'K\1' * 50_000 + b'e'),
        'state_dict': {'w': ONE},
        'lists': Raw(lists + b'0' * 30 + b'h\x1e' + b'\x86'),
    }
    assert opened(file).metadata == {'arch': 'resnet50'}


def test_names_are_printed_on_one_line(opened):
    text = message_of(opened, {'\x1b[31mred\nline': 3, 'w': ONE})
    assert '\x1b' not in text
    text = message_of(opened, {'state_dict': {'\x1b[31mred\nline': Call('builtins set', ())}})
    assert '\x1b' not in text
