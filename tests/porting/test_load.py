"""Whole files in and out, on networks that are small enough to write to disk."""

import json
import re

import flax.traverse_util
import huggingface_hub
import jax
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.numpy import load_file, save_file

from gcnet_jax.__main__ import main
from gcnet_jax.errors import CheckpointError, ConfigError
from gcnet_jax.models import create_model
from gcnet_jax.porting import (
    load_pretrained,
    load_torch,
    port,
    port_reverse,
    to_torch,
    write_safetensors,
)
from gcnet_jax.porting.convert import variable_shapes
from gcnet_jax.porting.files import read_checkpoint
from gcnet_jax.porting.load import load_named
from gcnet_jax.stored import load_variables
from tests.porting.seeded import generator, seeded_images, seeded_tensors


def seeded_variables(model):
    """Variables of a network, drawn here and not by the code under test."""
    shapes = variable_shapes(model)
    flat = {}
    for path, leaf in shapes.items():
        values = generator(path, 1).uniform(0.1, 0.2, leaf.shape)
        flat[path] = values.astype(np.float32)
    return flax.traverse_util.unflatten_dict(flat, sep='/')


def saved(path, name, family, **options):
    """A file of `family` with the seeded weights of a network."""
    model = create_model(name, **options)
    shapes = {k: v.shape for k, v in to_torch(model, seeded_variables(model), family).items()}
    save_file(seeded_tensors(shapes), path)
    return path


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    return saved(tmp_path_factory.mktemp('plain') / 'a.safetensors', 'resnet20', 'torchvision')


@pytest.fixture(scope='module')
def backbone(tmp_path_factory):
    """A detector: a backbone with context blocks, and heads."""
    path = tmp_path_factory.mktemp('detector') / 'detector.safetensors'
    tensors = load_file(saved(path, 'gc_resnet20', 'mmdetection'))
    heads = ('neck.fpn_convs.0.conv.weight', 'roi_head.bbox_head.fc_cls.weight', 'rpn_head.a.bias')
    save_file(tensors | {name: np.ones(2, np.float32) for name in heads}, path)
    return path


def test_a_plain_network_is_recognised(plain):
    model, _, report = load_torch(plain)
    assert model == create_model('resnet20', num_classes=10)
    assert report.family == 'torchvision'
    assert not report.initialised


def test_a_plain_network_in_a_gc_network_starts_with_the_same_outputs(plain):
    images = seeded_images(32, 32)
    model, variables, _ = load_torch(plain)
    options = {'model': 'gc_resnet20', 'context': {'stages': (3,), 'position': 'after_conv2'}}
    gc_model, gc_variables, report = load_torch(plain, **options)
    flat = flax.traverse_util.flatten_dict(gc_variables, sep='/')
    assert report.initialised == tuple(sorted(path for path in flat if '/context_' in path))
    assert len(report.initialised) == 3 * 8  # three blocks of eight leaves
    np.testing.assert_array_equal(
        gc_model.apply(gc_variables, images, train=False),
        model.apply(variables, images, train=False),
    )
    another = load_torch(plain, seed=1, **options)[1]
    for path, value in flax.traverse_util.flatten_dict(another, sep='/').items():
        is_drawn = path in report.initialised and path.endswith(('logits/kernel', 'reduce/kernel'))
        assert np.any(value != flat[path]) == is_drawn, path
    assert 'newly initialised 24' in '\n'.join(report.lines())


def test_a_detector_gives_its_backbone(backbone):
    loaded = load_named(backbone)
    assert (loaded.name, loaded.options) == ('gc_resnet20', {'num_classes': 0})
    model, variables, report = loaded.network, loaded.variables, loaded.report
    assert 'classifier' not in variables['params']
    left = {name for names in report.left.values() for name in names}
    assert {name for name in left if not name.endswith('num_batches_tracked')} == {
        'neck.fpn_convs.0.conv.weight',
        'roi_head.bbox_head.fc_cls.weight',
        'rpn_head.a.bias',
    }
    pooled = model.apply(variables, seeded_images(32, 32), train=False)
    assert pooled.shape == (1, 64)

    _, variables, report = load_torch(backbone, num_classes=7)
    assert report.initialised == ('params/classifier/bias', 'params/classifier/kernel')
    assert variables['params']['classifier']['kernel'].shape == (64, 7)


def test_context_blocks_that_no_row_has_are_recognised(tmp_path):
    context = {
        'block': 'global_context',
        'stages': (2, 3),
        'position': 'after_conv2',
        'ratio': 1 / 8,
        'fusion': 'scale_add',
        'pooling': 'average',
    }
    path = saved(tmp_path / 'a.safetensors', 'resnet20', 'mmdetection', context=context)
    model, _, _ = load_torch(path)
    expected = create_model('resnet20', context=context, num_classes=0)
    assert variable_shapes(model) == variable_shapes(expected)
    (place,), (wanted,) = model.context, expected.context
    assert (place.stages, place.position, place.blocks) == (wanted.stages, wanted.position, None)


def test_another_number_of_classes_only_when_asked(plain):
    for options in ({'num_classes': 3}, {'model': 'resnet20', 'num_classes': 3}):
        with pytest.raises(CheckpointError, match='--drop-classifier') as error:
            load_torch(plain, **options)
        assert '10' in str(error.value)
        _, variables, report = load_torch(plain, drop_classifier=True, **options)
        assert variables['params']['classifier']['bias'].shape == (3,)
        assert report.left['the classifier, dropped as asked'] == ('fc.bias', 'fc.weight')
        assert report.initialised == ('params/classifier/bias', 'params/classifier/kernel')
    model, _, _ = load_torch(plain, num_classes=0, drop_classifier=True)
    assert model.num_classes == 0


@pytest.mark.parametrize(
    ('change', 'messages'),
    [
        (
            lambda t: t.pop('layer2.0.bn1.weight'),
            ['1 missing in the file: layer2.0.bn1.weight', 'changed or is incomplete'],
        ),
        (
            lambda t: t.update({'layer2.0.extra': np.ones(1, np.float32)}),
            ['1 without a place: layer2.0.extra', 'changed or is incomplete'],
        ),
        (
            lambda t: t.update({'layer2.0.conv1.weight': np.ones((32, 16, 1, 3), np.float32)}),
            ['layer2.0.conv1.weight is [32, 16, 1, 3], not [32, 16, 3, 3]'],
        ),
        (
            lambda t: t.update({'layer2.0.bn1.weight': t['layer2.0.bn1.weight'][:, None]}),
            ['layer2.0.bn1.weight is [32, 1], not [32]'],
        ),
        (
            lambda t: t.update({'layer2.0.conv2_offset.weight': np.ones(1, np.float32)}),
            ['deformable convolutions'],
        ),
        (
            lambda t: t.update({'conv1.weight': np.ones((16, 1, 3, 3), np.float32)}),
            [
                'conv1.weight is [16, 1, 3, 3]',
                'it reads images of 1 channels; networks here read 3',
            ],
        ),
        (
            lambda t: t.update({'layer2.0.se.fc1.weight': np.ones((4, 32, 1, 1), np.float32)}),
            ['1 without a place: layer2.0.se.fc1.weight', 'it is an SE ResNet'],
        ),
        (
            lambda t: [t.pop('fc.weight'), t.pop('fc.bias')],
            ['2 missing in the file: fc.bias, fc.weight', 'the file is a backbone'],
        ),
    ],
)
def test_what_does_not_fit_is_listed(tmp_path, plain, change, messages):
    tensors = load_file(plain)
    change(tensors)
    save_file(tensors, tmp_path / 'a.safetensors')
    with pytest.raises(CheckpointError) as error:
        load_torch(tmp_path / 'a.safetensors', 'resnet20')
    text = str(error.value)
    assert str(tmp_path) in text
    assert '\n' not in text
    for message in messages:
        assert message in text


def test_the_file_of_another_network(tmp_path, plain, backbone):
    with pytest.raises(CheckpointError, match='file of another network'):
        load_torch(plain, 'resnet56')
    with pytest.raises(
        CheckpointError, match='names of torchvision, which are not those of a Byob'
    ):
        load_torch(plain, 'gcresnet50t')
    with pytest.raises(CheckpointError, match='lacks the context blocks of the file'):
        load_torch(backbone, 'resnet20')
    context = {'block': 'global_context', 'stages': (1, 2, 3), 'position': 'after_conv2'}
    with pytest.raises(CheckpointError, match='ratio differs'):
        load_torch(backbone, 'resnet20', context=context | {'ratio': 1 / 2})
    save_file({'blocks.0.attn.qkv.weight': np.ones(1)}, tmp_path / 'vit.safetensors')
    with pytest.raises(CheckpointError, match='no known library uses the names'):
        load_torch(tmp_path / 'vit.safetensors')
    with pytest.raises(CheckpointError, match='timm does not use the names'):
        load_torch(plain, family='timm')
    with pytest.raises(ConfigError, match="did you mean 'torchvision'"):
        load_torch(plain, family='torchvison')


def test_values_that_are_not_finite_are_refused_unless_asked_for(tmp_path, plain):
    tensors = load_file(plain)
    tensors['layer1.0.conv1.weight'][0, 0, 0] = [np.nan, np.inf, 1]
    tensors['fc.bias'][3] = -np.inf
    tensors['bn1.running_var'][0] = -1e-3
    file = tmp_path / 'a.safetensors'
    save_file(tensors, file)
    counted = r'4 values are NaN, infinite or negative variances, in 3 tensors: '
    with pytest.raises(CheckpointError, match=counted + r'.*fc\.bias.*--allow-nonfinite'):
        load_torch(file)
    assert main(['port', str(file), '--out', str(tmp_path / 'out')]) == 1
    assert not (tmp_path / 'out').exists()
    _, _, report = load_torch(file, allow_nonfinite=True)
    assert re.match(counted, report.warnings[0])
    assert report.lines()[-1].startswith('warning: 4 values')
    assert main(['port', str(file), '--out', str(tmp_path / 'out'), '--allow-nonfinite']) == 0
    with pytest.raises(CheckpointError, match='3 of its arrays cannot be used'):
        load_variables(tmp_path / 'out')


def test_libraries_that_lack_the_network():
    gc = create_model('gc_resnet20')
    variables = seeded_variables(gc)
    with pytest.raises(CheckpointError, match='torchvision has no names for 72 leaves') as error:
        to_torch(gc, variables, 'torchvision')
    assert 'choose mmdetection' in str(error.value)
    with pytest.raises(CheckpointError, match='timm has no network like ResNet'):
        to_torch(gc, variables, 'timm')


# Directories --------------------------------------------------------------------------------------


def test_a_ported_directory_is_a_checkpoint_and_goes_back(tmp_path, plain):
    description, report = port(plain, tmp_path / 'ported')
    assert (description.name, description.options) == ('resnet20', {'num_classes': 10})
    assert 'a.safetensors' in description.source
    assert report.ported > 100
    stored, variables = load_variables(tmp_path / 'ported')
    assert stored.build() == create_model('resnet20', num_classes=10)
    _, expected, _ = load_torch(plain)
    jax.tree.map(np.testing.assert_array_equal, variables, expected)
    assert [path.name for path in tmp_path.iterdir()] == ['ported']

    back = tmp_path / 'back.safetensors'
    port_reverse(tmp_path / 'ported', 'torchvision', back)
    tensors, original = load_file(back), load_file(plain)
    assert set(tensors) == set(original)
    for name, value in original.items():
        if not name.endswith('num_batches_tracked'):
            assert tensors[name].tobytes() == value.tobytes()
    with pytest.raises(CheckpointError, match='exists'):
        port_reverse(tmp_path / 'ported', 'torchvision', back)
    port_reverse(tmp_path / 'ported', 'torchvision', back, overwrite=True)
    with pytest.raises(CheckpointError, match=r'must end in \.safetensors or \.pth'):
        port_reverse(tmp_path / 'ported', 'torchvision', tmp_path / 'a.bin')


def test_a_pth_file_has_the_same_bytes(tmp_path, plain):
    names = tmp_path / 'names.txt'
    names.write_text(''.join(f'class {n}\n' for n in range(10)))
    port(plain, tmp_path / 'ported', label_names=names)
    original = load_file(plain)
    for family, meta in (('torchvision', {}), ('mmdetection', {'CLASSES'})):
        port_reverse(tmp_path / 'ported', family, tmp_path / 'back.pth', overwrite=True)
        file = read_checkpoint(tmp_path / 'back.pth')
        assert file.wrapper == ('state_dict' if meta else '')
        assert file.metadata.get('meta', {}).keys() == set(meta)
        found = {name.removeprefix('backbone.') for name in file.tensors}
        assert found == {name for name in original if not meta or not name.startswith('fc.')}
        for name in file.tensors:
            if not name.endswith('num_batches_tracked'):
                value = original[name.removeprefix('backbone.')]
                assert file.tensors[name].tobytes() == value.tobytes()
    with pytest.raises(CheckpointError, match='exists'):
        port_reverse(tmp_path / 'ported', 'torchvision', tmp_path / 'back.pth')


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig'])
def test_label_names_are_read_from_a_file(tmp_path, plain, encoding):
    names = tmp_path / 'names.txt'
    expected = ('crane', *(f'Größe {index}' for index in range(8)), 'crane')
    names.write_text('\n'.join(expected) + '\n', encoding)
    description, _ = port(plain, tmp_path / 'ported', label_names=names)
    assert description.label_names == expected
    assert load_variables(tmp_path / 'ported')[0].label_names == description.label_names


def test_an_existing_directory_is_kept(tmp_path, plain):
    out = tmp_path / 'out'
    out.mkdir()
    (out / 'thesis.tex').write_text('mine')
    with pytest.raises(CheckpointError, match='exists; name a new directory'):
        port(plain, out)
    with pytest.raises(CheckpointError, match='holds no checkpoint, so --overwrite'):
        port(plain, out, overwrite=True)
    assert (out / 'thesis.tex').read_text() == 'mine'

    port(plain, tmp_path / 'ported')
    port(plain, tmp_path / 'ported', 'gc_resnet20', overwrite=True)
    assert load_variables(tmp_path / 'ported')[0].name == 'gc_resnet20'
    assert sorted(path.name for path in tmp_path.iterdir()) == ['out', 'ported']


@pytest.mark.parametrize('damage', ['truncated', 'missing', 'other'])
def test_bad_files_leave_no_directory(tmp_path, plain, damage):
    path = tmp_path / 'a.safetensors'
    content = plain.read_bytes()
    if damage == 'truncated':
        path.write_bytes(content[:-1000])
    elif damage == 'other':
        path.write_bytes(content)
    with pytest.raises(CheckpointError):
        port(path, tmp_path / 'out', 'gcresnet50t' if damage == 'other' else None)
    assert [p.name for p in tmp_path.iterdir()] in ([], ['a.safetensors'])


def test_write_safetensors_is_whole_or_absent(tmp_path):
    with pytest.raises(CheckpointError, match='cannot write'):
        write_safetensors(tmp_path / 'missing' / 'a.safetensors', {'w': np.ones(2)})
    path = tmp_path / 'a.safetensors'
    write_safetensors(path, {'w': np.ones(2)})
    with pytest.raises(CheckpointError, match='cannot write'):
        write_safetensors(path, {'w': np.array(['text'])})
    assert list(tmp_path.iterdir()) == [path]
    np.testing.assert_array_equal(load_file(path)['w'], [1, 1])


def test_a_written_file_can_be_read_by_whoever_can_read_others(tmp_path):
    write_safetensors(tmp_path / 'a.safetensors', {'w': np.ones(2)})
    (tmp_path / 'other').touch()
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


# The hub ------------------------------------------------------------------------------------------


def test_hub_names_the_network_and_checks_the_file(tmp_path, plain, monkeypatch):
    asked = []
    blob = tmp_path / ('0' * 64)
    blob.write_bytes(plain.read_bytes())

    def download(repository, name, revision):
        asked.append((repository, name, revision))
        return str(blob if revision == 'bad' else plain)

    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', download)
    model, _, _ = load_pretrained('hf-hub:someone/resnet20.cifar@main')
    assert model == create_model('resnet20')
    assert asked == [
        ('someone/resnet20.cifar', 'model.safetensors', 'main'),
        ('someone/resnet20.cifar', 'config.json', 'main'),
    ]
    with pytest.raises(CheckpointError, match='which are not those of a ByobNet'):
        load_pretrained('hf-hub:timm/gcresnet50t.ra2_in1k')
    with pytest.raises(CheckpointError, match=r'is damaged .*delete it and load again'):
        load_pretrained('hf-hub:someone/resnet20.cifar@bad')


def test_hub_without_a_network_says_what_to_do(monkeypatch):
    def download(*_, **__):
        raise LocalEntryNotFoundError('cannot find the requested files in the local cache')

    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', download)
    with pytest.raises(CheckpointError, match='Without a network, fetch its model') as error:
        load_pretrained('hf-hub:timm/gcresnet50t.ra2_in1k')
    assert 'give the path' in str(error.value)


def test_load_pretrained_takes_paths(tmp_path, plain):
    (tmp_path / 'model.safetensors').write_bytes(plain.read_bytes())
    assert load_pretrained(tmp_path)[0] == load_pretrained(plain)[0]
    (tmp_path / 'empty').mkdir()
    with pytest.raises(CheckpointError, match=re.escape('holds none of model.safetensors')):
        load_pretrained(tmp_path / 'empty')


def test_names_of_the_published_files():
    """The registry has timm's names, with timm's preprocessing."""
    from gcnet_jax.models import model_entry

    for name in ('gcresnext26ts', 'gcresnet33ts', 'gcresnet50t', 'gcresnext50ts'):
        assert model_entry(name).preprocessing.train_size == 256
    for name in ('gcresnet50t', 'gc_efficientnetv2_rw_t'):
        expected = {
            'mean': [0.485, 0.456, 0.406],
            'std': [0.229, 0.224, 0.225],
            'interpolation': 'bicubic',
            'crop_fraction': 1.0,
            'test_size': 288,
        }
        found = json.loads(json.dumps(vars(model_entry(name).preprocessing)))
        assert expected.items() <= found.items()


@pytest.mark.parametrize('value', [1e300, np.nan, -np.inf])
def test_weights_beyond_float32_are_refused_by_name(tmp_path, plain, value):
    """1e300 is finite in float64, and infinite in the float32 that it is read as."""
    name = 'layer2.0.bn1.weight'
    tensors = load_file(plain)
    tensors[name] = np.full(tensors[name].shape, value, np.float64)
    save_file(tensors, tmp_path / 'a.safetensors')
    with pytest.raises(CheckpointError, match=rf'NaN, infinite.*{name}.*--allow-nonfinite'):
        load_torch(tmp_path / 'a.safetensors')
