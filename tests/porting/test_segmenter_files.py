"""Whole files of segmenters: to a directory of ours and back, parts of them, and refused files."""

import numpy as np
import pytest

from gcnet_jax.__main__ import main
from gcnet_jax.context import GlobalContext
from gcnet_jax.data.segmentation_labels import LABEL_SETS
from gcnet_jax.errors import CheckpointError, ConfigError
from gcnet_jax.models import create_model
from gcnet_jax.porting import Report, load_torch, port, port_reverse, to_torch
from gcnet_jax.porting.convert import from_torch
from gcnet_jax.porting.files import read_checkpoint
from gcnet_jax.porting.load import Loaded, load_named
from gcnet_jax.porting.recognise import recognise_family, recognise_model
from gcnet_jax.porting.torch_writer import write_torch
from tests.porting.detector_files import shapes_of, write_detector
from tests.porting.detector_weights import detector_weights
from tests.porting.seeded import in_memory

NAME = 'gc_resnet50_d8_cityscapes'
WRITE = 'gcnet_jax.porting.port_checkpoint.write_ported'
CASES = {
    'r50_cityscapes': NAME,
    'r50_voc': 'gc_resnet50_d8_voc',
    'r101_ade20k': 'gc_resnet101_d8_ade20k',
}
ALL = {case: shapes_of(case, 'segmenter') for case in CASES}
R50 = ALL['r50_cityscapes']
HEAD, AUXILIARY = 'decode_head.', 'auxiliary_head.'


def without(shapes, *starts):
    return {name: shape for name, shape in shapes.items() if not name.startswith(starts)}


def with_classes(shapes, classes):
    return {
        name: (classes, *shape[1:]) if 'conv_seg' in name else shape
        for name, shape in shapes.items()
    }


def refused(path, message, *args, **options):
    """The file is refused in one line."""
    with pytest.raises(CheckpointError, match=message) as caught:
        load_torch(path, *args, **options)
    assert '\n' not in str(caught.value)
    assert len(str(caught.value)) < 1500


# Whole segmenters ---------------------------------------------------------------------------------


def test_files_have_as_many_tensors_as_mmsegmentations():
    assert [len(shapes) for shapes in ALL.values()] == [366, 366, 672]


@pytest.mark.parametrize('case', CASES)
def test_every_bit_comes_back(case):
    weights = detector_weights(ALL[case], 1)
    tensors = in_memory(weights)
    family = recognise_family(tensors)
    name, options = recognise_model(tensors.shapes, family)
    network = create_model(name, **options)
    back = to_torch(network, from_torch(tensors, family, network)[0], 'mmsegmentation')
    assert back.keys() == weights.keys()
    for name, expected in weights.items():
        found = back[name]
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype), name
        assert found.tobytes() == expected.tobytes(), name


@pytest.mark.slow
def test_every_bit_comes_back_from_a_directory(tmp_path, capsys):
    weights = detector_weights(R50, 1)
    path = tmp_path / 'gcnet_r50-d8_769x769_80k_cityscapes.pth'
    write_torch(path, weights, meta={'epoch': 12})
    description, report = port(path, tmp_path / 'ours')
    path.unlink()
    assert (description.name, description.task) == (f'{NAME}_769', 'segmentation')
    assert description.label_names == LABEL_SETS['cityscapes'].names
    assert not report.initialised
    assert not report.warnings
    arguments = ['--reverse', str(tmp_path / 'ours'), '--family', 'mmsegmentation']
    assert main(['port', *arguments, '--out', str(tmp_path / 'back.pth')]) == 0
    back = read_checkpoint(tmp_path / 'back.pth')
    names, palette = (list(part) for part in LABEL_SETS['cityscapes'])
    meta = back.metadata['meta']
    # mmsegmentation reads both, or neither.
    assert (meta['CLASSES'], meta['PALETTE']) == (names, list(map(list, palette)))
    assert meta.keys() == {'CLASSES', 'PALETTE', 'cfg'}
    # The config in the file tells that it slides windows.
    again = load_named(tmp_path / 'back.pth')
    assert (again.name, again.report.warnings) == (f'{NAME}_769', ())
    assert {name: back.tensors.shapes[name] for name in back.tensors} == R50
    for name, expected in weights.items():
        assert back.tensors[name].tobytes() == expected.tobytes(), name
    assert main(['port', *arguments, '--out', str(tmp_path / 'hub')]) == 1
    assert (
        'mmsegmentation reads a segmenter from one file: end --out in .pth'
        in capsys.readouterr().err
    )
    with pytest.raises(CheckpointError, match='timm has no network like EncoderDecoder'):
        port_reverse(tmp_path / 'ours', 'timm', tmp_path / 'x.pth')
    assert not (tmp_path / 'hub').exists()


@pytest.mark.parametrize(('case', 'name'), CASES.items())
def test_a_segmenter_is_recognised_by_its_tensors(case, name):
    shapes, classes = ALL[case], ALL[case][f'{HEAD}conv_seg.bias'][0]
    family = recognise_family(shapes)
    assert recognise_model(shapes, family) == (name, {'num_classes': classes})
    plain = without(shapes, f'{HEAD}gc_block.')
    expected = name.replace('gc_', 'fcn_')
    assert recognise_family(plain) is family
    assert recognise_model(plain, family) == (expected, {'num_classes': classes})
    # With as many classes as another data set has: prepared as scenes are.
    other = f'{name.rpartition("_d8_")[0]}_d8_ade20k'
    assert recognise_model(with_classes(shapes, 11), family) == (other, {'num_classes': 11})


def test_what_differs_from_the_rows_is_an_option():
    family = recognise_family(R50)
    cases = {
        'auxiliary_channels': (0, without(R50, AUXILIARY)),
        'context_ratio': (
            1 / 8,
            {n: (64, *s[1:]) if 'add_conv.0.weight' in n else s for n, s in R50.items()},
        ),
        'stem': (
            'imagenet',
            without(R50, 'backbone.stem.') | {'backbone.conv1.weight': (64, 3, 7, 7)},
        ),
    }
    for option, (value, shapes) in cases.items():
        assert recognise_model(shapes, family) == (NAME, {option: value, 'num_classes': 19})


def test_a_shallower_backbone_and_narrower_heads():
    """mmsegmentation's `fcn_r18-d8`, by hand."""
    model = create_model(
        'fcn_resnet50_d8_cityscapes', backbone='resnet18', channels=128, auxiliary_channels=64
    )
    from gcnet_jax.porting.convert import variable_shapes
    from gcnet_jax.porting.names import pair_names

    family = recognise_family(R50)
    targets = variable_shapes(model)
    pairings, nameless = pair_names(family, targets)
    assert not nameless
    shapes = {
        pair.theirs: pair.leaf.to_theirs(np.empty(targets[pair.ours].shape)).shape
        for pair in pairings
    }
    assert shapes['auxiliary_head.convs.0.conv.weight'] == (64, 256, 3, 3)
    assert recognise_model(shapes, family) == (
        'fcn_resnet50_d8_cityscapes',
        {'backbone': 'resnet18', 'channels': 128, 'auxiliary_channels': 64, 'num_classes': 19},
    )


def test_without_auxiliary_head(tmp_path):
    path = write_detector(tmp_path / 'a.pth', without(R50, AUXILIARY))
    for model in (None, NAME):
        loaded = load_named(path, model)
        assert loaded.options == {'num_classes': 19, 'auxiliary_channels': 0} | (
            {'stem': 'deep'} if model else {}
        )
        assert 'auxiliary_head' not in loaded.variables['params']
    refused(path, 'missing in the file: auxiliary_head', auxiliary_channels=256)


def test_heads_of_another_number_of_classes(tmp_path, monkeypatch):
    path = write_detector(tmp_path / 'a.pth', R50)
    refused(path, r'has 19 classes and num_classes is 11: drop .*--drop-classifier', num_classes=11)
    refused(path, r'Most likely the number of classes differs: .*', NAME, num_classes=11)
    written = {}
    monkeypatch.setattr(WRITE, lambda out, _, variables: out.mkdir() or written.update(variables))
    description, report = port(path, tmp_path / 'ours', num_classes=11, drop_classifier=True)
    assert description.label_names == ()
    assert {part.rpartition('/')[0] for part in report.initialised} == {
        'params/head/logits',
        'params/auxiliary_head/logits',
    }
    assert written['params']['head']['logits']['kernel'].shape == (512, 11)
    assert written['params']['auxiliary_head']['logits']['kernel'].shape == (256, 11)
    np.testing.assert_array_equal(written['params']['head']['conv1']['conv']['kernel'], 0.5)


# Labels -------------------------------------------------------------------------------------------


def described(tmp_path, monkeypatch, row, classes, meta):
    path = write_detector(tmp_path / 'a.pth', R50, meta)
    metadata = read_checkpoint(path).metadata
    # As a network of another size, which takes less time.
    network = create_model('resnet20', num_classes=classes)
    loaded = Loaded(network, row, {}, {}, Report('mmsegmentation', 1, 1, {}), metadata)
    monkeypatch.setattr('gcnet_jax.porting.port_checkpoint.load_named', lambda *_, **__: loaded)
    monkeypatch.setattr(WRITE, lambda out, description, variables: out.mkdir())
    return port(path, tmp_path / 'ours')[0].label_names


@pytest.mark.parametrize(
    ('row', 'classes', 'expected'),
    [
        (NAME, 19, LABEL_SETS['cityscapes'].names),
        ('fcn_resnet101_d8_cityscapes_769', 19, LABEL_SETS['cityscapes'].names),
        ('gc_resnet101_d8_ade20k', 150, LABEL_SETS['ade20k'].names),
        ('gc_resnet50_d8_voc', 21, LABEL_SETS['voc'].names),
        ('gc_resnet101_d8_ade20k', 60, ()),
    ],
)
def test_labels_of_the_rows_data_set(tmp_path, monkeypatch, row, classes, expected):
    assert described(tmp_path, monkeypatch, row, classes, {'epoch': 3}) == expected


@pytest.mark.parametrize(
    ('meta', 'says'),
    [
        ({'CLASSES': tuple(f'thing {n}' for n in range(19))}, ''),
        ({'dataset_meta': {'classes': [f'thing {n}' for n in range(19)]}}, ''),
        ({'CLASSES': ('cat', 'dog')}, 'it names 2 labels and the network has 19 classes; give the'),
        ({'CLASSES': ('cat\nb',) * 19}, 'label 0 of the file, cat.*, contains a line break'),
    ],
)
def test_labels_in_the_file(tmp_path, monkeypatch, meta, says):
    if says:
        with pytest.raises(CheckpointError, match=says):
            described(tmp_path, monkeypatch, NAME, 19, meta)
        return
    labels = described(tmp_path, monkeypatch, NAME, 19, meta)
    assert labels == tuple(f'thing {n}' for n in range(19))


# Parts of a segmenter -----------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['resnet50', 'gc_resnet50'])
def test_the_backbone_alone(tmp_path, name):
    path = write_detector(tmp_path / 'a.pth', R50)
    loaded = load_named(path, name, num_classes=0)
    assert (loaded.name, loaded.options) == (name, {'stem': 'deep', 'num_classes': 0})
    lines = '\n'.join(loaded.report.lines())
    assert "the segmenter's heads" in lines
    assert all('context_' in path for path in loaded.report.initialised)
    assert bool(loaded.report.initialised) == name.startswith('gc_')
    # Back as the library calls it.
    if name == 'resnet50':
        back = to_torch(loaded.network, loaded.variables, 'mmsegmentation')
        assert {key: array.shape for key, array in back.items()} == {
            key: shape for key, shape in R50.items() if key.startswith('backbone.')
        }


def test_a_classifier_of_open_mmlab(tmp_path):
    """`open-mmlab://resnet50_v1c`, what the published segmenters started from."""
    start = 'backbone.'
    shapes = {n.removeprefix(start): s for n, s in R50.items() if n.startswith(start)}
    shapes |= {'fc.weight': (1000, 2048), 'fc.bias': (1000,)}
    loaded = load_named(write_detector(tmp_path / 'a.pth', shapes))
    assert loaded.name == 'resnet50'
    assert loaded.options == {'stem': 'deep', 'num_classes': 1000}
    assert not loaded.report.initialised


def test_the_block_alone(tmp_path):
    path = write_detector(tmp_path / 'a.pth', R50)
    for model in ('global_context', GlobalContext(ratio=1 / 4)):
        network, variables, report = load_torch(path, model)
        assert isinstance(network, GlobalContext)
        assert variables['params']['add']['reduce']['kernel'].shape == (512, 128)
        assert report.ported == 8
    with pytest.raises(CheckpointError, match='holds a context block, not a network'):
        port(path, tmp_path / 'ours', 'global_context')
    other = write_detector(tmp_path / 'b.pth', without(R50, f'{HEAD}gc_block.'))
    refused(other, 'holds no context block in a head', 'global_context')
    with pytest.raises(ConfigError, match='has its options from the file'):
        load_torch(path, 'global_context', ratio=1 / 2)


# Refused files ------------------------------------------------------------------------------------


def test_missing_and_misshapen_tensors_are_named(tmp_path):
    shapes = dict(R50)
    for name in (f'{HEAD}conv_cat.bn.bias', 'backbone.stem.4.running_var'):
        del shapes[name]
    path = write_detector(tmp_path / 'a.pth', shapes)
    refused(path, r'2 missing in the file: .*stem.4.running_var, decode_head.conv_cat.bn.bias\. ')
    shapes = dict(R50) | {f'{HEAD}convs.1.conv.weight': (512, 512, 1, 1)}
    path = write_detector(tmp_path / 'b.pth', shapes)
    refused(path, r'1 of another shape: decode_head.convs.1.conv.weight is \[512, 512, 1, 1\], not')


def test_a_truncated_file(tmp_path):
    content = write_detector(tmp_path / 'a.pth', R50).read_bytes()
    for size in (len(content) - 1, len(content) // 2, 100):
        (tmp_path / 'a.pth').write_bytes(content[:size])
        refused(tmp_path / 'a.pth', r'damaged or truncated PyTorch file .*: fetch it again')


@pytest.mark.parametrize(
    ('more', 'says'),
    [
        ({f'{HEAD}psp_modules.0.1.conv.weight': (512, 2048, 1, 1)}, 'PSPHead, and the segmenters'),
        ({f'{HEAD}aspp_modules.0.conv.weight': (512, 2048, 1, 1)}, r'ASPPHead \(DeepLab\), and'),
        ({f'{HEAD}image_pool.1.conv.weight': (512, 2048, 1, 1)}, r'ASPPHead \(DeepLab\), and'),
        ({f'{HEAD}nl_block.g.conv.weight': (256, 512, 1, 1)}, r'NLHead \(non-local\), and'),
        ({f'{HEAD}dnl_block.g.conv.weight': (256, 512, 1, 1)}, 'DNLHead'),
        ({f'{HEAD}cca.gamma': (1,)}, 'CCHead'),
        ({f'{HEAD}pam.gamma.scale': (1,)}, 'DAHead'),
        ({f'{HEAD}lateral_convs.0.conv.weight': (512, 256, 1, 1)}, 'UPerHead'),
        ({f'{HEAD}gc_block.channel_mul_conv.0.weight': (128, 512, 1, 1)}, 'context multiplies'),
        ({f'{HEAD}0.conv_seg.weight': (19, 512, 1, 1)}, 'chain of several'),
        ({f'{AUXILIARY}1.conv_seg.weight': (19, 512, 1, 1)}, 'chain of several'),
        ({f'{HEAD}convs.2.conv.weight': (512, 512, 3, 3)}, 'head of other layers'),
        ({f'{AUXILIARY}convs.1.conv.weight': (256, 256, 3, 3)}, 'head of other layers'),
        ({f'{HEAD}bottleneck.conv.weight': (512, 4096, 3, 3)}, 'head of other layers'),
    ],
)
def test_other_heads(tmp_path, more, says):
    path = write_detector(tmp_path / 'a.pth', R50 | more)
    refused(path, rf"its head is mmsegmentation's .*{says}.* such as resnet50")
    if 'other layers' not in says:
        refused(path, rf"Most likely its head is mmsegmentation's .*{says}", NAME)
    else:
        refused(path, '1 without a place', NAME)
    assert load_named(path, 'resnet50', num_classes=0).name == 'resnet50'


@pytest.mark.parametrize('missing', ['convs.0.', 'convs.1.', 'conv_cat.', 'conv_seg.'])
def test_heads_of_fewer_layers(tmp_path, missing):
    path = write_detector(tmp_path / 'a.pth', without(R50, HEAD + missing))
    refused(path, "its head is mmsegmentation's head of fewer layers, and the segmenters here")


def test_one_logit_is_no_class(tmp_path):
    path = write_detector(tmp_path / 'a.pth', with_classes(R50, 1))
    refused(path, 'its head has one logit, a sigmoid over foreground and background')


def test_other_backbones(tmp_path):
    averaged = {
        name.replace('downsample.1', 'downsample.2').replace('downsample.0', 'downsample.1'): shape
        for name, shape in R50.items()
    }
    path = write_detector(tmp_path / 'a.pth', averaged)
    refused(path, r'its shortcuts average before they convolve \(ResNet-D\)')
    refused(path, r'without a place: .*Most likely its shortcuts average', NAME)
    other = without(R50, 'backbone.') | {'backbone.patch_embed.proj.weight': (96, 3, 4, 4)}
    path = write_detector(tmp_path / 'b.pth', other)
    refused(path, 'the backbone of this segmenter is no ResNet')


def test_names_that_only_look_like_a_segmenters(tmp_path):
    """Shapes of a stranger: nothing but one clear error."""
    cases = (
        {'backbone.a': (1,), f'{HEAD}b': (1,)},
        R50 | {f'{HEAD}conv_seg.weight': (19,)},
        R50 | {f'{HEAD}conv_seg.weight': (0, 0, 0, 0)},
        R50 | {f'{HEAD}gc_block.channel_add_conv.0.weight': (128, 0, 1, 1)},
        R50 | {f'{HEAD}gc_block.channel_add_conv.0.weight': (1,)},
        R50 | {f'{AUXILIARY}conv_seg.weight': (19,)},
        R50 | {'backbone.layer1.0.conv2.weight': ()},
        R50 | {'backbone.stem.6.weight': ()},
        R50 | {'backbone.layer9.0.conv2.weight': (1, 1, 1, 1)},
    )
    for number, shapes in enumerate(cases):
        path = write_detector(tmp_path / f'{number}.pth', shapes)
        with pytest.raises((CheckpointError, ConfigError)) as caught:
            load_torch(path)
        assert '\n' not in str(caught.value)
