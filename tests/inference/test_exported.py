"""The functions that are exported, before they are; `test_export` has the files."""

import jax
import numpy as np
import pytest

from gcnet_jax.errors import CheckpointError, ConfigError
from gcnet_jax.inference.classifier import Classifier
from gcnet_jax.inference.exported import load_exported
from gcnet_jax.inference.segmenter import Segmenter


def shapes(exported):
    return [tuple(map(str, argument.shape)) for argument in exported.inputs]


def test_a_classifier_gives_its_probabilities(stored):
    exported = load_exported(stored.directory, 'best', None)
    assert shapes(exported) == [('batch', '12', '12', '3')]
    images = np.random.default_rng(0).integers(0, 256, (2, 12, 12, 3), np.uint8)
    logits = Classifier.load(stored.directory, devices=stored.one_device).dispatch(images)[:2]
    expected = jax.nn.softmax(logits)
    np.testing.assert_allclose(exported.function(images), expected, atol=1e-6)
    assert list(exported.to_json()) == [
        *('network', 'source', 'inputs', 'outputs', 'task', 'preprocessing', 'label_names')
    ]


def test_the_canvas_of_a_detector_is_that_of_landscapes_unless_chosen(stored_detector):
    exported = load_exported(stored_detector.directory, 'best', None)
    assert shapes(exported) == [('batch', '64', '96', '3'), ('batch', '2')]
    assert [str(argument.dtype) for argument in exported.inputs] == ['uint8', 'int32']
    chosen = load_exported(stored_detector.directory, 'best', (96, 64))
    assert shapes(chosen)[0] == ('batch', '96', '64', '3')
    assert '96 / h, 64 / w' in chosen.to_json()['resize']
    # The limits of the sides stay the network's own.
    assert chosen.description.preprocessing == stored_detector.description.preprocessing
    with pytest.raises(ConfigError, match='a multiple of 32 pixels high and wide, got 96x65'):
        load_exported(stored_detector.directory, 'best', (96, 65))


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match='no such directory'):
        load_exported(tmp_path / 'none', 'best', None)


def test_a_segmenter_labels_images_of_one_size(stored_segmenter):
    exported = load_exported(stored_segmenter.directory, 'best', None)
    assert shapes(exported) == [('batch', '32', '64', '3')]
    chosen = load_exported(stored_segmenter.directory, 'best', (32, 40))
    assert shapes(chosen) == [('batch', '32', '40', '3')]
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 40, 3), np.uint8)
    segmenter = Segmenter.load(stored_segmenter.directory, devices=stored_segmenter.one_device)
    found = jax.jit(chosen.function)(images)
    assert found['finite'].all()
    for labels, expected in zip(found['labels'], segmenter(images), strict=True):
        np.testing.assert_array_equal(labels, expected.labels)
    with pytest.raises(ConfigError, match='from 1 to 4096 pixels high and wide, got 0x40'):
        load_exported(stored_segmenter.directory, 'best', (0, 40))
