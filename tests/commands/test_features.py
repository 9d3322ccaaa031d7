"""The command features on a detector; `test_images` has it on classifiers."""

import numpy as np
import pytest

from gcnet_jax.__main__ import main
from gcnet_jax.inference.detector import Detector


@pytest.fixture
def folder(make, tmp_path):
    for name, shape in (('a', (40, 60)), ('b', (20, 30)), ('c', (60, 40))):
        (tmp_path / f'{name}.png').write_bytes(make.encode(make.picture(0, *shape)))
    return tmp_path


@pytest.fixture
def run(stored_detector, folder, capsys):
    """Runs the command on some of the images: exit code, stdout, stderr."""

    def call(names, *flags):
        images = [str(folder / f'{name}.png') for name in names]
        out = ['--out', str(folder / 'f.npz'), '--overwrite']
        code = main(
            ['features', '--checkpoint', str(stored_detector.directory), *images, *out, *flags]
        )
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.mark.slow
def test_pooled_features_are_those_of_the_backbone_with_its_padding(stored_detector, run, folder):
    code, out, err = run('abc')
    assert (code, err) == (0, '')
    assert out.startswith('wrote [3, 16] of pooled of mask_rcnn_resnet50_fpn')
    description = stored_detector.description
    settings, backbone = description.preprocessing, description.build().backbone
    variables = {name: tree['backbone'] for name, tree in stored_detector.variables.items()}
    detector = Detector.load(stored_detector.directory, devices=stored_detector.one_device)
    with np.load(folder / 'f.npz') as file:
        for name, found in zip('abc', file['features'], strict=True):
            inputs = detector.load_image(folder / f'{name}.png')
            height, width = map(int, inputs['size'])
            pixels = np.zeros(inputs['image'].shape, np.float32)
            image = inputs['image'][:height, :width] / 255
            pixels[:height, :width] = (image - settings.mean) / settings.std
            outputs = backbone.apply(variables, pixels[None], train=False, method='outputs')
            np.testing.assert_allclose(found, outputs['pooled'][0], rtol=1e-3, atol=1e-4)


def test_maps_of_images_of_one_size(run, folder):
    code, out, _ = run('ab', '--layer', 'p3')
    assert code == 0
    assert out.startswith('wrote [2, 8, 12, 16] of p3')


def test_maps_of_different_sizes_are_refused_with_what_to_do(run, folder):
    code, _, err = run('ac', '--layer', 'p3')
    assert code == 1
    assert 'c.png: its features are 12 x 8 x 16, those before 8 x 12 x 16; a file holds' in err
    assert "give images of one size in a file of their own, or take the layer 'pooled'" in err
    assert err.count('\n') == 1
    assert not (folder / 'f.npz').exists()


@pytest.mark.parametrize(
    ('layer', 'message'),
    [
        ('p7', "unknown layer of mask_rcnn_resnet50_fpn 'p7'; did you mean 'p6'"),
        ('masks', "'masks' is what predict gives, not a layer; layers: stem, stage1"),
        ('boxes', "'boxes' is what predict gives, not a layer"),
    ],
)
def test_what_is_no_layer_is_one_line(run, layer, message):
    code, _, err = run('a', '--layer', layer)
    assert code == 1
    assert message in err
    assert err.count('\n') == 1
