"""A checkpoint that the last code of format version 1 wrote (make_version_1.py) still loads."""

from pathlib import Path

import jax
import numpy as np
import pytest

from gcnet_jax import Classifier
from gcnet_jax.stored import load_variables
from tests.stored.make_version_1 import DESCRIPTION, images, normalized

PLACE = Path(__file__).parent / 'version_1'
LOGITS = np.load(PLACE / 'logits.npy')


def test_its_description_and_its_variables_are_what_was_written():
    description, variables = load_variables(PLACE / 'network')
    assert (description.name, description.label_names) == ('gccnn', ('ant', 'bee', 'cat'))
    assert description.to_json() == DESCRIPTION.to_json()
    assert description.task == 'classification'
    assert description.preprocessing.test_shape == (12, 12)
    logits = description.build().apply(variables, normalized(), train=False)
    np.testing.assert_allclose(logits, LOGITS, rtol=0, atol=1e-6)


@pytest.mark.parametrize('fold', [False, True])
def test_it_is_served_with_the_same_logits(fold):
    classifier = Classifier.load(PLACE / 'network', fold=fold, devices=jax.devices()[:1])
    logits = np.asarray(classifier.dispatch(images()))[: len(LOGITS)]
    np.testing.assert_allclose(logits, LOGITS, rtol=0, atol=1e-6)
