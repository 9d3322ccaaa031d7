"""Files that run elsewhere: what they compute there, and what is refused."""

import dataclasses
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
from jax import export as jax_export
from safetensors.numpy import load_file

from gcnet_jax.__main__ import main
from gcnet_jax.data.preprocessing import Preprocessing
from gcnet_jax.errors import UserError
from gcnet_jax.inference import export
from gcnet_jax.inference.detector import Detector
from gcnet_jax.inference.stored_network import StoredNetwork
from gcnet_jax.porting import read_checkpoint, to_torch
from gcnet_jax.stored import ModelDescription, write_ported

ALONE = """
import sys
for name in ('gcnet_jax', 'flax', 'orbax', 'optax'):
    sys.modules[name] = None  # An import of it fails.
import numpy as np
from jax import export
with open(sys.argv[1], 'rb') as file:
    classify = export.deserialize(bytearray(file.read())).call
np.savez(sys.argv[3], *[np.asarray(classify(images)) for images in np.load(sys.argv[2]).values()])
"""


def batches(size, *counts):
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (count, size, size, 3), dtype=np.uint8) for count in counts]


def probabilities(description, variables, images):
    """By the plain network and numpy."""
    preprocessing = description.preprocessing
    pixels = (images / 255 - preprocessing.mean) / preprocessing.std
    logits = description.build().apply(variables, pixels.astype(np.float32), train=False)
    exponentials = np.exp(np.asarray(logits, np.float64))
    return exponentials / exponentials.sum(-1, keepdims=True)


def run(checkpoint, out, *flags):
    return main(['export', '--checkpoint', str(checkpoint), '--out', str(out), *flags])


@pytest.fixture(scope='module')
def exported(stored, tmp_path_factory):
    out = tmp_path_factory.mktemp('export') / 'network.jaxexport'
    assert run(stored.directory, out) == 0
    return out


def test_it_runs_for_any_batch_where_the_package_is_not(stored, exported, tmp_path):
    images = batches(12, 1, 5)
    np.savez(tmp_path / 'images.npz', *images)
    files = [exported, tmp_path / 'images.npz', tmp_path / 'found.npz']
    subprocess.run(
        [sys.executable, '-c', ALONE, *map(str, files)], check=True, cwd=tmp_path, timeout=300
    )
    with np.load(tmp_path / 'found.npz') as found:
        for batch, values in zip(images, found.values(), strict=True):
            assert values.dtype == np.float32
            expected = probabilities(stored.description, stored.variables, batch)
            np.testing.assert_allclose(values, expected, atol=1e-5)


def test_it_is_for_every_platform_and_takes_pixels(exported):
    artifact = jax_export.deserialize(bytearray(exported.read_bytes()))
    assert artifact.platforms == ('cpu', 'cuda', 'tpu')
    (images,) = artifact.in_avals
    assert str(images.dtype) == 'uint8'
    assert [str(size) for size in images.shape] == ['batch', '12', '12', '3']


def test_labels_and_preprocessing_lie_beside_it(stored, exported):
    notes = json.loads(Path(f'{exported}.json').read_text())
    assert notes['label_names'] == list(stored.description.label_names)
    assert notes['inputs'].keys() == {'images'}
    assert notes['outputs'].keys() == {'probabilities'}
    assert notes['preprocessing']['test_size'] == 12
    assert notes['preprocessing']['crop_fraction'] == 0.8


def test_the_size_can_be_chosen(stored, tmp_path, capsys):
    out = tmp_path / 'large.bin'
    assert run(stored.directory, out, '--size', '20', '--format', 'jaxexport') == 0
    assert f'wrote {out}' in capsys.readouterr().out
    classify = jax_export.deserialize(bytearray(out.read_bytes())).call
    (images,) = batches(20, 2)
    expected = probabilities(stored.description, stored.variables, images)
    np.testing.assert_allclose(classify(images), expected, atol=1e-5)
    assert json.loads(Path(f'{out}.json').read_text())['preprocessing']['test_size'] == 20


def test_images_need_not_be_square(stored, tmp_path):
    out = tmp_path / 'wide.jaxexport'
    assert run(stored.directory, out, '--size', '10x14') == 0
    classify = jax_export.deserialize(bytearray(out.read_bytes())).call
    images = np.random.default_rng(0).integers(0, 256, (2, 10, 14, 3), np.uint8)
    expected = probabilities(stored.description, stored.variables, images)
    np.testing.assert_allclose(classify(images), expected, atol=1e-5)
    assert json.loads(Path(f'{out}.json').read_text())['preprocessing']['test_size'] == [10, 14]


def test_several_labels_per_image_have_sigmoids(stored, tmp_path):
    description = dataclasses.replace(stored.description, task='multilabel')
    write_ported(tmp_path / 'other', description, stored.variables)
    out = tmp_path / 'network.jaxexport'
    assert run(tmp_path / 'other', out) == 0
    images = np.random.default_rng(0).integers(0, 256, (3, 12, 12, 3), dtype=np.uint8)
    classify = jax_export.deserialize(bytearray(out.read_bytes())).call
    network = StoredNetwork.load(stored.directory, devices=stored.one_device)
    logits = network.dispatch(images, 'logits')[:3]
    expected = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    np.testing.assert_allclose(classify(images), expected, atol=1e-5)


@pytest.fixture(scope='module')
def exported_detector(stored_detector, tmp_path_factory):
    out = tmp_path_factory.mktemp('export') / 'detector.jaxexport'
    assert run(stored_detector.directory, out, '--size', '96') == 0
    return out


@pytest.mark.slow
def test_a_detector_finds_the_same_in_any_number_of_images(
    stored_detector, exported_detector, make
):
    artifact = jax_export.deserialize(bytearray(exported_detector.read_bytes()))
    assert artifact.platforms == ('cpu', 'cuda', 'tpu')
    pictures = [make.picture(0, 40, 50), make.picture(1, 60, 40)]
    # By the rule beside the file: limits of 64 and 96 pixels, on a square of 96.
    sizes = np.array([(64, 80), (96, 64)], np.int32)
    images = np.zeros((2, 96, 96, 3), np.uint8)
    for image, picture, (height, width) in zip(images, pictures, sizes, strict=True):
        image[:height, :width] = cv2.resize(picture, (int(width), int(height)))
    found = jax.device_get(jax.jit(artifact.call)(images, sizes))

    detector = Detector.load(
        stored_detector.directory, canvas=96, devices=stored_detector.one_device
    )
    for row, (picture, expected) in enumerate(zip(pictures, detector(pictures), strict=True)):
        valid = found['valid'][row]
        assert 0 < valid.sum() == len(expected)
        scale = np.tile(sizes[row, ::-1] / np.array(picture.shape[1::-1]), 2)
        np.testing.assert_allclose(found['boxes'][row][valid] / scale, expected.boxes, atol=1e-2)
        np.testing.assert_allclose(found['scores'][row][valid], expected.scores, atol=1e-5)
        np.testing.assert_array_equal(found['labels'][row][valid], expected.classes)
        masks = expected.mask_probabilities
        np.testing.assert_allclose(found['masks'][row][valid], masks, atol=1e-4)
        assert found['finite'][row]


def test_what_a_detector_takes_and_gives_lies_beside_it(exported_detector):
    notes = json.loads(Path(f'{exported_detector}.json').read_text())
    assert notes['label_names'] == ['ant', 'bee', 'cat']
    assert notes['inputs']['images'].startswith('uint8 [batch, 96, 96, RGB]')
    assert list(notes['inputs']) == ['images', 'sizes']
    artifact = jax_export.deserialize(bytearray(exported_detector.read_bytes()))
    outputs = jax.tree.unflatten(artifact.out_tree, artifact.out_avals)
    assert notes['outputs'].keys() == outputs.keys()
    assert notes['outputs'].pop('finite').startswith(f'{outputs["finite"].dtype} [batch]')
    for name, note in notes['outputs'].items():
        assert note.startswith(f'{outputs[name].dtype} [batch, object'), name
    assert 'min(64 / min(h, w), 96 / max(h, w), 96 / h, 96 / w)' in notes['resize']


@pytest.mark.parametrize(
    ('out', 'size', 'message'),
    [
        ('d.jaxexport', '64x90', 'a multiple of 32 pixels high and wide, got 64x90'),
        ('d.jaxexport', '0', 'a multiple of 32 pixels high and wide, got 0x0'),
        ('d.onnx', '64x96', 'a detector cannot become an ONNX file: .* export it as .jaxexport'),
    ],
)
def test_a_detector_that_cannot_be_exported_is_one_line(
    stored_detector, tmp_path, capsys, out, size, message
):
    assert run(stored_detector.directory, tmp_path / out, '--size', size) == 1
    printed = capsys.readouterr().err
    assert re.search(message, printed)
    assert printed.count('\n') == 1
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_only_on_demand(stored, tmp_path, capsys):
    out = tmp_path / 'network.jaxexport'
    out.write_text('mine')
    assert run(stored.directory, out) == 1
    assert (
        f'{out} exists; name a new file or replace it with --overwrite' in capsys.readouterr().err
    )
    assert out.read_text() == 'mine'
    assert run(stored.directory, out, '--overwrite') == 0
    assert len(out.read_bytes()) > 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name, f'{out.name}.json']


@pytest.mark.parametrize(
    ('out', 'flags', 'message'),
    [
        ('network.tflite', [], 'end it in .jaxexport, .onnx, .safetensors, .pth, or say'),
        ('network', [], 'end it in .jaxexport'),
        ('missing/network.jaxexport', [], 'missing is not a directory; make it first'),
        ('network.jaxexport', ['--size', '-1'], 'size must be 1 or more, got -1'),
        ('network.jaxexport', ['--family', 'timm'], '--family has no meaning with .jaxexport'),
        ('network.safetensors', ['--size', '8'], '--size has no meaning with .safetensors'),
        ('network.pth', ['--size', '8'], '--size has no meaning with .pth'),
        ('network.safetensors', ['--size', '0'], '--size has no meaning with .safetensors'),
        ('network.safetensors', ['--family', 'keras'], 'keras'),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(
    stored, tmp_path, capsys, out, flags, message
):
    assert run(stored.directory, tmp_path / out, *flags) == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count('\n') == 1
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_without_a_classifier_or_without_anything_is_refused(
    stored, random_variables, tmp_path, capsys
):
    options = dict(stored.description.options) | {'num_classes': 0}
    backbone = ModelDescription('gccnn', options, (), stored.description.preprocessing)
    images = np.zeros((1, 12, 12, 3), np.float32)
    write_ported(tmp_path / 'a', backbone, random_variables(backbone.build(), images, train=False))
    assert run(tmp_path / 'a', tmp_path / 'a.jaxexport') == 1
    assert 'gccnn was stored without a classifier' in capsys.readouterr().err
    assert run(tmp_path / 'b', tmp_path / 'b.jaxexport') == 1
    assert 'no such directory' in capsys.readouterr().err


@pytest.mark.parametrize('kind', ['safetensors', 'pth'])
def test_pytorch_s_files_go_through_the_port_back(stored, tmp_path, capsys, kind):
    out = tmp_path / f'network.{kind}'
    assert run(stored.directory, out, '--family', 'gccnn') == 0
    assert 'gccnn: ' in capsys.readouterr().out
    expected = to_torch(stored.description.build(), stored.variables, 'gccnn')
    found = load_file(out) if kind == 'safetensors' else read_checkpoint(out).tensors
    assert found.keys() == expected.keys()
    for name, values in found.items():
        np.testing.assert_array_equal(values, expected[name])


def test_the_family_is_timm_where_none_is_named(stored, tmp_path, capsys):
    assert run(stored.directory, tmp_path / 'network.safetensors') == 1
    assert 'timm' in capsys.readouterr().err


def test_a_missing_converter_is_named_with_what_to_install(stored, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'jax2onnx', None)
    assert run(stored.directory, tmp_path / 'network.onnx') == 1
    printed = capsys.readouterr().err
    assert 'an ONNX file needs jax2onnx' in printed
    assert "pip install '.[onnx]'" in printed


def test_a_converter_that_fails_is_one_line_with_what_to_do(stored, tmp_path, capsys, monkeypatch):
    def to_onnx(*arguments, **options):
        raise AttributeError("no attribute\n'ClosedJaxpr'")

    monkeypatch.setitem(sys.modules, 'jax2onnx', types.SimpleNamespace(to_onnx=to_onnx))
    monkeypatch.setitem(sys.modules, 'onnxruntime', types.SimpleNamespace())
    assert run(stored.directory, tmp_path / 'network.onnx') == 1
    printed = capsys.readouterr().err
    assert f"with jax {jax.__version__} (no attribute 'ClosedJaxpr'); install what" in printed
    assert "in an environment of its own (pip install '.[onnx]'), or export it" in printed
    assert printed.count('\n') == 1
    assert list(tmp_path.iterdir()) == []


PLACE = {'stages': [3, 4], 'position': 'after_conv2', 'ratio': 1 / 2}
SMALL = {'stage_sizes': [1, 1, 1, 1], 'widths': [8, 8, 16, 16], 'num_classes': 5}
BYOB = {'stage_sizes': [1, 1, 1, 2], 'widths': [128, 128, 256, 256], 'num_classes': 5}
NETWORKS = {
    'resnet18': ('resnet18', {**SMALL, 'context': None}),
    'gc_resnet50': ('gc_resnet50', SMALL),
    'bfloat16': ('gc_resnet18', {**SMALL, 'dtype': 'bfloat16'}),
    'gc_resnext50_32x4d': ('gc_resnext50_32x4d', {**SMALL, 'widths': [64] * 4}),
    'every block': (
        'resnet18',
        {
            **SMALL,
            'context': [
                {'block': 'non_local', **PLACE},
                {'block': 'simplified_non_local', 'stages': [2], 'position': 'after_conv1'},
                {'block': 'global_context', 'fusion': 'scale_add', **PLACE},
                {'block': 'squeeze_excite', **PLACE},
            ],
        },
    ),
    'gcresnext26ts': ('gcresnext26ts', BYOB),
    'gcresnet33ts': ('gcresnet33ts', {**BYOB, 'head_width': 32}),
    'gccnn': ('gccnn', {'widths': [8, 8, 16]}),
}


@pytest.fixture
def network(request, random_variables, tmp_path):
    """The name of a row of NETWORKS as a stored network."""
    name, options = NETWORKS[request.param]
    description = ModelDescription(name, options, (), Preprocessing(test_size=40))
    images = np.zeros((1, 40, 40, 3), np.float32)
    variables = random_variables(description.build(), images, train=False)
    write_ported(tmp_path / 'stored', description, variables)
    return description, variables, tmp_path / 'stored'


@pytest.mark.onnx
@pytest.mark.filterwarnings('default')  # Those of other libraries.
@pytest.mark.parametrize('network', NETWORKS, indirect=True)
def test_onnx_gives_the_probabilities_of_the_network_for_any_batch(network, tmp_path, capsys):
    import onnx
    import onnxruntime

    description, variables, directory = network
    out = tmp_path / 'network.onnx'
    assert run(directory, out) == 0
    assert 'opset 21; differs from the network by' in capsys.readouterr().out
    assert onnx.load(out).opset_import[0].version == 21
    onnx.checker.check_model(onnx.load(out))
    session = onnxruntime.InferenceSession(out)
    (images,) = session.get_inputs()
    assert (images.name, images.type, images.shape[1:]) == ('images', 'tensor(uint8)', [40, 40, 3])
    tolerance = 0.02 if 'dtype' in description.options else 1e-4
    for batch in batches(40, 1, 4):
        (found,) = session.run(['probabilities'], {'images': batch})
        expected = probabilities(description, variables, batch)
        np.testing.assert_allclose(found, expected, atol=tolerance)


@pytest.mark.onnx
@pytest.mark.filterwarnings('default')
@pytest.mark.parametrize('network', ['resnet18'], indirect=True)
def test_an_onnx_file_that_gives_something_else_is_not_written(network, tmp_path, monkeypatch):
    convert = export._to_onnx

    def convert_another(exported):
        other = dataclasses.replace(exported, function=lambda x: exported.function(255 - x))
        return convert(other)

    monkeypatch.setattr(export, '_to_onnx', convert_another)
    with pytest.raises(UserError, match=r'onnxruntime gives other probabilities .* nothing was'):
        export.export_onnx(network[2], tmp_path / 'network.onnx')
    assert [path.name for path in tmp_path.iterdir()] == ['stored']


def test_a_read_only_target_is_one_line(stored, tmp_path, read_only, capsys):
    assert run(stored.directory, tmp_path / 'net.jaxexport') == 1
    printed = capsys.readouterr().err
    assert printed.count('\n') == 1
    assert 'Read-only file system' in printed
