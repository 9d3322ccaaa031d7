"""Jobs one after another, in this process or in several at once, each with cores of its own."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

from gcnet_jax.commands.train import PREEMPTED
from gcnet_jax.errors import ConfigError, UserError

# What is done, picklable, and returns a line about it.
Job = Callable[[], str]


def run_all(jobs: Sequence[Job], processes: int) -> Iterator[str]:
    """Runs jobs and yields the line of each as it ends.

    Several processes divide the cores among them: small networks use two cores better in two runs
    than in one. Where this process stops early, they receive SIGTERM: a run of ours then saves
    itself, one of PyTorch's goes on from its last checkpoint.

    Raises:
      ConfigError: There are more processes than cores.
      UserError: That of the first job that fails; the others are stopped.
    """
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= processes <= len(cores):
        raise ConfigError(
            f'--processes is {processes}; it must be from 1 to {len(cores)}, the cores'
        )
    if processes == 1:
        for job in jobs:
            yield job()
        return
    with sigterm_as_exit(), contextlib.closing(_Workers()) as workers:
        waiting = list(jobs)
        while waiting or workers.busy:
            while waiting and len(workers.busy) < processes:
                workers.give(waiting.pop(0), cores, processes)
            yield from workers.answers()


class _Workers:
    """Processes that wait for jobs, and those that have one."""

    def __init__(self) -> None:
        self.processes: list[multiprocessing.process.BaseProcess] = []
        self.idle: list[multiprocessing.connection.Connection] = []
        self.busy: list[multiprocessing.connection.Connection] = []

    def give(self, job: Job, cores: Sequence[int], processes: int) -> None:
        """Gives a job to a process that waits for one, or to a new one."""
        if not self.idle:
            context = multiprocessing.get_context('spawn')
            ours, theirs = context.Pipe()
            own = cores[len(self.processes) :: processes]
            self.processes.append(context.Process(target=_work, args=(theirs, own)))
            self.processes[-1].start()
            theirs.close()
            self.idle.append(ours)
        pipe = self.idle.pop()
        pipe.send(job)
        self.busy.append(pipe)

    def answers(self) -> Iterator[str]:
        """Waits for a job to end; yields the lines of those that have."""
        for pipe in multiprocessing.connection.wait(self.busy):
            self.busy.remove(pipe)
            yield _answer(pipe)
            self.idle.append(pipe)

    def close(self) -> None:
        """Stops all processes, and waits for runs to be saved."""
        for process in self.processes:
            process.terminate()
        for pipe in (*self.busy, *self.idle):
            pipe.close()
        for process in self.processes:
            process.join()


def _answer(pipe: Any) -> str:
    try:
        answer = pipe.recv()
    except (EOFError, ConnectionResetError) as error:
        raise UserError('a process ended, see above; the same command goes on') from error
    if isinstance(answer, UserError):
        raise answer
    return answer


def _work(pipe: Any, cores: Sequence[int]) -> None:
    os.setsid()  # Ctrl-C reaches the first process alone, which then stops this one.
    os.sched_setaffinity(0, cores)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            job = pipe.recv()
            try:
                answer = job()
            except UserError as error:
                answer = UserError(str(error))
            pipe.send(answer)


@contextlib.contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """Lets SIGTERM unwind this process, which stops the others."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(PREEMPTED)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
