"""The loaders' machinery with examples of any arrays; `test_loader` has their order and parts."""

import numpy as np
import pytest

from gcnet_jax.data.batches import batches_of_all, endless_batches
from gcnet_jax.errors import DataError

OPTIONS = {'global_batch_size': 4, 'image_size': 1, 'num_threads': 0}


class Numbers:
    """Records that are their number; -1 is damaged."""

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return {'number': self.values[index]}

    def describe(self, index):
        return f'number {index}'


def boxes(record, rng=None):
    """An example of three arrays of different types and ranks."""
    number = record['number']
    if number < 0:
        raise DataError('below zero')
    return {
        'boxes': np.full((5, 4), number, np.float32),
        'count': np.array(number, np.int32),
        'draw': np.array(0.0 if rng is None else rng.random()),
    }


def nothing():
    return {'boxes': np.zeros((5, 4), np.float32), 'count': np.array(0, np.int32),
            'draw': np.array(0.0)}  # fmt: skip


def test_training_hands_out_the_arrays_of_the_examples_and_no_others():
    with endless_batches(Numbers(range(6)), boxes, seed=0, **OPTIONS) as batches:
        batch = next(batches)
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        'boxes': ((4, 5, 4), np.float32),
        'count': ((4,), np.int32),
        'draw': ((4,), np.float64),
    }
    assert (batch['boxes'][:, 0, 0] == batch['count']).all()
    assert len(set(batch['draw'])) == 4


def test_every_example_gets_a_generator_of_its_own_by_its_place_alone():
    def drawn(**changes):
        with endless_batches(Numbers(range(6)), boxes, **(OPTIONS | {'seed': 3} | changes)) as made:
            return np.concatenate([next(made)['draw'] for _ in range(3)])

    assert len(set(drawn())) == 12
    np.testing.assert_array_equal(drawn(), drawn(num_threads=3))
    assert (drawn() != drawn(seed=4)).all()


def test_evaluation_adds_the_mask_and_fills_up():
    with batches_of_all(Numbers([5, 6, 7, 8, 9, -1]), boxes, nothing, skip_damaged=True,
                        **OPTIONS) as batches:  # fmt: skip
        first, second = batches
        assert batches.skipped == 1
    assert first['mask'].tolist() == [True] * 4
    assert second['mask'].tolist() == [True, False, False, False]
    assert second['count'].tolist() == [9, 0, 0, 0]
    assert second['mask'].dtype == np.bool_


def test_damage_is_an_error_with_the_name_of_the_record():
    source = Numbers([1, -1])
    with pytest.raises(DataError, match=r'^number 1: below zero; repair it, or leave such images'):
        list(batches_of_all(source, boxes, nothing, **OPTIONS))
    with pytest.raises(DataError, match='number 0 and all others are damaged: below zero'):
        next(endless_batches(Numbers([-1]), boxes, seed=0, skip_damaged=True, **OPTIONS))
