"""What published segmenters say of themselves: which network it chooses, and what is refused."""

import hashlib
import re

import pytest

from gcnet_jax.errors import CheckpointError, ConfigError
from gcnet_jax.porting import published_segmenters
from gcnet_jax.porting.files import TorchFile
from gcnet_jax.porting.load import load_named
from gcnet_jax.porting.published_segmenters import (
    PUBLISHED,
    check_told,
    choose_row,
    sources_of,
    told_by_name,
)
from gcnet_jax.porting.tensors import LazyTensors
from tests.porting.detector_files import shapes_of, write_detector
from tests.porting.segmenter_configs import CONFIGS

NAME = 'gc_resnet50_d8_cityscapes'
R50 = shapes_of('r50_cityscapes', 'segmenter')
# As mmcv and mmengine write the config of the same network; of mmcv 1, the tests stand outside.
PYTHON = """norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    type='EncoderDecoder',
    backbone=dict(
        type='ResNetV1c', depth=50, num_stages=4, out_indices=(0, 1, 2, 3),
        dilations=(1, 1, 2, 4), strides=(1, 2, 1, 1),
        norm_cfg=dict(type='SyncBN', requires_grad=True), style='pytorch',
        contract_dilation=True),
    decode_head=dict(
        type='GCHead', in_channels=2048, channels=512, ratio=0.25, pooling_type='att',
        fusion_types=('channel_add', ), num_classes=19, align_corners=True,
        loss_decode=dict(type='CrossEntropyLoss', loss_weight=1.0)),
    auxiliary_head=dict(type='FCNHead', num_convs=1, num_classes=19, align_corners=True))
train_cfg = dict()
test_cfg = dict(mode='slide', crop_size=(769, 769), stride=(513, 513))"""
# In the order of the letters, as mmengine writes it: the type of a norm precedes the backbone's.
SORTED = """crop_size = (769, 769)
model = dict(
    auxiliary_head=dict(
        align_corners=True, in_channels=1024, in_index=2,
        loss_decode=dict(loss_weight=0.4, type='CrossEntropyLoss', use_sigmoid=False),
        norm_cfg=dict(requires_grad=True, type='SyncBN'), num_classes=19, type='FCNHead'),
    backbone=dict(
        contract_dilation=True, depth=50, dilations=(1, 1, 2, 4),
        norm_cfg=dict(requires_grad=True, type='SyncBN'), norm_eval=False, num_stages=4,
        out_indices=(0, 1, 2, 3), strides=(1, 2, 1, 1), style='pytorch', type='ResNetV1c'),
    data_preprocessor=dict(size=(769, 769), type='SegDataPreProcessor'),
    decode_head=dict(
        align_corners=True, channels=512, dropout_ratio=0.1, fusion_types=('channel_add', ),
        in_channels=2048, in_index=3,
        loss_decode=dict(loss_weight=1.0, type='CrossEntropyLoss', use_sigmoid=False),
        norm_cfg=dict(requires_grad=True, type='SyncBN'), num_classes=19, pooling_type='att',
        ratio=0.25, type='GCHead'),
    test_cfg=dict(crop_size=(769, 769), mode='slide', stride=(513, 513)),
    train_cfg=dict(), type='EncoderDecoder')
test_cfg = dict(type='TestLoop')"""
SETTINGS = {
    'model': {
        'backbone': {
            'type': 'ResNetV1c', 'depth': 50, 'dilations': [1, 1, 2, 4], 'strides': [1, 2, 1, 1],
            'contract_dilation': True,
        },
        'decode_head': {
            'type': 'GCHead', 'ratio': 0.25, 'num_classes': 19, 'align_corners': True,
        },
        'test_cfg': {'mode': 'slide', 'crop_size': [769, 769], 'stride': [513, 513]},
    }
}  # fmt: skip
WHOLE = (
    ('align_corners=True', 'align_corners=False'),
    ("mode='slide', crop_size=(769, 769), stride=(513, 513)", "mode='whole'"),
)


def named(path, metadata=None):
    return TorchFile(path, LazyTensors({}), metadata=metadata or {})


def chosen(file, name=NAME, options=None):
    """The row and the options that are chosen, once they are checked."""
    sources = sources_of(file)
    name, options, notes = choose_row(sources, name, options or {})
    check_told(file.path, sources, name, options)
    return name, options, notes


def plain_row(name):
    return name.removesuffix('_769')


# Names --------------------------------------------------------------------------------------------


def test_every_published_file_is_there_once():
    assert len(PUBLISHED) == 16
    assert all(re.fullmatch('[0-9a-f]{8}', digits) for digits in PUBLISHED)
    assert all(file.endswith(f'-{digits}.pth') for digits, file in PUBLISHED.items())
    assert len({*PUBLISHED.values()}) == 16
    assert {file.split('_2020')[0] for file in PUBLISHED.values()} == {
        f'gcnet_{depth}-d8_{rest}'
        for depth in ('r50', 'r101')
        for rest in (
            *('512x1024_40k_cityscapes', '512x1024_80k_cityscapes', '769x769_40k_cityscapes'),
            *('769x769_80k_cityscapes', '512x512_80k_ade20k', '512x512_160k_ade20k'),
            *('512x512_20k_voc12aug', '512x512_40k_voc12aug'),
        )
    }


def row_of(file):
    depth = re.search(r'_r(\d+)-d8', file)[1]
    data = re.search('cityscapes|ade20k|voc', file)[0]
    return f'gc_resnet{depth}_d8_{data}{"_769" if "769x769" in file else ""}'


@pytest.mark.parametrize('file', PUBLISHED.values())
def test_a_name_tells_its_network(tmp_path, file):
    row, path = row_of(file), tmp_path / file
    classes = {'num_classes': 19}
    assert chosen(named(path), plain_row(row)) == (row, {}, ())
    sources = sources_of(named(path))
    for other in {*CONFIGS.values(), 'fcn_resnet50_d8_voc', row.replace('gc_', 'fcn_')}:
        if other == row:
            continue
        same = plain_row(other) == plain_row(row)
        says = 'the same tensors, another' if same else r'its name says .*, and its tensors say'
        with pytest.raises(CheckpointError, match=says) as caught:
            check_told(path, sources, other, {})
        assert '\n' not in str(caught.value)
    # What is asked for counts.
    if plain_row(row) != row:
        asked = {'window': None, 'window_stride': None, 'align_corners': False}
        check_told(path, sources, plain_row(row), asked, asked)
        assert chosen_with(path, plain_row(row), asked)[0] == row
    if row.endswith('voc'):
        check_told(path, sources, row, classes, ['num_classes'])


def chosen_with(path, name, asked):
    return choose_row(sources_of(named(path)), name, asked)


def test_the_names_of_configs_tell_too(tmp_path):
    assert len(CONFIGS) == 16
    for config, row in CONFIGS.items():
        for suffix in ('.pth', '-0123abcd.pth', '_20200615_020811-c3fcb6dd.pth', '.safetensors'):
            assert chosen(named(tmp_path / f'{config}{suffix}'), plain_row(row)) == (row, {}, ())


@pytest.mark.parametrize(
    'name',
    [
        'model.pth',
        'iter_80000.pth',
        'gcnet.pth',
        'gcnet_r50-d8.pth',
        'my_gcnet_r50.pth',
        'gcnet_r50_512x1024_40k_cityscapes.pth',
    ],
)
def test_names_in_another_style_tell_nothing(tmp_path, name):
    assert told_by_name(name) == {}
    _, options, (note,) = chosen(named(tmp_path / name))
    assert not options
    assert f'--model {NAME}_769 slides windows of 769 pixels' in note
    # Only Cityscapes has networks of both kinds, and who asks needs no note.
    assert chosen(named(tmp_path / name), 'gc_resnet50_d8_voc') == ('gc_resnet50_d8_voc', {}, ())
    asked = {'window': 512, 'window_stride': 512}
    assert chosen(named(tmp_path / name), NAME, asked) == (NAME, asked, ())


@pytest.mark.parametrize(
    ('name', 'head', 'backbone', 'more'),
    [
        (
            'fcn_r101-d8_fp16_512x1024_80k_cityscapes_20200717_230921-fb13e883.pth',
            *('FCNHead', 'r101', {'classes': 19, 'output_stride': 8, 'window': None}),
        ),
        (
            'fcn_d6_r50-d16_769x769_40k_cityscapes_20210305_185744-1aab18ed.pth',
            *('FCNHead', 'r50', {'dilation of the head': 6, 'output_stride': 16, 'window': 769}),
        ),
        (
            'fcn-d6_r50b-d16_4xb2-80k_cityscapes-512x1024.pth',
            *('FCNHead', 'r50b', {'dilation of the head': 6}),
        ),
        (
            'fcn_r50-d8_480x480_40k_pascal_context_59_20210415_230724-8cf83682.pth',
            *('FCNHead', 'r50', {'classes': 59, 'window': 480, 'window_stride': 320}),
        ),
        (
            'fcn_r50-d8_4xb4-40k_pascal-context-480x480.pth',
            *('FCNHead', 'r50', {'classes': 60, 'align_corners': False, 'window': 480}),
        ),
        (
            'pspnet_r50-d8_512x1024_40k_cityscapes_20200605_003338-2966598c.pth',
            *('of pspnet', 'r50', {'classes': 19}),
        ),
    ],
)
def test_names_of_other_files_of_mmsegmentation(name, head, backbone, more):
    told = told_by_name(name)
    assert (told['head'], told['backbone']) == (head, backbone)
    assert {key: told[key] for key in more} == more


def test_a_file_is_known_under_any_name(tmp_path, monkeypatch):
    path = write_detector(tmp_path / 'model.pth', R50)
    digits = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    assert load_named(path).name == NAME
    monkeypatch.setitem(published_segmenters.PUBLISHED, digits, PUBLISHED['4839565b'])
    loaded = load_named(path)
    assert (loaded.name, loaded.report.warnings) == (f'{NAME}_769', ())
    with pytest.raises(CheckpointError, match=r'its SHA-256 says .* the same tensors, another'):
        load_named(path, NAME)
    assert load_named(path, NAME, ignore_architecture=True).name == NAME


# Configs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize('config', [PYTHON, SORTED, SETTINGS], ids=['mmcv', 'mmengine', 'dict'])
def test_a_config_chooses_the_network(tmp_path, config):
    for metadata in ({'meta': {'config': config}}, {'meta': {'cfg': config}}, {'cfg': config}):
        assert chosen(named(tmp_path / 'iter_40000.pth', metadata)) == (f'{NAME}_769', {}, ())


@pytest.mark.parametrize('config', [PYTHON, SORTED], ids=['mmcv', 'mmengine'])
def test_a_config_of_whole_images(tmp_path, config):
    if config is SORTED:
        config = config.replace(
            "crop_size=(769, 769), mode='slide', stride=(513, 513)", "mode='whole'"
        )
    for old, new in WHOLE:
        config = config.replace(old, new)
    assert chosen(named(tmp_path / 'a.pth', {'cfg': config})) == (NAME, {}, ())


@pytest.mark.parametrize(
    ('old', 'new', 'row', 'options'),
    [
        ('', '', f'{NAME}_769', {'output_stride': 16}),
        ('(513, 513)', '(341, 341)', f'{NAME}', {'window': 769, 'window_stride': 341}),
        (
            'align_corners=True',
            'align_corners=False',
            *(NAME, {'window': 769, 'window_stride': 513, 'align_corners': False}),
        ),
    ],
)
def test_settings_that_no_row_has_are_options(tmp_path, old, new, row, options):
    config = SORTED.replace(old, new) if old else SORTED
    if 'output_stride' in options:
        config = config.replace('(1, 1, 2, 4)', '(1, 1, 1, 2)').replace(
            '(1, 2, 1, 1)', '(1, 2, 2, 1)'
        )
    file = named(tmp_path / 'a.pth', {'cfg': config})
    name, found, notes = chosen(file)
    assert (name, notes) == (row, ())
    row_options = published_segmenters.row_settings(name)
    expected = {'align_corners': True} | options
    assert found == {k: v for k, v in expected.items() if row_options[k] != v}


@pytest.mark.parametrize('style', [PYTHON, SORTED], ids=['mmcv', 'mmengine'])
@pytest.mark.parametrize(
    ('old', 'new', 'says'),
    [
        ('depth=50', 'depth=101', 'backbone r101, and its tensors say backbone r50'),
        ("'ResNetV1c'", "'ResNet'", 'backbone r50b, and its tensors say backbone r50'),
        ("'ResNetV1c'", "'ResNetV1d'", 'backbone r50d, and its tensors say backbone r50'),
        ("'ResNetV1c'", "'ResNeSt'", 'backbone r50 of ResNeSt, and its tensors say backbone r50'),
        ("'GCHead'", "'NLHead'", 'head NLHead, and its tensors say head GCHead'),
        ("'GCHead'", "'FCNHead'", 'head FCNHead, and its tensors say head GCHead'),
        ('ratio=0.25', 'ratio=1. / 8', 'ratio 0.125, and its tensors say ratio 0.25'),
        ('num_classes=19', 'num_classes=21', 'classes 21, and its tensors say classes 19'),
        ('dilations=(1, 1, 2, 4)', 'dilations=(1, 1, 2, 8)', 'dilations (1, 1, 2, 8), and gc_'),
        ('contract_dilation=True', 'contract_dilation=False', 'contract_dilation False, and gc_'),
        ('ratio=0.25', 'ratio=0.25, dilation=6', 'dilation of the head 6, and gc_'),
        ('(513, 513)', '(513, 257)', 'window_stride 513x257, and gc_resnet50_d8_cityscapes has'),
    ],
)
def test_a_config_that_contradicts(tmp_path, style, old, new, says):
    assert old in style
    file = named(tmp_path / 'iter_40000.pth', {'cfg': style.replace(old, new)})
    with pytest.raises(CheckpointError, match=f'its config says .*{re.escape(says)}') as caught:
        chosen(file)
    assert '\n' not in str(caught.value)


def test_the_name_counts_more_than_the_config(tmp_path):
    file = named(tmp_path / 'gcnet_r50-d8_512x1024_40k_cityscapes.pth', {'cfg': SORTED})
    with pytest.raises(CheckpointError, match=r'its config says .*window 769.* gc_resnet50_d8'):
        chosen(file)


@pytest.mark.parametrize(
    ('old', 'new'),
    [
        ('(769, 769)', '(0, 0)'),
        ('(769, 769)', f'({"9" * 400}, 1)'),
        ('(769, 769)', f'({"9" * 400}, {"9" * 400})'),
        ('(513, 513)', '(0, 0)'),
        ('strides=(1, 2, 1, 1)', 'strides=(0, 0, 0)'),
        ('strides=(1, 2, 1, 1)', f'strides=({"9, " * 10_000})'),
        ('depth=50', f'depth={"9" * 5000}'),
        ('ratio=0.25', 'ratio=1 / 0'),
        ('ratio=0.25', f'ratio={"9" * 5000}'),
        ('num_classes=19', f'num_classes={"9" * 5000}'),
        ('num_classes=19', 'num_classes=-1'),
    ],
)
def test_numbers_of_a_stranger_raise_nothing_else(tmp_path, old, new):
    path = write_detector(tmp_path / 'a.pth', R50, {'cfg': SORTED.replace(old, new)})
    said = ''
    try:
        load_named(path)
    except (CheckpointError, ConfigError) as error:
        said = str(error)
    assert '\n' not in said
    assert len(said) < 1500


@pytest.mark.parametrize(
    ('option', 'value'),
    [
        ('context_ratio', 'x'),
        ('context_ratio', [1]),
        ('output_stride', [8]),
        ('output_stride', 12),
        ('output_stride', 'x'),
        ('window', (1, 2)),
        ('num_classes', None),
        ('stem', 3),
        ('backbone', 3),
    ],
)
def test_options_that_cannot_be(tmp_path, option, value):
    path = write_detector(tmp_path / 'gcnet_r50-d8_769x769_40k_cityscapes.pth', R50)
    for model in (None, NAME):
        with pytest.raises((ConfigError, CheckpointError)) as caught:
            load_named(path, model, **{option: value})
        assert '\n' not in str(caught.value)


def test_a_config_that_opens_many_groups_takes_no_time(tmp_path):
    text = 'backbone=dict(decode_head=dict(test_cfg={' * 40_000
    assert chosen(named(tmp_path / 'a.pth', {'cfg': text}))[:2] == (NAME, {})


# Whole files --------------------------------------------------------------------------------------


def test_a_name_that_contradicts_its_tensors(tmp_path):
    path = write_detector(tmp_path / 'gcnet_r101-d8_512x512_80k_ade20k.pth', R50)
    with pytest.raises(CheckpointError) as caught:
        load_named(path)
    # As ADE20K has other classes and a deeper backbone.
    assert (
        'its name says backbone r101, classes 150, and its tensors say backbone r50, classes 19: '
        'the file is mislabelled' in str(caught.value)
    )
    assert load_named(path, ignore_architecture=True).name == NAME


def test_a_config_is_read_from_the_file(tmp_path):
    path = write_detector(tmp_path / 'iter_80000.pth', R50, {'config': PYTHON})
    loaded = load_named(path)
    assert (loaded.name, loaded.report.warnings) == (f'{NAME}_769', ())
    assert load_named(path, f'{NAME}_769').name == f'{NAME}_769'
    with pytest.raises(CheckpointError, match=f'window 769.* and {NAME} has .*window None'):
        load_named(path, NAME)
    # The backbone of a segmenter is dilated, and says so.
    with pytest.raises(CheckpointError, match='dilated convolutions'):
        load_named(path, 'resnet50', num_classes=0)
    backbone = load_named(path, 'resnet50', num_classes=0, output_stride=8)
    assert backbone.network.output_stride == 8


def test_a_note_says_what_the_file_does_not(tmp_path):
    path = write_detector(tmp_path / 'iter_80000.pth', R50)
    (line,) = [line for line in load_named(path).report.lines() if line.startswith('warning')]
    assert 'nothing in the file says whether its network slides windows' in line
    assert load_named(path, NAME).report.warnings == ()
    assert load_named(path, f'{NAME}_769').name == f'{NAME}_769'


def test_a_classifier_that_is_dropped_may_be_of_other_classes(tmp_path):
    path = write_detector(tmp_path / 'gcnet_r50-d8_512x1024_80k_cityscapes.pth', R50)
    loaded = load_named(path, num_classes=11, drop_classifier=True)
    assert (loaded.name, loaded.options['num_classes']) == (NAME, 11)
    loaded = load_named(path, 'gc_resnet50_d8_voc', drop_classifier=True)
    assert loaded.network.num_classes == 21
