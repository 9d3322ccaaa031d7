"""The paper's distances, against its formulas written out pair by pair."""

import math

import jax
import numpy as np
import pytest

from gcnet_jax.analysis import attention_maps, query_distances
from gcnet_jax.analysis.query_distances import mean_cosine_distance, mean_divergence
from gcnet_jax.context import GlobalContext, NonLocal
from gcnet_jax.errors import UserError


def cosine_by_pairs(vectors):
    total = 0.0
    for first in vectors:
        for second in vectors:
            cosine = first @ second / math.sqrt((first @ first) * (second @ second))
            total += (1 - cosine) / 2
    return total / len(vectors) ** 2


def divergence_by_pairs(rows):
    total = 0.0
    for first in rows:
        for second in rows:
            for p, q in zip(first, second, strict=True):
                total += (p * math.log(2 * p / (p + q)) + q * math.log(2 * q / (p + q))) / 2
    return total / len(rows) ** 2


def distributions(count, size, seed=0):
    values = np.random.default_rng(seed).gamma(0.5, size=(count, size)) + 1e-6
    return (values / values.sum(1, keepdims=True)).astype(np.float32)


def test_cosine_distance_is_the_mean_over_all_pairs():
    vectors = np.random.default_rng(0).normal(size=(7, 4)) + 0.5
    assert mean_cosine_distance(vectors) == pytest.approx(cosine_by_pairs(vectors), rel=1e-9)


def test_cosine_distance_of_opposed_equal_and_zero_vectors():
    one = np.asarray([[1.0, 2.0], [-1.0, -2.0]])
    assert mean_cosine_distance(one) == pytest.approx(0.5)  # Two pairs of four are opposed.
    assert mean_cosine_distance(np.ones((3, 2))) == pytest.approx(0.0, abs=1e-12)
    assert mean_cosine_distance(np.asarray([[1.0, 0.0], [0.0, 0.0]])) == pytest.approx(0.0)
    assert math.isnan(mean_cosine_distance(np.zeros((3, 2))))


def test_divergence_is_the_mean_over_all_pairs():
    rows = distributions(6, 5)
    assert mean_divergence(rows) == pytest.approx(divergence_by_pairs(rows.astype(float)), rel=1e-5)


def test_divergence_of_disjoint_maps_is_log_2_for_each_unequal_pair():
    assert mean_divergence(np.eye(4, dtype=np.float32)) == pytest.approx(math.log(2) * 12 / 16)


def test_divergence_of_many_maps_is_that_of_evenly_chosen_ones():
    rows = distributions(9, 5)
    chosen = divergence_by_pairs(rows[[0, 4, 8]].astype(float))
    assert mean_divergence(rows, most=3) == pytest.approx(chosen, rel=1e-5)


@pytest.fixture(scope='module')
def block(random_variables):
    model = NonLocal(hidden_channels=3)
    features = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    return model, random_variables(model, features), features


def test_distances_of_a_block_are_those_of_its_input_output_and_maps(block):
    model, variables, features = block
    (found,) = query_distances(model, variables, features).values()
    (maps,) = attention_maps(model, variables, features).values()
    updates = np.asarray(model.apply(variables, features)) - features
    parts = {
        'input': [cosine_by_pairs(image.reshape(12, 5)) for image in features],
        'output': [cosine_by_pairs(image.reshape(12, 5)) for image in updates],
        'attention': [cosine_by_pairs(image.reshape(12, 12)) for image in np.asarray(maps)],
        'attention_divergence': [
            divergence_by_pairs(image.reshape(12, 12)) for image in np.asarray(maps, float)
        ],
    }
    for name, values in parts.items():
        assert getattr(found, name) == pytest.approx(np.mean(values), rel=1e-3), name
    assert f'input {found.input:.2g}, output {found.output:.2g}' in str(found)


def test_a_block_that_adds_nothing_and_has_no_softmax_says_so():
    features = np.random.default_rng(0).normal(size=(1, 3, 3, 4)).astype(np.float32)
    model = NonLocal(mode='dot_product')
    variables = model.init(jax.random.key(0), features)
    (found,) = query_distances(model, variables, features).values()
    assert found.input > 0.1
    assert math.isnan(found.output)
    assert math.isnan(found.attention)
    assert str(found).count('undefined') == 3


def test_a_model_without_queries_is_refused(random_variables):
    features = np.ones((1, 3, 3, 4), np.float32)
    model = GlobalContext(hidden_channels=2)
    with pytest.raises(UserError, match='GlobalContext holds no NonLocal block'):
        query_distances(model, random_variables(model, features), features)
