"""The table of query distances is that of the images of a data set's split."""

import io
import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from benchmarks import query_distances
from gcnet_jax.analysis.query_distances import mean_cosine_distance
from gcnet_jax.data.preprocessing import Preprocessing
from gcnet_jax.data.sources import load_source
from gcnet_jax.stored import ModelDescription, write_ported

PREPROCESSING = Preprocessing(train_size=8, test_size=8, crop_fraction=1.0)


@pytest.fixture
def store(tmp_path, random_variables):
    def store(block):
        context = {'block': block, 'stages': (1,), 'position': 'after_add'}
        options = {'widths': [8], 'stage_sizes': [1], 'num_classes': 10, 'context': [context]}
        description = ModelDescription('gccnn', options, preprocessing=PREPROCESSING)
        images = jnp.zeros((1, 8, 8, 3))
        variables = random_variables(description.build(), images, train=False)
        write_ported(tmp_path / block, description, variables)
        return description.build(), variables, str(tmp_path / block)

    return store


def test_distances_are_of_the_first_images(store, capsys):
    model, variables, place = store('non_local')
    assert query_distances.main([place, '--data', 'digits', '--images', '2', '--json']) == 0
    (row,) = json.loads(capsys.readouterr().out)['rows']
    assert row['block'] == 'stage1_0/context_after_add_0'
    source = load_source('digits', 'test')
    images = [Image.open(io.BytesIO(source[index]['image'])).convert('RGB') for index in range(2)]
    pixels = np.stack([np.asarray(image, np.float32) / 255 for image in images])
    pixels = (pixels - np.float32(PREPROCESSING.mean)) / np.float32(PREPROCESSING.std)
    state = model.apply(variables, pixels, train=False, mutable=['intermediates'])[1]
    sown = state['intermediates']['stage1_0']['context_after_add_0']
    for column, name in (('input', 'input'), ('output', 'update'), ('attention', 'attention')):
        rows = np.asarray(sown[name][0]).reshape(2, 64, -1)
        expected = np.mean([mean_cosine_distance(vectors) for vectors in rows])
        assert row[column] == pytest.approx(expected, rel=1e-4)


def test_a_network_without_such_a_block_is_refused(store, capsys):
    place = store('global_context')[2]
    assert query_distances.main([place, '--data', 'digits', '--images', '2']) == 1
    assert 'holds no NonLocal block' in capsys.readouterr().err
