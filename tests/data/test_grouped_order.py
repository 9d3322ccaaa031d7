"""An order by groups: batches of one group each, and every record as often as the others."""

import collections
import itertools
import pickle

import numpy as np
import pytest

from gcnet_jax.data.grouped_order import GroupedOrder

GROUPS = np.array([0, 0, 1, 0, 2, 0, 1, 0, 0, 0, 1, 0])
FIRST_STEPS = [[6, 10, 2], [7, 3, 0], [5, 9, 8], [1, 11, 0]]


def steps(order, count, first=0):
    size = order.batch_size
    return [
        [order(position) for position in range(step * size, (step + 1) * size)]
        for step in range(first, first + count)
    ]


@pytest.mark.parametrize('batch_size', [1, 2, 3, 4, 30])
@pytest.mark.parametrize('groups', [GROUPS, np.zeros(5, int), np.arange(4), np.array([3])])
def test_batches_are_of_one_group_and_records_take_turns(groups, batch_size):
    order = GroupedOrder(groups, batch_size, seed=5)
    epochs = 60
    count = epochs * len(groups) // batch_size
    batches = steps(order, count)
    assert all(len({groups[record] for record in batch}) == 1 for batch in batches)
    seen = collections.Counter(itertools.chain(*batches))
    # Up to the batch that a group has not filled yet, and the one it is ahead.
    for group in set(groups.tolist()):
        members = np.flatnonzero(groups == group)
        counts = [seen[record] for record in members]
        assert max(counts) - min(counts) <= 1
        assert abs(sum(counts) - epochs * len(members)) <= 2 * batch_size


def test_an_epoch_of_a_group_holds_each_of_its_records_once():
    order = GroupedOrder(GROUPS, 2, seed=1)
    of_group = collections.defaultdict(list)
    for batch in steps(order, 60):
        of_group[GROUPS[batch[0]]] += batch
    epochs = []
    for group, records in of_group.items():
        members = np.flatnonzero(group == GROUPS).tolist()
        for start in range(0, len(records) - len(members) + 1, len(members)):
            epochs.append(tuple(records[start : start + len(members)]))
            assert sorted(epochs[-1]) == members
    assert len(set(epochs)) > len(epochs) / 3  # In another order each time.


def test_groups_are_mixed_within_an_epoch():
    groups = np.repeat([0, 1], [600, 200])
    kinds = [groups[batch[0]] for batch in steps(GroupedOrder(groups, 4, seed=0), 200)]
    assert np.mean(kinds) == pytest.approx(0.25)
    changes = np.count_nonzero(np.diff(kinds))
    assert 45 < changes < 105  # 75 are expected.


def test_any_position_can_be_asked_first_and_the_order_is_that_of_the_seed():
    order = GroupedOrder(GROUPS, 3, seed=2)
    expected = steps(order, 40)
    assert steps(pickle.loads(pickle.dumps(order)), 5, first=33) == expected[33:38]
    assert steps(GroupedOrder(GROUPS, 3, seed=2), 1, first=39) == expected[39:]
    assert steps(GroupedOrder(GROUPS, 3, seed=3), 40) != expected
    late = steps(order, 2, first=10**9)
    assert all(len({GROUPS[record] for record in batch}) == 1 for batch in late)


def test_the_order_does_not_change_between_versions():
    # Runs that are resumed go on in the order that they began with.
    assert steps(GroupedOrder(GROUPS, 3, seed=2), 4) == FIRST_STEPS


def test_others_of_the_group_stand_in():
    order = GroupedOrder(GROUPS, 3, seed=2)
    assert list(order.following(6)) == [6, 10, 2]
    assert list(order.following(4)) == [4]
    assert list(order.following(11)) == [11, 0, 1, 3, 5, 7, 8, 9]
