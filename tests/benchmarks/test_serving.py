"""What onnxruntime and OpenVINO run is the network with the weights of the other candidates."""

import jax
import numpy as np
import pytest

from benchmarks import common, serving
from gcnet_jax.models import create_model, model_entry

pytestmark = [pytest.mark.onnx, pytest.mark.filterwarnings('default')]  # Those of other libraries.


@pytest.fixture(scope='module')
def file(tmp_path_factory):
    file = tmp_path_factory.mktemp('onnx') / 'gc_resnet20.onnx'
    serving.write_onnx('gc_resnet20', 32, file)
    return file


@pytest.mark.parametrize('setup', [serving.onnxruntime_session, serving.openvino_model])
@pytest.mark.parametrize('batch', [1, 3])
def test_it_gives_the_probabilities_of_the_network(file, setup, batch):
    model = create_model('gc_resnet20')
    variables = common.random_variables(common.variable_shapes(model, 32))
    preprocessing = model_entry('gc_resnet20').preprocessing
    pixels = serving.random_pixels(batch, 32) / 255
    images = ((pixels - preprocessing.mean) / preprocessing.std).astype(np.float32)
    expected = jax.nn.softmax(model.apply(variables, images, train=False))
    found = setup(file, batch, 32)()
    np.testing.assert_allclose(found, expected, atol=1e-4)
