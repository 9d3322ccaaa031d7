"""Whole files of detectors: to a directory of ours and back, and files that are refused."""

import numpy as np
import pytest

from gcnet_jax.__main__ import main
from gcnet_jax.data.coco_labels import COCO_LABELS
from gcnet_jax.errors import CheckpointError
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

NAME = 'gc_mask_rcnn_resnet50_fpn'
WRITE = 'gcnet_jax.porting.port_checkpoint.write_ported'
R50 = shapes_of('r50_r16_landscape')
CASCADE = shapes_of('cascade_x101_r4')


def refused(path, message, *args, **options):
    """The file is refused in one line."""
    with pytest.raises(CheckpointError, match=message) as caught:
        load_torch(path, *args, **options)
    assert '\n' not in str(caught.value)
    assert len(str(caught.value)) < 1500


def test_every_bit_comes_back():
    weights = detector_weights(CASCADE, 1)
    tensors = in_memory(weights)
    family = recognise_family(tensors)
    name, options = recognise_model(tensors.shapes, family)
    network = create_model(name, **options)
    back = to_torch(network, from_torch(tensors, family, network)[0], 'mmdetection')
    assert back.keys() == weights.keys()
    for name, expected in weights.items():
        found = back[name]
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype), name
        assert found.tobytes() == expected.tobytes(), name


@pytest.mark.slow
def test_every_bit_comes_back_from_a_directory(tmp_path, capsys):
    weights = detector_weights(R50, 1)
    path = tmp_path / 'mask_rcnn_r50_fpn_r16_gcb_c3-c5_1x_coco.pth'
    write_torch(path, weights, meta={'epoch': 12})
    description, report = port(path, tmp_path / 'ours')
    path.unlink()
    assert (description.name, description.task) == (NAME, 'detection')
    assert description.label_names == COCO_LABELS
    assert not report.initialised
    arguments = ['--reverse', str(tmp_path / 'ours'), '--family', 'mmdetection']
    assert main(['port', *arguments, '--out', str(tmp_path / 'back.pth')]) == 0
    back = read_checkpoint(tmp_path / 'back.pth')
    assert back.metadata == {'meta': {'CLASSES': list(COCO_LABELS)}}
    assert {name: back.tensors.shapes[name] for name in back.tensors} == R50
    for name, expected in weights.items():
        # Its counters of batches are not kept, and start at zero.
        assert back.tensors[name].tobytes() == expected.tobytes(), name
    assert main(['port', *arguments, '--out', str(tmp_path / 'hub')]) == 1
    assert (
        'mmdetection reads a detector from one file: end --out in .pth' in capsys.readouterr().err
    )
    with pytest.raises(CheckpointError, match='timm has no network like MaskRCNN'):
        port_reverse(tmp_path / 'ours', 'timm', tmp_path / 'x.pth')
    assert not (tmp_path / 'hub').exists()


@pytest.mark.parametrize(
    ('case', 'name'),
    [
        ('r50_r16_landscape', NAME),
        ('r101_r4', 'gc_mask_rcnn_resnet101_r4_fpn'),
        ('x101', 'mask_rcnn_resnext101_fpn_syncbn'),
        ('cascade_x101_r4', 'gc_cascade_mask_rcnn_resnext101_r4_fpn_syncbn'),
        ('cascade_x101_dcn_r16', 'gc_cascade_mask_rcnn_resnext101_dcn_fpn_syncbn'),
    ],
)
def test_a_detector_is_recognised_by_its_tensors(case, name):
    shapes = shapes_of(case)
    family = recognise_family(shapes)
    assert recognise_model(shapes, family) == (name, {'num_classes': 80})
    # With as many classes as another data set has, and with another ratio: the network beside it.
    for key, shape in shapes.items():
        if key.endswith(('fc_cls.weight', 'fc_cls.bias')):
            shapes[key] = (8, *shape[1:])
    assert recognise_model(shapes, family) == (name, {'num_classes': 7})


def test_missing_tensors_are_named(tmp_path):
    shapes = dict(R50)
    for name in ('rpn_head.rpn_cls.bias', 'neck.fpn_convs.0.conv.weight'):
        del shapes[name]
    path = write_detector(tmp_path / 'a.pth', shapes)
    refused(path, r'2 missing in the file: .*fpn_convs.0.conv.weight, rpn_head.rpn_cls.bias\. ')


@pytest.mark.parametrize(
    ('meta', 'labels'),
    [
        ({'CLASSES': tuple(f'thing {n}' for n in range(80))}, 'thing 79'),
        ({'dataset_meta': {'classes': [f'thing {n}' for n in range(80)]}}, 'thing 79'),
        ({'dataset_meta': {'CLASSES': [f'thing {n}' for n in range(80)]}}, 'thing 79'),
        ({'epoch': 3}, 'toothbrush'),
        ({'CLASSES': ('cat', 'dog')}, 'it names 2 labels and the network has 80 classes; give the'),
        ({'CLASSES': ('cat\nb',) * 80}, 'label 0 of the file, cat.*, contains a line break'),
    ],
)
def test_labels_come_with_the_file(tmp_path, monkeypatch, meta, labels):
    path = write_detector(tmp_path / 'a.pth', R50, meta)
    metadata = read_checkpoint(path).metadata
    # As a network of another size, which takes less time.
    network = create_model('resnet20', num_classes=80)
    loaded = Loaded(network, NAME, {}, {}, Report('mmdetection', 1, 1, {}), metadata)
    monkeypatch.setattr('gcnet_jax.porting.port_checkpoint.load_named', lambda *_, **__: loaded)
    monkeypatch.setattr(WRITE, lambda out, description, variables: out.mkdir())
    if ' ' in labels.replace('thing ', ''):
        with pytest.raises(CheckpointError, match=labels):
            port(path, tmp_path / 'ours')
        return
    description, _ = port(path, tmp_path / 'ours')
    assert len(description.label_names) == 80
    assert description.label_names[-1] == labels


def test_heads_of_another_number_of_classes(tmp_path, monkeypatch):
    path = write_detector(tmp_path / 'a.pth', R50)
    refused(path, r'has 80 classes and num_classes is 20: drop .*--drop-classifier', num_classes=20)
    refused(path, r'Most likely the number of classes differs: .*', NAME, num_classes=20)
    written = {}
    monkeypatch.setattr(WRITE, lambda out, _, variables: out.mkdir() or written.update(variables))
    description, report = port(path, tmp_path / 'ours', num_classes=20, drop_classifier=True)
    assert description.label_names == ()
    assert {part.split('/')[1] for part in report.initialised} == {'box_head_0', 'mask_head_0'}
    heads = written['params']
    assert heads['box_head_0']['logits']['kernel'].shape == (1024, 21)
    assert heads['mask_head_0']['kernel'].shape == (256, 20)
    np.testing.assert_array_equal(heads['rpn_head']['conv']['kernel'], 0.5)


def test_a_truncated_file(tmp_path):
    content = write_detector(tmp_path / 'a.pth', R50).read_bytes()
    for size in (len(content) - 1, len(content) // 2, 100):
        (tmp_path / 'a.pth').write_bytes(content[:size])
        refused(tmp_path / 'a.pth', r'damaged or truncated PyTorch file .*: fetch it again')


def test_a_detector_without_masks_gives_its_backbone(tmp_path):
    """A Faster R-CNN: no detector here has its heads, which are listed as left."""
    shapes = {name: shape for name, shape in R50.items() if 'mask_head' not in name}
    path = write_detector(tmp_path / 'a.pth', shapes)
    loaded = load_named(path)
    assert loaded.name == 'gc_resnet50'
    lines = '\n'.join(loaded.report.lines())
    assert "the detector's neck and heads" in lines
    refused(path, 'which are not those of a MaskRCNN', NAME)


def test_a_hybrid_task_cascade(tmp_path):
    shapes = dict(CASCADE)
    for stage in (1, 2):
        shapes[f'roi_head.mask_head.{stage}.conv_res.conv.weight'] = (256, 256, 1, 1)
    path = write_detector(tmp_path / 'a.pth', shapes)
    refused(path, r'2 without a place: .*conv_res.* it is a HybridTaskCascade, which is not among')


def test_box_heads_with_convolutions(tmp_path):
    shapes = dict(R50)
    shapes['roi_head.bbox_head.shared_convs.0.conv.weight'] = (256, 256, 3, 3)
    path = write_detector(tmp_path / 'a.pth', shapes)
    refused(path, r'1 without a place: .*its box head has convolutions')
