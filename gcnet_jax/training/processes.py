"""One run in several processes: how they find each other, what they decide together, and signals.

Usually there is one process a host (or one a GPU), all started with the same command. JAX's own
runtime connects them and notices when one is gone; nothing here talks to another host by itself.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from gcnet_jax.errors import ConfigError, UserError

LAST_WORDS_SECONDS = 2


class Preempted(UserError):
    """A run that got SIGTERM, saved its state and stopped."""


class Interrupted(Preempted):
    """A run that Ctrl-C stopped after it saved its state."""


class ProcessError(UserError):
    """A run that cannot go on because another of its processes is gone."""


def connect(config: ConfigDict) -> None:
    """Joins the other processes of the run, if there are any; waits until all are there.

    Must come before anything asks JAX for its devices. A program that called
    `jax.distributed.initialize` itself is connected already. What the group `runtime` leaves unset
    is taken from the cluster: a TPU pod slice, SLURM, Open MPI, Kubernetes, or
    JAX_COORDINATOR_ADDRESS.

    Raises:
      ConfigError: The others cannot be found.
    """
    runtime = config.runtime
    if not runtime.distributed or jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize(
            coordinator_address=runtime.coordinator_address,
            num_processes=runtime.num_processes,
            process_id=runtime.process_id,
            heartbeat_timeout_seconds=runtime.heartbeat_timeout_seconds,
        )
    except (ValueError, RuntimeError) as error:
        reason = ' '.join(str(error).split())
        raise ConfigError(
            f'config.runtime.distributed is True, but the processes cannot connect: {reason} '
            'Outside a TPU pod slice or SLURM, set config.runtime.coordinator_address '
            'to HOST:PORT of the first process, and num_processes and process_id'
        ) from error


def check_connected() -> None:
    """Refuses to run where JAX sees several processes that were not connected.

    Raises:
      ConfigError: As on every host of a TPU pod slice without `config.runtime.distributed`.
    """
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise ConfigError(
            f'this is process {jax.process_index()} of {jax.process_count()}, but '
            'config.runtime.distributed is False; set it to True, in all of them'
        )


@contextlib.contextmanager
def explain_lost_process() -> Iterator[None]:
    """Turns what JAX raises when another process is gone into one line.

    Raises:
      ProcessError: A computation or a meeting of several processes failed.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        # Out of memory is this process's own trouble, whose long text says what takes the memory.
        if jax.process_count() == 1 or 'RESOURCE_EXHAUSTED' in str(error):
            raise
        reason = ' '.join(str(error).split())[:200]
        raise ProcessError(
            f'process {jax.process_index()} of {jax.process_count()} lost another one ({reason}); '
            'see what that one says, and run the same command in all of them again'
        ) from error


def leave(code: int) -> int:
    """Ends this process at once if it failed as one of several; else returns the exit code.

    An ordinary end waits for all processes, and the others may be waiting for this one.
    """
    if not jax.distributed.is_initialized():
        return code
    if jax.process_index() == 0:
        # The others lose their connection when the first process ends: let them report that.
        time.sleep(LAST_WORDS_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def any_process(this_one: bool) -> bool:
    """Returns whether it is so in any process; every process must ask."""
    if jax.process_count() == 1:
        return this_one
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.asarray(this_one))))


def sum_over_processes(value: float) -> float:
    """Returns the sum over all processes, each of which must ask."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return float(np.sum(multihost_utils.process_allgather(np.asarray(value, np.float32))))


def from_first_process(values: dict[str, float]) -> dict[str, float]:
    """Returns the values of the first process, bit for bit; each process must ask."""
    if jax.process_count() == 1:
        return values
    from jax.experimental import multihost_utils

    # JAX would make float32 of float64.
    bits = np.array(list(values.values()), np.float64).view(np.uint32)
    received = np.asarray(multihost_utils.broadcast_one_to_all(bits)).view(np.float64)
    return dict(zip(values, received.tolist(), strict=True))


def wait_for_all(what: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


class Preemption:
    """Notices SIGTERM, with which schedulers announce that they will end a run, and Ctrl-C.

    A single process handles the signals in Python. With several, JAX's runtime notices SIGTERM in
    whichever process it reaches, and they all find a step that none of them has passed; Ctrl-C in
    one of them is passed on as a SIGTERM.

    Until `begin` there is nothing to save, and Ctrl-C interrupts at once. So does a second one.
    """

    def __init__(self) -> None:
        self._heard: type[Preempted] | None = None
        self._begun = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> 'Preemption':
        # Only the main thread may ask for signals; a run in another thread is not for schedulers.
        if threading.current_thread() is threading.main_thread():
            if not jax.distributed.is_initialized():
                self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._hear)
            # A background job of a shell ignores Ctrl-C, and a caller may have its own handler.
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._hear_interrupt)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        # And nothing else: a second SIGTERM must not disturb the save.
        self._heard = self._heard or Preempted

    def _hear_interrupt(self, number: int, frame: FrameType | None) -> None:
        if not self._begun or self._heard is not None:
            signal.default_int_handler(number, frame)
        self._heard = Interrupted
        if jax.distributed.is_initialized():
            os.kill(os.getpid(), signal.SIGTERM)
        # Not print: the signal may have come in the middle of one.
        os.write(2, b'\nCtrl-C: saving after this step; press it again to stop at once\n')

    def begin(self) -> None:
        """From now on there are steps that Ctrl-C must not lose."""
        self._begun = True

    @property
    def stop(self) -> type[Preempted]:
        """What to raise where the run stops: `Interrupted` after Ctrl-C in this process."""
        return self._heard or Preempted

    def stops_at(self, step: int) -> bool:
        """Returns whether to save and stop at this step; ask at every step, in every process."""
        if not jax.distributed.is_initialized():
            return self._heard is not None
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)
