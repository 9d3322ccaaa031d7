"""The choice of boxes against sorting in numpy."""

import jax
import numpy as np
import pytest

from gcnet_jax.ops.assignment import BACKGROUND, IGNORED
from gcnet_jax.ops.sampling import sample

compute = jax.jit(sample, static_argnames=('count', 'most_positive'))
COUNT, MOST = 16, 4


def draw(positives, negatives, ignored=5, seed=0):
    rng = np.random.default_rng(seed)
    assigned = np.concatenate(
        [
            rng.integers(0, 3, positives),
            np.full(negatives, BACKGROUND),
            np.full(ignored, IGNORED),
        ]
    )
    rng.shuffle(assigned)
    return assigned.astype(np.int32), rng.random(len(assigned)).astype(np.float32)


def best(candidates, priorities, count):
    places = np.flatnonzero(candidates)
    return np.sort(places[np.argsort(-priorities[places])][:count])


@pytest.mark.parametrize(
    ('positives', 'negatives'), [(20, 40), (2, 40), (0, 40), (20, 3), (1, 2), (4, 12), (0, 0)]
)
def test_positive_boxes_first_then_background_up_to_the_count(positives, negatives):
    assigned, priorities = draw(positives, negatives)
    found = compute(assigned, priorities, count=COUNT, most_positive=MOST)
    chosen = best(assigned >= 0, priorities, MOST)
    others = best(assigned == BACKGROUND, priorities, COUNT - len(chosen))
    expected = np.concatenate([chosen, others])
    assert found.index.shape == (COUNT,)
    np.testing.assert_array_equal(found.valid, np.arange(COUNT) < len(expected))
    np.testing.assert_array_equal(found.positive, np.arange(COUNT) < len(chosen))
    np.testing.assert_array_equal(found.index[: len(expected)], expected)


def test_fewer_boxes_than_places():
    assigned = np.array([0, BACKGROUND, IGNORED], np.int32)
    found = compute(assigned, np.zeros(3, np.float32), count=COUNT, most_positive=MOST)
    assert found.index.tolist() == [0, 1] + [0] * (COUNT - 2)
    assert found.valid.sum() == 2


def test_every_box_is_chosen_as_often():
    assigned, _ = draw(12, 30)
    keys = jax.random.split(jax.random.key(0), 2000)

    def indices(key):
        priorities = jax.random.uniform(key, assigned.shape)
        found = sample(assigned, priorities, COUNT, MOST)
        return jax.numpy.zeros(len(assigned)).at[found.index].add(found.valid)

    share = np.asarray(jax.jit(jax.vmap(indices))(keys).mean(axis=0))
    np.testing.assert_allclose(share[assigned >= 0], 4 / 12, atol=0.05)
    np.testing.assert_allclose(share[assigned == BACKGROUND], 12 / 30, atol=0.05)
    assert not share[assigned == IGNORED].any()
