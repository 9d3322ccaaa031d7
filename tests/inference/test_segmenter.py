"""Segmenters from checkpoints: sizes, batches, windows, probabilities, and what is refused."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import gcnet_jax
from gcnet_jax.data import jpeg
from gcnet_jax.data.preprocessing import KeepRatio
from gcnet_jax.errors import CheckpointError, ConfigError
from gcnet_jax.inference import segmenter as module
from gcnet_jax.inference.classifier import Classifier
from gcnet_jax.inference.detector import Detector
from gcnet_jax.inference.load import load_network
from gcnet_jax.inference.segmenter import Segmenter
from gcnet_jax.ops.resize import resize_bilinear

pytestmark = pytest.mark.usefixtures('quick_compilation')
LABELS = ('ant', 'bee', 'cat')


@pytest.fixture(scope='module')
def segmenter(stored_segmenter, quick_compilation):
    one = stored_segmenter
    return Segmenter(one.description, one.variables, devices=one.one_device)


def expected_logits(description, variables, image, size):
    """The module on the resized and normalised image, its logits resized to the original."""
    settings = description.preprocessing
    resized = jpeg.opencv().resize(image, size[::-1])
    values = (resized / np.float32(255) - np.float32(settings.mean)) / np.float32(settings.std)
    model = description.build()
    logits = jax.jit(lambda *given: model.apply(*given, train=False))(variables, values[None])
    return np.asarray(
        resize_bilinear(logits, image.shape[:2], align_corners=model.align_corners)[0]
    )


def check_labels(found, logits):
    """Labels are the largest logits wherever one is clearly the largest."""
    best = np.sort(logits, axis=-1)
    sure = best[..., -1] - best[..., -2] > 1e-4
    assert sure.mean() > 0.99
    np.testing.assert_array_equal(found[sure], logits.argmax(axis=-1)[sure])


@pytest.mark.parametrize(
    ('shape', 'resized'), [((48, 70), (32, 47)), ((20, 90), (14, 64)), ((32, 40), (32, 40))]
)
def test_labels_are_those_of_the_largest_logits_at_the_original_size(
    segmenter, stored_segmenter, make, shape, resized
):
    image = make.picture(1, *shape)
    inputs = segmenter.load_image(image)
    assert inputs['image'].shape == (*resized, 3)
    found = segmenter(image, probabilities=True)
    assert (found.labels.shape, found.labels.dtype) == (shape, np.uint8)
    assert found.label_names == LABELS
    logits = expected_logits(
        stored_segmenter.description, stored_segmenter.variables, image, resized
    )
    check_labels(found.labels, logits)
    assert shape != (48, 70) or len(found.found()) > 1
    np.testing.assert_allclose(found.probabilities, jax.nn.softmax(logits), atol=1e-5)
    assert segmenter(image).probabilities is None


def test_windows_and_corners_are_the_modules(stored_segmenter, make):
    options = {'window': 24, 'window_stride': 16, 'align_corners': True}
    description = dataclasses.replace(
        stored_segmenter.description, options={**stored_segmenter.description.options, **options}
    )
    segmenter = Segmenter(
        description, stored_segmenter.variables, devices=stored_segmenter.one_device
    )
    image = make.picture(2, 41, 50)
    logits = expected_logits(description, stored_segmenter.variables, image, (32, 39))
    check_labels(segmenter(image).labels, logits)


def test_images_of_one_size_share_a_batch_over_the_devices(segmenter, stored_segmenter, make):
    pictures = [make.picture(seed, *size) for seed, size in enumerate([(48, 70), (30, 30)] * 3)]
    several = Segmenter(stored_segmenter.description, stored_segmenter.variables, batch_size=3)
    assert several.batch_size == len(jax.devices())
    for picture, found in zip(pictures, several(pictures), strict=True):
        np.testing.assert_array_equal(found.labels, segmenter(picture).labels)


def test_a_large_image_is_labelled_in_blocks(segmenter, stored_segmenter, make, monkeypatch):
    image = make.picture(3, 50, 60)
    expected = segmenter(image)
    monkeypatch.setattr(module, 'BLOCK_VALUES', 7 * 60 * 3)
    blocks = Segmenter(
        stored_segmenter.description,
        stored_segmenter.variables,
        devices=stored_segmenter.one_device,
    )(image, probabilities=True)
    np.testing.assert_array_equal(blocks.labels, expected.labels)
    np.testing.assert_array_equal(blocks.probabilities.argmax(axis=-1), expected.labels)


def test_probabilities_that_need_too_much_memory_are_refused(segmenter, make, monkeypatch):
    image = make.picture(0, 50, 60)
    monkeypatch.setattr(module, 'MAX_PROBABILITY_BYTES', 4 * 50 * 60 * 3 - 1)
    with pytest.raises(ConfigError, match=r'3 classes for 1 x 50 x 60 pixels.*labels only'):
        segmenter(image, probabilities=True)
    assert segmenter(image).size == (50, 60)


def test_what_is_compiled_is_bounded(segmenter, make, monkeypatch):
    few = copy.copy(segmenter)
    few._image_sizes = {(1, 1, 1, index) for index in range(few.max_image_sizes)}
    few(make.picture(0, 48, 70))
    assert few._image_sizes == {(32, 47, 48, 70)}


def test_a_folder_goes_on_after_what_cannot_be_read(segmenter, make, tmp_path):
    image = make.picture(4, 48, 70)
    (tmp_path / 'a.png').write_bytes(make.encode(image))
    (tmp_path / 'b.png').write_bytes(make.encode(image)[:100])
    Image.new('RGB', (9000, 1)).save(tmp_path / 'c.png')
    Image.new('RGB', (1, 1), (90, 20, 200)).save(tmp_path / 'd.png')
    found = dict(segmenter.stream(tmp_path))
    assert 'damaged PNG image' in str(found[tmp_path / 'b.png'])
    assert 'too elongated' in str(found[tmp_path / 'c.png'])
    np.testing.assert_array_equal(found[tmp_path / 'a.png'].labels, segmenter(image).labels)
    assert found[tmp_path / 'd.png'].size == (1, 1)


def test_exif_orientation_is_applied(segmenter, make, tmp_path):
    image = make.picture(5, 48, 70)
    exif = Image.Exif()
    exif[0x0112] = 6  # To be turned by 90 degrees clockwise for showing.
    Image.fromarray(np.rot90(image)).save(tmp_path / 'turned.png', exif=exif)
    np.testing.assert_array_equal(
        segmenter(tmp_path / 'turned.png').labels, segmenter(image).labels
    )


def test_features_are_maps_of_the_backbone_and_the_head(segmenter, make):
    assert list(segmenter.layers)[-2:] == ['auxiliary_logits', 'logits']
    assert {'stage1', 'stage4', 'head_logits', 'pooled'} <= segmenter.layers.keys()
    image = make.picture(0, 32, 48)
    assert segmenter.features(image, 'head_logits').shape == (2, 3, 3)
    assert segmenter.features([image, image], 'stage2').shape == (2, 4, 6, 8)
    with pytest.raises(ConfigError, match="'labels' is what predict gives, not a layer"):
        segmenter.features(image, 'labels')


def test_many_labels_take_two_bytes_and_have_numbers_for_names(stored_segmenter, random_variables):
    description = dataclasses.replace(
        stored_segmenter.description,
        options={**stored_segmenter.description.options, 'num_classes': 256},
        label_names=(),
    )
    images = np.zeros((1, 32, 64, 3), np.float32)
    variables = random_variables(description.build(), images, train=False)
    segmenter = Segmenter(description, variables, devices=stored_segmenter.one_device)
    found = segmenter(np.zeros((32, 32), np.uint8))
    assert found.labels.dtype == np.uint16
    assert found.label_names[255] == 'class 255'


def test_logits_that_are_not_finite_are_refused(segmenter, make):
    damaged = copy.copy(segmenter)
    damaged.variables = jax.tree.map(lambda leaf: leaf, segmenter.variables)
    logits = damaged.variables['params']['head']['logits']
    logits['kernel'] = jnp.full_like(logits['kernel'], 3e38)
    with pytest.raises(CheckpointError, match='logits are NaN or not finite'):
        damaged(make.picture(0, 32, 32))


def test_each_kind_of_checkpoint_names_its_class(stored_segmenter, stored):
    assert gcnet_jax.Segmenter is Segmenter
    assert isinstance(load_network(stored_segmenter.directory), Segmenter)
    with pytest.raises(CheckpointError, match=r'for classification.*gcnet_jax\.Classifier'):
        Segmenter.load(stored.directory)
    for other in (Classifier, Detector):
        with pytest.raises(CheckpointError, match=r'for segmentation.*gcnet_jax\.Segmenter'):
            other.load(stored_segmenter.directory)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'label_names': LABELS[:2]}, '2 label names and 3 classes'),
        ({'preprocessing': KeepRatio()}, 'multiple_of must be 1'),
    ],
)
def test_a_description_that_does_not_fit_is_refused(stored_segmenter, change, message):
    description = dataclasses.replace(stored_segmenter.description, **change)
    with pytest.raises(CheckpointError, match=message):
        Segmenter(description, stored_segmenter.variables)


def test_size_sets_the_limits_of_the_sides(stored_segmenter, make):
    segmenter = Segmenter.load(stored_segmenter.directory, size=(16, 30))
    assert segmenter.load_image(make.picture(0, 48, 60))['image'].shape == (16, 20, 3)
