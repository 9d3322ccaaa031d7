"""Directories in the hub's form: what config.json says is followed or refused."""

import json
import math

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import EntryNotFoundError
from safetensors.numpy import load_file, save_file

from gcnet_jax.__main__ import main
from gcnet_jax.errors import CheckpointError
from gcnet_jax.models import create_model
from gcnet_jax.porting import load_pretrained, load_torch, port, port_reverse, to_torch
from gcnet_jax.porting.hub import read_hub_config
from gcnet_jax.stored import load_variables, read_model_description
from tests.porting.seeded import seeded_tensors
from tests.porting.test_load import seeded_variables

# As timm writes it for a ResNet.
CONFIG = {
    'architecture': 'resnet18',
    'num_classes': 3,
    'num_features': 512,
    'global_pool': 'avg',
    'label_names': ['n01', 'n02', 'n03'],
    'label_descriptions': {'n01': 'tench, a fish', 'n03': 'crane'},
    'pretrained_cfg': {
        'tag': 'a1_in1k',
        'input_size': [3, 160, 160],
        'test_input_size': [3, 192, 192],
        'fixed_input_size': False,
        'interpolation': 'bicubic',
        'crop_pct': 0.9,
        'test_crop_pct': 0.95,
        'crop_mode': 'center',
        'mean': [0.5, 0.4, 0.3],
        'std': [0.2, 0.3, 0.4],
        'num_classes': 3,
    },
}


@pytest.fixture(scope='module')
def weights():
    """A ResNet-18 that torchvision could have saved."""
    model = create_model('resnet18', num_classes=3)
    arrays = to_torch(model, seeded_variables(model), 'torchvision')
    return seeded_tensors({name: array.shape for name, array in arrays.items()})


def write(directory, weights, config):
    directory.mkdir()
    save_file(weights, directory / 'model.safetensors')
    (directory / 'config.json').write_text(json.dumps(config))
    return directory


def changed(**fields):
    """The config with fields of `pretrained_cfg` or, where they are there, of the top replaced."""
    top = {name: value for name, value in fields.items() if name in CONFIG}
    inner = {name: value for name, value in fields.items() if name not in CONFIG}
    return CONFIG | top | {'pretrained_cfg': CONFIG['pretrained_cfg'] | inner}


def test_preprocessing_and_labels_are_the_files(tmp_path, weights):
    port(write(tmp_path / 'hub', weights, CONFIG), tmp_path / 'out')
    description = read_model_description(tmp_path / 'out')
    assert description.name == 'resnet18'
    assert description.label_names == ('tench, a fish', 'n02', 'crane')
    preprocessing = description.preprocessing
    assert (preprocessing.mean, preprocessing.std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert (preprocessing.train_size, preprocessing.test_size) == (160, 192)
    assert (preprocessing.crop_fraction, preprocessing.interpolation) == (0.95, 'bicubic')


def test_without_a_test_size_evaluation_is_at_the_training_size(tmp_path, weights):
    config = changed(test_input_size=None, test_crop_pct=None)
    preprocessing = read_hub_config(write(tmp_path / 'hub', weights, config)).preprocessing
    assert (preprocessing['test_size'], preprocessing['crop_fraction']) == ((160, 160), 0.9)


def test_images_need_not_be_square(tmp_path, weights):
    config = changed(input_size=[3, 160, 320], test_input_size=[3, 192, 384])
    preprocessing = read_hub_config(write(tmp_path / 'hub', weights, config)).preprocessing
    assert (preprocessing['train_size'], preprocessing['test_size']) == ((160, 320), (192, 384))


def test_fields_at_the_top_are_the_old_form(tmp_path, weights):
    old = {'architecture': 'resnet18', **CONFIG['pretrained_cfg'], 'labels': ['a', 'b', 'c']}
    config = read_hub_config(write(tmp_path / 'hub', weights, old))
    assert config.preprocessing['mean'] == (0.5, 0.4, 0.3)
    assert config.label_names == ('a', 'b', 'c')


def test_labels_by_the_number_of_the_class(tmp_path, weights):
    config = changed(
        label_names={'10': 'k', '2': 'c', '0': 'a', '1': 'b'} | dict.fromkeys('3456789', 'x')
    )
    assert read_hub_config(write(tmp_path / 'hub', weights, config)).label_names == (
        *('a', 'b', 'c'),
        *'xxxxxxx',
        'k',
    )


@pytest.mark.slow
def test_the_papers_protocol_in_one_command(tmp_path, weights, capsys):
    """A plain network of the hub becomes a GC network that starts with the same answers."""
    source = write(tmp_path / 'hub', weights, CONFIG)
    arguments = ['port', str(source), '--model', 'gc_resnet18', '--out', str(tmp_path / 'out')]
    assert main(arguments) == 0
    assert 'newly initialised' in capsys.readouterr().out
    description, variables = load_variables(tmp_path / 'out')
    assert (description.name, description.preprocessing.test_size) == ('gc_resnet18', 192)
    plain, plain_variables, _ = load_pretrained(source)
    images = np.random.default_rng(0).normal(size=(1, 64, 64, 3)).astype(np.float32)
    np.testing.assert_array_equal(
        description.build().apply(variables, images, train=False),
        plain.apply(plain_variables, images, train=False),
    )


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'std': [0.2, 0, 0.4]}, 'std must be three positive numbers'),
        ({'mean': [math.nan] * 3}, 'mean must be three numbers'),
        ({'mean': [123.7, 116.3, 103.5]}, 'on the scale where 255 is 1'),
        ({'mean': [0.5]}, 'mean must be three numbers'),
        ({'mean': 'imagenet'}, 'mean must be three numbers'),
        ({'crop_pct': 0, 'test_input_size': None}, 'crop_fraction must be in'),
        ({'test_crop_pct': 1.2}, 'crop_fraction must be in'),
        ({'test_crop_pct': '0.9'}, 'crop_fraction must be a number'),
        ({'interpolation': 'random'}, "unknown interpolation 'random'"),
        ({'crop_mode': 'squash'}, "crop_mode is 'squash'; only 'center' is known"),
        ({'input_size': [1, 160, 160]}, r'input_size is \[1, 160, 160\].* three channels'),
        ({'input_size': [160, 320]}, r'networks here take \[3, height, width\]'),
        ({'input_size': [3, 160, 0]}, r'train_size must be .* got \(160, 0\)'),
        ({'test_input_size': 192}, 'test_input_size is 192'),
        ({'input_size': [3, '160', '160'], 'test_input_size': None}, 'train_size must be a whole'),
        ({'architecture': 'resnetaa18'}, r'says that it is a resnetaa18, and resnet18 would be'),
        ({'architecture': 'resnet34'}, r'of another shape|missing in the file'),
        ({'architecture': ['resnet18']}, 'architecture is .*, not a name'),
        ({'global_pool': 'max'}, "global_pool is 'max'"),
        ({'label_names': ['a', 'b']}, 'its config names 2 labels and the network has 3 classes'),
        ({'label_names': ['a', ' ', 'c']}, 'label 1 is blank'),
        ({'label_names': ['a', 'b', 3]}, 'label_names must be a list of names'),
        ({'label_names': ['a', 'b\nx', 'c']}, 'label 1, .* contains a line break'),
        ({'label_names': ['a', 'b', '\x1b[2J']}, 'label 2, .* another control character'),
        ({'label_offset': 1}, 'label_offset is 1'),
        ({'label_names': {'0': 'a', '2': 'c'}}, 'leaves out some classes'),
        ({'label_names': {'a': 'x'}}, 'keys that are no numbers'),
        ({'label_descriptions': {'n01': 3}}, 'label_descriptions must hold texts'),
    ],
)
def test_what_cannot_be_followed_is_refused(tmp_path, weights, fields, message):
    source = write(tmp_path / 'hub', weights, changed(**fields))
    with pytest.raises(CheckpointError, match=message) as caught:
        port(source, tmp_path / 'out')
    assert str(caught.value).isprintable()
    assert not (tmp_path / 'out').exists()


def test_what_timm_writes_about_a_plain_network_passes(tmp_path, weights):
    arguments = {'num_classes': 3, 'global_pool': 'avg', 'in_chans': 3, 'aa_layer': None}
    config = CONFIG | {'model_args': arguments}
    assert read_hub_config(write(tmp_path / 'hub', weights, config)).architecture == 'resnet18'


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'global_pool': 'catavgmax'}, "global_pool is 'catavgmax'"),
        ({'aa_layer': 'blur'}, 'model_args has aa_layer'),
        ({'output_stride': 16, 'num_classes': 3}, 'model_args has output_stride'),
    ],
)
def test_arguments_of_another_network_are_refused(tmp_path, weights, arguments, message):
    with pytest.raises(CheckpointError, match=message):
        read_hub_config(write(tmp_path / 'hub', weights, CONFIG | {'model_args': arguments}))


def test_labels_inside_pretrained_cfg(tmp_path, weights):
    config = changed(label_names=None)
    config['pretrained_cfg']['label_names'] = {'0': 'n01', '2': 'c', '1': 'b'}
    labels = read_hub_config(write(tmp_path / 'hub', weights, config)).label_names
    assert labels == ('tench, a fish', 'b', 'c')


def test_a_test_crop_without_a_test_size_is_used_for_evaluation(tmp_path, weights):
    config = changed(test_input_size=None)
    preprocessing = read_hub_config(write(tmp_path / 'hub', weights, config)).preprocessing
    assert (preprocessing['test_size'], preprocessing['crop_fraction']) == ((160, 160), 0.95)


def test_a_file_that_its_config_contradicts_is_refused_from_python_too(tmp_path, weights):
    source = write(tmp_path / 'hub', weights, changed(architecture='resnetblur18'))
    path = source / 'model.safetensors'
    for name in (None, 'gc_resnet18'):
        with pytest.raises(CheckpointError, match='says that it is a resnetblur18'):
            load_torch(path, name)
    network, _, _ = load_torch(path, ignore_architecture=True)
    assert network == create_model('resnet18', num_classes=3)


def test_timms_own_prefix_of_a_directory(tmp_path, weights):
    source = write(tmp_path / 'hub', weights, CONFIG)
    assert load_pretrained(f'local-dir:{source}')[0] == create_model('resnet18', num_classes=3)


def test_a_hub_repository_without_a_config_is_what_timm_calls_it(tmp_path, weights, monkeypatch):
    (write(tmp_path / 'hub', weights, CONFIG) / 'config.json').unlink()

    def download(repository, name, revision=None):
        if not (tmp_path / 'hub' / name).exists():
            raise EntryNotFoundError(name)
        return tmp_path / 'hub' / name

    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', download)
    load_pretrained('hf-hub:timm/resnet18.a1_in1k')
    load_pretrained('hf-hub:alice/resnet_of_mine')
    with pytest.raises(CheckpointError, match='says that it is a resnetblur18'):
        load_pretrained('hf-hub:timm/resnetblur18.bt_in1k')


def test_the_file_itself_has_its_config_beside_it(tmp_path, weights):
    source = write(tmp_path / 'hub', weights, CONFIG) / 'model.safetensors'
    port(source, tmp_path / 'out')
    description = read_model_description(tmp_path / 'out')
    assert description.label_names == ('tench, a fish', 'n02', 'crane')
    assert description.preprocessing.test_size == 192


@pytest.mark.parametrize(
    'config', [[], 'x', {'pretrained_cfg': 3}, {'model_args': {'aa_layer': 1}}]
)
def test_a_config_of_another_form_is_refused(tmp_path, weights, config):
    with pytest.raises(CheckpointError, match=r'hub/config\.json: '):
        read_hub_config(write(tmp_path / 'hub', weights, config))


def test_a_damaged_config_is_refused(tmp_path, weights):
    source = write(tmp_path / 'hub', weights, CONFIG)
    (source / 'config.json').write_text('[' * 100_000)
    with pytest.raises(CheckpointError, match='nested too deeply'):
        port(source, tmp_path / 'out')


def test_a_new_classifier_has_no_labels_whatever_the_config_says(tmp_path, weights):
    backbone = {name: value for name, value in weights.items() if not name.startswith('fc.')}
    source = write(tmp_path / 'hub', backbone, CONFIG)
    port(source, tmp_path / 'out', drop_classifier=True, num_classes=3)
    description = read_model_description(tmp_path / 'out')
    assert description.label_names == ()
    assert description.preprocessing.test_size == 192


def test_label_names_of_ones_own_win(tmp_path, weights):
    source = write(tmp_path / 'hub', weights, changed(label_names=['only one']))
    (tmp_path / 'names.txt').write_text('x\ny\nz\n')
    port(source, tmp_path / 'out', label_names=tmp_path / 'names.txt')
    assert read_model_description(tmp_path / 'out').label_names == ('x', 'y', 'z')


def test_a_reverse_port_to_a_directory_is_read_back_whole(tmp_path, weights):
    port(write(tmp_path / 'hub', weights, CONFIG), tmp_path / 'ours')
    port_reverse(tmp_path / 'ours', 'torchvision', tmp_path / 'again')
    assert {path.name for path in (tmp_path / 'again').iterdir()} == {
        'model.safetensors',
        'config.json',
    }
    again = load_file(tmp_path / 'again' / 'model.safetensors')
    for name, array in weights.items():
        if not name.endswith('num_batches_tracked'):
            np.testing.assert_array_equal(again[name], array)
    port(tmp_path / 'again', tmp_path / 'twice')
    one, two = (read_model_description(tmp_path / name) for name in ('ours', 'twice'))
    assert (one.name, one.label_names) == (two.name, two.label_names)
    assert one.preprocessing == two.preprocessing
    with pytest.raises(CheckpointError, match='exists; name a new file or replace it'):
        port_reverse(tmp_path / 'ours', 'torchvision', tmp_path / 'again')
    port_reverse(tmp_path / 'ours', 'torchvision', tmp_path / 'again', overwrite=True)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith('.')]
    (tmp_path / 'own').mkdir()
    (tmp_path / 'own' / 'thesis.txt').write_text('')
    with pytest.raises(CheckpointError, match='holds something else'):
        port_reverse(tmp_path / 'ours', 'torchvision', tmp_path / 'own', overwrite=True)
    assert (tmp_path / 'own' / 'thesis.txt').exists()


@pytest.mark.parametrize(
    'name',
    [
        'timm/resnet50.a1_in1k',
        'resnet50.a1_in1k',
        'hf_hub:timm/resnet50.a1_in1k',
        'huggingface.co/timm/resnet50.a1_in1k',
        'https://huggingface.co/timm/resnet50.a1_in1k',
    ],
)
def test_a_name_of_the_hub_without_its_prefix_says_what_to_write(name):
    for load in (load_pretrained, load_torch):
        with pytest.raises(
            CheckpointError, match=r'write hf-hub:timm/resnet50.a1_in1k if you mean'
        ):
            load(name)


def test_load_torch_says_what_reads_the_hub():
    with pytest.raises(CheckpointError, match='load_torch reads files; load_pretrained reads'):
        load_torch('hf-hub:timm/resnet50.a1_in1k')


@pytest.mark.torch
def test_timm_loads_a_reverse_port_with_its_preprocessing(tmp_path, random_variables):
    import timm

    from gcnet_jax.models.registry import model_entry
    from gcnet_jax.stored import ModelDescription, write_ported

    entry = model_entry('gcresnext26ts')
    description = ModelDescription(
        'gcresnext26ts', {'num_classes': 2}, ('a', 'b'), entry.preprocessing
    )
    images = np.zeros((1, 64, 64, 3), np.float32)
    variables = random_variables(description.build(), images, train=False)
    write_ported(tmp_path / 'ours', description, variables)
    port_reverse(tmp_path / 'ours', 'timm', tmp_path / 'hub')
    network = timm.create_model(f'local-dir:{tmp_path / "hub"}', pretrained=True)
    assert network.num_classes == 2
    settings = timm.data.resolve_model_data_config(network, use_test_size=True)
    assert tuple(settings['input_size']) == (3, 288, 288)
    assert settings['crop_pct'] == 1.0
    assert settings['interpolation'] == 'bicubic'
