"""Detectors from checkpoints: sizes, padding, batches, choices of objects, and what is refused."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from gcnet_jax.errors import CheckpointError, ConfigError, DataError
from gcnet_jax.inference.classifier import Classifier
from gcnet_jax.inference.detector import Detector
from gcnet_jax.inference.load import load_network
from gcnet_jax.stored import write_ported

pytestmark = pytest.mark.usefixtures('quick_compilation')
LABELS = ('ant', 'bee', 'cat')


def photograph(height, width, seed=0):
    """Smooth colours with noise: an image of noise alone looks the same everywhere."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (4, 5, 3), np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    return np.clip(smooth + random.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope='module')
def description(certain_detector):
    return certain_detector.description


@pytest.fixture(scope='module')
def variables(certain_detector):
    return certain_detector.variables


@pytest.fixture(scope='module')
def detector(description, variables, quick_compilation):
    return Detector(description, variables)


@pytest.fixture(scope='module')
def landscape(detector):
    image = photograph(48, 70)
    return image, detector(image)


def test_boxes_and_masks_are_in_pixels_of_the_original(landscape):
    image, found = landscape
    assert len(found) > 3
    assert found.size == image.shape[:2]
    assert (found.boxes >= 0).all()
    assert (found.boxes <= np.array([70, 48, 70, 48]) + 1e-3).all()
    assert found.masks.shape == (len(found), 48, 70)
    assert (np.diff(found.scores) <= 0).all()
    assert found.scores[-1] > 0.05
    assert found.labels == tuple(LABELS[number] for number in found.classes)


def test_it_is_the_module_on_the_normalised_and_padded_image(
    detector, description, variables, landscape
):
    image, found = landscape
    inputs = detector.load_image(image)
    assert inputs['image'].shape == (64, 96, 3)
    assert inputs['size'].tolist() == [64, 93]  # int(70 * 64 / 48 + 0.5)
    np.testing.assert_allclose(inputs['scale'], [93 / 70, 64 / 48], rtol=1e-6)
    mean, std = np.float32([description.preprocessing.mean, description.preprocessing.std])
    padded = np.zeros((1, 64, 96, 3), np.float32)
    padded[0, :64, :93] = (inputs['image'][:64, :93] / np.float32(255) - mean) / std
    apply = jax.jit(lambda *given: description.build().apply(*given, train=False))
    detections, masks = apply(variables, padded, inputs['size'][None])
    count = int(detections.valid[0].sum())
    assert count == len(found)
    expected = np.asarray(detections.boxes[0, :count]) / np.tile(inputs['scale'], 2)
    np.testing.assert_allclose(found.boxes, expected, atol=2e-3)
    np.testing.assert_array_equal(found.classes, detections.labels[0, :count])
    np.testing.assert_allclose(found.mask_probabilities, masks[0, :count], atol=1e-4)


@pytest.mark.slow
def test_images_of_one_padded_size_share_a_batch_and_no_answer_changes(
    description, variables, landscape
):
    image, found = landscape
    detector = Detector(description, variables, batch_size=2)
    # The two landscapes are padded to one size, the first of them further.
    other, again, portrait = detector([photograph(48, 66, 2), image, photograph(80, 50, 1)])
    np.testing.assert_array_equal(again.classes, found.classes)
    np.testing.assert_allclose(again.boxes, found.boxes, atol=1e-3)
    np.testing.assert_allclose(again.scores, found.scores, atol=1e-5)
    assert [len(instances) > 0 for instances in (other, portrait)] == [True, True]
    assert portrait.size == (80, 50)


def test_threshold_and_classes_select(detector, landscape):
    image, found = landscape
    middle = float(np.median(found.scores))
    chosen = detector(image, threshold=middle)
    assert 0 < len(chosen) < len(found)
    assert chosen.scores.min() >= middle
    label = found.labels[0]
    of_class = detector(image, classes=[label])
    assert len(of_class) == found.labels.count(label)
    assert set(of_class.labels) == {label}


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'classes': ['bea']}, "unknown label 'bea'.*bee"),
        ({'classes': 'bee'}, 'several labels'),
        ({'threshold': 1.5}, 'from 0 to 1'),
        ({'threshold': '0.5'}, 'a number from 0 to 1'),
    ],
)
def test_choices_that_cannot_be_are_refused(detector, landscape, options, message):
    with pytest.raises(ConfigError, match=message):
        detector(landscape[0], **options)


def test_a_canvas_pads_further(description, variables, landscape):
    detector = Detector(description, variables, canvas=((64, 128), (128, 64)))
    assert detector.load_image(landscape[0])['image'].shape == (64, 128, 3)
    assert detector.load_image(photograph(70, 48))['image'].shape == (128, 64, 3)
    small = Detector(description, variables, canvas=64)
    with pytest.raises(DataError, match='image 0: resized to 64x93 pixels it fits into no canvas'):
        small(landscape[0])


@pytest.mark.parametrize('canvas', [100, (64, 96, 3), [(64, 0)], (64.0, 64), 'large', [64, 96], []])
def test_a_canvas_that_cannot_be_is_refused(description, variables, canvas):
    with pytest.raises(ConfigError, match=r'a canvas is a multiple of 32 pixels|ambiguous'):
        Detector(description, variables, canvas=canvas)


def test_exif_orientation_is_applied(detector, landscape, tmp_path):
    image, _ = landscape
    exif = Image.Exif()
    exif[0x0112] = 6  # To be turned by 90 degrees clockwise for showing.
    turned = Image.fromarray(np.rot90(image))
    turned.save(tmp_path / 'turned.png', exif=exif)
    expected = detector.load_image(image)['image']
    with Image.open(tmp_path / 'turned.png') as opened:
        for given in (tmp_path / 'turned.png', opened):
            inputs = detector.load_image(given)
            np.testing.assert_array_equal(inputs['image'], expected)
            assert inputs['original_size'].tolist() == [48, 70]


def test_images_that_cannot_be_read_are_named_and_the_rest_is_done(detector, landscape, tmp_path):
    Image.fromarray(landscape[0]).save(tmp_path / 'a.png')
    (tmp_path / 'b.png').write_bytes((tmp_path / 'a.png').read_bytes()[:200])
    Image.new('RGB', (5000, 1)).save(tmp_path / 'c.png')
    Image.new('RGB', (2, 1), (90, 20, 200)).save(tmp_path / 'd.png')
    results = dict(detector.stream(tmp_path))
    assert len(results[tmp_path / 'a.png']) == len(landscape[1])
    assert 'damaged PNG image' in str(results[tmp_path / 'b.png'])
    assert str(results[tmp_path / 'c.png']) == (
        f'{tmp_path / "c.png"}: an image of 5000 x 1 pixels is too elongated: it would be resized '
        'to 96 x 0'
    )
    assert results[tmp_path / 'd.png'].size == (1, 2)


def test_features_are_those_of_the_pyramid(detector, landscape):
    image = landscape[0]
    assert detector.features(image, 'p3').shape == (8, 12, 8)
    assert detector.features([image, image], 'p2').shape == (2, 16, 24, 8)
    with pytest.raises(ConfigError, match='p3 has another shape for each size of image'):
        detector.features([image, photograph(80, 50)], 'p3')


@pytest.mark.parametrize(
    'place', [('neck', 'lateral1'), ('rpn_head', 'deltas'), ('box_head_0', 'shared2')]
)
def test_what_is_not_finite_is_refused(detector, landscape, place):
    """Scores that are no numbers would pass for 'no objects'."""
    damaged = copy.copy(detector)  # It keeps what is compiled.
    damaged.variables = jax.tree.map(lambda leaf: leaf, detector.variables)
    module = damaged.variables['params'][place[0]][place[1]]
    module['kernel'] = jnp.full_like(module['kernel'], 3e38)
    with pytest.raises(CheckpointError, match='NaN or not finite'):
        damaged(landscape[0])


def test_each_kind_of_checkpoint_loads_as_what_it_is(description, variables, stored, tmp_path):
    write_ported(tmp_path / 'detector', description, variables)
    assert isinstance(load_network(tmp_path / 'detector'), Detector)
    assert isinstance(load_network(stored.directory), Classifier)
    with pytest.raises(CheckpointError, match=r'for detection, not .*gcnet_jax\.Detector'):
        Classifier.load(tmp_path / 'detector')
    with pytest.raises(CheckpointError, match=r'for classification.*gcnet_jax\.Classifier'):
        Detector.load(stored.directory)
    with pytest.raises(CheckpointError, match='2 label names and 3 classes'):
        Detector(dataclasses.replace(description, label_names=LABELS[:2]), variables)


def test_size_sets_the_limits_of_the_sides(description, variables, tmp_path):
    write_ported(tmp_path / 'detector', description, variables)
    detector = Detector.load(tmp_path / 'detector', size=32)
    assert detector.load_image(photograph(48, 60))['image'].shape == (32, 64, 3)
    detector = Detector.load(tmp_path / 'detector', size=(32, 40))
    assert detector.load_image(photograph(48, 96))['image'].shape == (32, 64, 3)
    with pytest.raises(ConfigError, match='short_side is 50 and long_side 40'):
        Detector.load(tmp_path / 'detector', size=(50, 40))


def test_more_padded_sizes_than_are_compiled_are_answered_with_the_canvas(detector, landscape):
    full = copy.copy(detector)
    full._image_sizes = {(side, side) for side in range(detector.max_image_sizes)}
    with pytest.raises(ConfigError, match=r'at most 128 sizes.*option canvas'):
        full(landscape[0])
