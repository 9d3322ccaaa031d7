"""An endless order of records in which every batch holds records of one group.

The records of each group are shuffled anew for each of their epochs, laid end to end and cut into
batches, so that none is left out. The batches of the groups follow each other at random, so many of
each as its share of the records. Everything is a function of the seed and the position: neither
processes nor workers need to agree on anything.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int


@dataclasses.dataclass(frozen=True, eq=False)
class GroupedOrder:
    """The order; see `batches.Order`.

    Attributes:
      group_of: The group of each record.
      batch_size: Records of a batch, over all processes.
      seed: Of the order.
    """

    group_of: Int[np.ndarray, ' records']
    batch_size: int
    seed: int

    @functools.cached_property
    def members(self) -> tuple[Int[np.ndarray, ' members'], ...]:
        """The records of each group that has any, in the order of the groups' numbers."""
        return tuple(np.flatnonzero(self.group_of == group) for group in np.unique(self.group_of))

    def __call__(self, position: int) -> int:
        """Returns the record at a position; batch k is those from k * batch_size on."""
        step, place = divmod(position, self.batch_size)
        group, batch = self.batch(step)
        members = self.members[group]
        epoch, place = divmod(batch * self.batch_size + place, len(members))
        return int(members[_shuffled(self.seed, group, epoch, len(members))[place]])

    def following(self, record: int) -> Iterator[int]:
        """Yields a record, then the others of its group, which may stand in for it."""
        yield record
        members = np.flatnonzero(self.group_of == self.group_of[record])
        start = int(np.searchsorted(members, record))
        yield from np.roll(members, -start)[1:].tolist()

    def batch(self, step: int) -> tuple[int, int]:
        """Returns the group of a step's batch, and which of the group's batches it is."""
        counts = [len(members) for members in self.members]
        epoch = step * self.batch_size // sum(counts)
        # No more than `step` batches come before this epoch: each group's are rounded down.
        while sum(self._batches_before(epoch + 1)) <= step:
            epoch += 1
        before = self._batches_before(epoch)
        numbers = [
            after - first
            for first, after in zip(before, self._batches_before(epoch + 1), strict=True)
        ]
        groups = _mixed(self.seed, epoch, tuple(numbers))
        place = step - sum(before)
        group = int(groups[place])
        return group, before[group] + int((groups[:place] == group).sum())

    def _batches_before(self, epoch: int) -> Sequence[int]:
        """Returns how many whole batches each group has filled before an epoch."""
        return [epoch * len(members) // self.batch_size for members in self.members]


# A batch needs the same few orders for each of its records.
@functools.lru_cache(maxsize=64)
def _shuffled(seed: int, group: int, epoch: int, count: int) -> Int[np.ndarray, ' count']:
    return np.random.default_rng([seed, 1 + group, epoch]).permutation(count)


@functools.lru_cache(maxsize=64)
def _mixed(seed: int, epoch: int, numbers: tuple[int, ...]) -> Int[np.ndarray, ' batches']:
    """Returns the groups of an epoch's batches, so many of each, in random order."""
    groups = np.repeat(np.arange(len(numbers)), numbers)
    return np.random.default_rng([seed, 0, epoch]).permutation(groups)
