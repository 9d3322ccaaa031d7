"""A bound on the memory that threads take together."""

import contextlib
import threading
from collections.abc import Iterator


class MemoryBudget:
    """Bytes that the threads of a process share: whoever finds too few left waits for the others.

    Args:
      total: Number of bytes.
      small: Requests up to this many are granted without counting them.
    """

    def __init__(self, total: int, small: int = 0) -> None:
        self.total, self.small = total, small
        self._used = 0
        self._freed = threading.Condition()
        self._turn = threading.Lock()  # First come, first served: large requests do get theirs.
        self._holder = threading.local()

    @contextlib.contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Holds bytes while the block runs; more than there are in all are all of them.

        A thread that holds some already gets what it asks for at once, since waiting for itself
        would never end: the outermost request is the one that counts.
        """
        if size <= self.small or getattr(self._holder, 'holds', False):
            yield
            return
        size = min(size, self.total)
        with self._turn, self._freed:
            self._freed.wait_for(lambda: self._used + size <= self.total)
            self._used += size
        self._holder.holds = True
        try:
            yield
        finally:
            self._holder.holds = False
            with self._freed:
                self._used -= size
                self._freed.notify_all()
