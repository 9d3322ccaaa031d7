"""The published detectors: which are refused, and what their names and configs are held against."""

import contextlib
import hashlib
import re

import pytest

from gcnet_jax.errors import CheckpointError
from gcnet_jax.models import list_models, model_entry
from gcnet_jax.porting import load_torch, published
from gcnet_jax.porting.files import TorchFile
from gcnet_jax.porting.load import load_named
from gcnet_jax.porting.published import PUBLISHED, check_told, choose_norm, told_by_name
from gcnet_jax.porting.tensors import LazyTensors
from tests.porting.detector_configs import CONFIGS
from tests.porting.detector_files import shapes_of, write_detector

R50 = 'mask_rcnn_r50_fpn_r16_gcb_c3-c5_1x_coco'
# As mmcv and mmengine write the config of the same network.
PYTHON = """model = dict(
    type='MaskRCNN',
    backbone=dict(
        type='ResNet', depth=50, norm_cfg=dict(type='BN', requires_grad=True), style='pytorch',
        plugins=[dict(cfg=dict(type='ContextBlock', ratio=1. / 16), stages=(False, True))]),
    rpn_head=dict(anchor_generator=dict(ratios=[0.5, 1.0, 2.0])))"""
SORTED = """model = dict(
    backbone=dict(
        depth=50, norm_cfg=dict(requires_grad=True, type='BN'),
        plugins=[dict(cfg=dict(ratio=0.0625, type='ContextBlock'))], type='ResNet'),
    type='MaskRCNN')"""


def named(path, metadata=None):
    return TorchFile(path, LazyTensors({}), metadata=metadata or {})


def test_every_published_file_is_there_once():
    assert len(PUBLISHED) == 19
    digits = [re.search(r'-(\w{8})\.pth$', row.file)[1] for row in PUBLISHED]
    digits += [row.of_2019 for row in PUBLISHED]
    digits += [row.withdrawn for row in PUBLISHED if row.withdrawn]
    assert len({*digits}) == len(digits) == 41
    assert all(re.fullmatch('[0-9a-f]{8}', one) for one in digits)
    # The others are the plain networks with fixed norms, of mmdetection's own zoo.
    assert {*list_models(task='detection')} - {row.model for row in PUBLISHED} == {
        *('mask_rcnn_resnet50_fpn', 'mask_rcnn_resnet101_fpn')
    }


@pytest.mark.parametrize('row', PUBLISHED, ids=lambda row: row.file)
def test_a_name_tells_its_network(tmp_path, row):
    file = named(tmp_path / row.file)
    for other in PUBLISHED:
        entry, mine = model_entry(other.model), model_entry(row.model)
        layers = [{**e.module.keywords, 'norm': None} for e in (entry, mine)]
        if layers[0] == layers[1]:
            check_told(file, other.model, {})
            assert choose_norm(file, other.model, {})[0] == row.model
        else:
            with pytest.raises(CheckpointError, match=r'its name says .*, and its tensors '):
                check_told(file, other.model, {})


def test_the_names_of_configs_tell_too(tmp_path):
    assert sorted(CONFIGS.values()) == sorted(row.model for row in PUBLISHED)
    for config, name in CONFIGS.items():
        file = named(tmp_path / f'{config}-0123abcd.pth')
        check_told(file, name, {})
        assert choose_norm(file, name, {}) == (name, {})


@pytest.mark.parametrize(
    'name',
    [
        'model.pth',
        'epoch_12.pth',
        'mask_rcnn.pth',
        'my_mask_rcnn_r101_run3.pth',
        'mask_rcnn_r101_run3.pth',
        'mask_rcnn_resnet101_fpn_1x.pth',
    ],
)
def test_names_in_another_style_tell_nothing(tmp_path, name):
    assert told_by_name(tmp_path / name) == {}


@pytest.mark.parametrize(
    ('name', 'told'),
    [
        ('mask-rcnn_r50-syncbn-gcb-r4-c3-c5_fpn_1x_coco.pth', ('r50', 'r4', True)),
        ('mask_rcnn_r16_gcb_c3-c5_r101_fpn_syncbn_1x_20190602-717e6dbd.pth', ('r101', 'r16', True)),
        ('mask-rcnn_x101-32x4d_fpn_1x_coco_20200205-478d0b67.pth', ('x101_32x4d', 'none', False)),
        ('mask_rcnn_x101_64x4d_fpn_1x_coco_20200201-9352eb0d.pth', ('x101_64x4d', 'none', False)),
        ('mask_rcnn_r50_caffe_fpn_1x_coco-b2bb3c8b.pth', ('r50_caffe', 'none', False)),
    ],
)
def test_names_of_other_files_of_mmdetection(tmp_path, name, told):
    found = told_by_name(tmp_path / name)
    assert (found['backbone'], found['context'], found['norm']) == told
    assert found['heads'] == 'Mask R-CNN'


@pytest.mark.parametrize('style', [PYTHON, SORTED])
@pytest.mark.parametrize(
    ('old', 'new', 'says'),
    [
        ('', '', ''),
        ('depth=50', 'depth=101', 'backbone r101, and its tensors say backbone r50'),
        ("'ResNet'", "'ResNeXt', groups=64, base_width=4", 'backbone x50_64x4d, and'),
        (
            'MaskRCNN',
            'CascadeRCNN',
            'heads Cascade Mask R-CNN, and its tensors say heads Mask R-CNN',
        ),
        ('ContextBlock', 'NonLocal2d', 'context none, and its tensors say context r16'),
        ('depth=50', "depth=50, dcn=dict(type='DCN')", 'convolutions deformable, and'),
    ],
)
def test_a_config_is_held_against_the_tensors(tmp_path, style, old, new, says):
    config = style.replace(old, new) if old else style
    for metadata in ({'meta': {'config': config}}, {'cfg': config}):
        file = named(tmp_path / 'epoch_12.pth', metadata)
        if not says:
            check_told(file, 'gc_mask_rcnn_resnet50_fpn', {})
            continue
        with pytest.raises(CheckpointError, match=f'its config says .*{re.escape(says)}'):
            check_told(file, 'gc_mask_rcnn_resnet50_fpn', {})


def test_another_ratio_in_the_config(tmp_path):
    configs = [PYTHON.replace('1. / 16', new) for new in ('1. / 4', '0.25', '1/4')]
    for config in (*configs, SORTED.replace('0.0625', '0.25')):
        file = named(tmp_path / 'a.pth', {'meta': {'config': config}})
        with pytest.raises(CheckpointError, match='context r4, and its tensors say context r16'):
            check_told(file, 'gc_mask_rcnn_resnet50_fpn', {})


@pytest.mark.parametrize('ratio', ['.', '1 / 0', '1..2', 'x', '1e9', '9' * 400])
def test_a_ratio_that_is_none_raises_nothing_else(tmp_path, ratio):
    file = named(tmp_path / 'a.pth', {'meta': {'config': PYTHON.replace('1. / 16', ratio)}})
    with contextlib.suppress(CheckpointError):
        check_told(file, 'gc_mask_rcnn_resnet50_fpn', {})


def test_options_that_were_asked_for_count(tmp_path):
    file = named(tmp_path / 'a.pth', {'meta': {'config': PYTHON}})
    for context in ({'ratio': 1 / 16}, {'stages': (3,)}, ({'ratio': 1 / 4}, {'ratio': 1 / 4})):
        check_told(file, 'gc_mask_rcnn_resnet50_fpn', {'context': context})
    for context in (None, {'ratio': 1 / 4}):
        with pytest.raises(CheckpointError, match='its config says context r16, and its tensors'):
            check_told(file, 'gc_mask_rcnn_resnet50_fpn', {'context': context})


@pytest.mark.parametrize(
    ('file', 'config', 'row'),
    [
        ('a.pth', '', 'gc_mask_rcnn_resnet50_fpn'),
        ('a.pth', PYTHON, 'gc_mask_rcnn_resnet50_fpn'),
        ('a.pth', PYTHON.replace("'BN'", "'SyncBN'"), 'gc_mask_rcnn_resnet50_fpn_syncbn'),
        ('a.pth', SORTED.replace("'BN'", "'SyncBN'"), 'gc_mask_rcnn_resnet50_fpn_syncbn'),
        (f'{R50}.pth', '', 'gc_mask_rcnn_resnet50_fpn'),
        (
            f'{R50.replace("fpn", "fpn_syncbn-backbone")}.pth',
            '',
            'gc_mask_rcnn_resnet50_fpn_syncbn',
        ),
    ],
)
def test_the_norms_of_the_training(tmp_path, file, config, row):
    metadata = {'meta': {'config': config}} if config else {}
    base = 'gc_mask_rcnn_resnet50_fpn'
    assert choose_norm(named(tmp_path / file, metadata), base, {}) == (row, {})
    # What is asked for counts.
    asked = {'norm': {'kind': 'batch'}}
    assert choose_norm(named(tmp_path / file, metadata), base, asked) == (base, asked)


def test_fixed_norms_where_no_row_has_them(tmp_path):
    name = 'mask_rcnn_resnext101_fpn_syncbn'
    ordinary = named(tmp_path / 'mask_rcnn_x101_32x4d_fpn_1x_coco_20200205-478d0b67.pth')
    assert choose_norm(ordinary, name, {}) == (name, {'norm': {'kind': 'frozen'}})
    assert choose_norm(named(tmp_path / 'a.pth'), name, {}) == (name, {})


@pytest.mark.parametrize('row', [row for row in PUBLISHED if row.withdrawn])
def test_a_withdrawn_file_is_refused_by_its_name(tmp_path, row):
    start = row.file.rpartition('_coco_')[0]
    path = tmp_path / f'{start}_coco_20200516_182249-{row.withdrawn}.pth'
    with pytest.raises(CheckpointError, match=f'withdrawn .* holds a ResNet-50; take {row.file}'):
        load_torch(path)


def test_a_withdrawn_file_is_refused_under_any_name(tmp_path, monkeypatch):
    path = write_detector(tmp_path / 'model.pth', shapes_of('r50_r16_landscape'))
    row = next(row for row in PUBLISHED if row.withdrawn)
    digits = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    monkeypatch.setitem(published.WITHDRAWN, digits, row)
    for model in (None, 'gc_resnet50'):
        with pytest.raises(CheckpointError, match=f'withdrawn .* take {row.file}'):
            load_torch(path, model)


def test_a_file_of_2019_names_the_one_that_replaced_it(tmp_path, monkeypatch):
    shapes = {
        name.removeprefix('roi_head.'): shape
        for name, shape in shapes_of('r50_r16_landscape').items()
    }
    path = write_detector(tmp_path / 'model.pth', shapes)
    with pytest.raises(
        CheckpointError, match=r'repository of 2019 .* take the file of this network'
    ):
        load_torch(path)
    digits = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    monkeypatch.setitem(published.OF_2019, digits, PUBLISHED[0])
    for model in (None, 'gc_mask_rcnn_resnet50_fpn'):
        with pytest.raises(CheckpointError, match=f'of 2019 .* take {PUBLISHED[0].file}'):
            load_torch(path, model)
    assert load_named(path, 'gc_resnet50', num_classes=0).name == 'gc_resnet50'


@pytest.mark.parametrize(
    ('backbone', 'told'),
    [('resnet18', 'r18'), ('gc_resnet152', 'r152'), ('resnext50_32x4d', 'x50_32x4d')],
)
def test_backbones_of_other_depths_are_no_contradiction(backbone, told, tmp_path):
    path = tmp_path / f'mask_rcnn_{told}_fpn_1x_coco.pth'
    options = {'backbone': backbone, 'context': None}
    check_told(TorchFile(path, {}), 'mask_rcnn_resnet50_fpn', options)
    with pytest.raises(CheckpointError, match=f'backbone {told}, and its tensors say backbone r34'):
        check_told(TorchFile(path, {}), 'mask_rcnn_resnet50_fpn', {'backbone': 'resnet34'})


def test_a_name_that_contradicts_its_tensors(tmp_path):
    wrong = 'cascade_mask_rcnn_x101_32x4d_fpn_syncbn-backbone_dconv_c3-c5_r4_gcb_c3-c5_1x_coco.pth'
    path = write_detector(tmp_path / wrong, shapes_of('r50_r16_landscape'))
    with pytest.raises(CheckpointError) as caught:
        load_torch(path)
    assert (
        'its name says backbone x101_32x4d, heads Cascade Mask R-CNN, convolutions deformable, '
        'context r4, and its tensors say backbone r50, heads Mask R-CNN, convolutions ordinary, '
        'context r16: ' in str(caught.value)
    )
    assert '\n' not in str(caught.value)
    assert load_named(path, ignore_architecture=True).name == 'gc_mask_rcnn_resnet50_fpn_syncbn'
