"""One run at a time in a working directory, on one host or several that share a file system.

The first process of a run holds `run.lock`, a JSON file that names the process. Three signs tell
whether that process still runs, since none works everywhere:

- `flock`, which the kernel releases when a process ends in whatever way, on file systems that have
  it;
- the process id together with the time the process started, for a run of the same machine;
- a heartbeat: the holder renews the file every `BEAT_SECONDS`. A lock of another machine, or in a
  bucket, that was not renewed for `STALE_SECONDS` is left over from a dead process.

Only runs take the lock; reading checkpoints and metrics needs none.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from gcnet_jax.errors import CheckpointError, UserError, one_line
from gcnet_jax.files import explain_bucket, is_bucket, reason
from gcnet_jax.training.processes import any_process

try:
    import fcntl
except ImportError:  # Windows: the other two signs remain.
    fcntl = None

LOCK_FILE = 'run.lock'
BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
# Two runs that took a lock without flock at the same moment: the later one's content stays.
SETTLE_SECONDS = 1.0
MAX_BYTES = 10_000
ATTEMPTS = 20


@dataclasses.dataclass(frozen=True)
class Holder:
    """The process that holds a lock, as its file names it.

    Attributes:
      host: Name of the host.
      machine: Identifies the running system: two containers of one machine share it.
      namespace: Within which `pid` is unique on that machine.
      pid: Process id.
      started: When the process started, in the kernel's units; distinguishes reused ids.
      since: When the lock was taken, for people.
      token: Differs for each lock taken.
    """

    host: str
    machine: str
    namespace: str
    pid: int
    started: str
    since: str
    token: str

    def __str__(self) -> str:
        return f'process {self.pid} on {one_line(self.host)} since {one_line(self.since)}'


def this_process() -> Holder:
    """Describes the calling process."""
    host = socket.gethostname()
    return Holder(
        host=host,
        machine=_read('/proc/sys/kernel/random/boot_id') or f'{host} {uuid.getnode()}',
        namespace=_link('/proc/self/ns/pid'),
        pid=os.getpid(),
        started=_started(os.getpid()) or '',
        since=datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%d %H:%M:%S UTC'),
        token=uuid.uuid4().hex,
    )


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ''


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ''


def _started(pid: int) -> str | None:
    """Returns when a process started; '' where that is unknown, None if it does not run."""
    stat = _read(f'/proc/{pid}/stat')
    if stat:
        fields = stat.rpartition(')')[2].split()  # The name before it may hold anything.
        return None if fields[0] in 'ZX' else fields[19]
    if os.name != 'posix':
        return ''
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return ''


def _parse(content: bytes) -> Holder | None:
    try:
        fields = json.loads(content)
        holder = Holder(**{field.name: fields[field.name] for field in dataclasses.fields(Holder)})
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    texts = dataclasses.asdict(holder)
    pid = texts.pop('pid')
    is_valid = isinstance(pid, int) and pid > 0 and all(isinstance(v, str) for v in texts.values())
    return holder if is_valid else None


def process_runs(holder: Holder, mine: Holder) -> bool | None:
    """Returns whether a holder's process runs; None if that cannot be seen from here."""
    if (holder.machine, holder.namespace) != (mine.machine, mine.namespace):
        return None
    started = _started(holder.pid)
    return started is not None and (not holder.started or started in ('', holder.started))


class WorkdirLock:
    """The lock of one working directory, held by this process.

    Args:
      workdir: The directory; it exists, unless it is in a bucket.
      say: Called with a line if another machine's lock has to be watched for a while.

    Raises:
      CheckpointError: Another run holds it.
      OSError: The file cannot be written.
    """

    def __init__(self, workdir: Any, say: Callable[[str], None] = print) -> None:
        self.path = workdir / LOCK_FILE
        self._say = say
        self._mine = this_process()
        self._file: int | None = None
        self._done = threading.Event()
        self._lost = False
        if is_bucket(workdir):
            self._take_object()
        else:
            self._take_file()
        self._thread = threading.Thread(target=self._beat, daemon=True, name='gcnet_jax lock')
        self._thread.start()

    def check(self) -> None:
        """Raises CheckpointError if another run has taken the lock meanwhile."""
        if self._lost:
            raise CheckpointError(
                f'{self.path} was removed or taken over by another run while this one was held '
                'up; stopped, so that the two do not overwrite each other'
            )

    def release(self) -> None:
        """Lets the next run have the directory."""
        self._done.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # What stays behind is recognised as left over.
            if not self._lost and self._is_mine():
                self.path.unlink()
        if self._file is not None:
            os.close(self._file)

    def _content(self) -> bytes:
        return (json.dumps(dataclasses.asdict(self._mine) | {'beat': time.time()}) + '\n').encode()

    def _take_file(self) -> None:
        for _ in range(ATTEMPTS):
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, 'O_CLOEXEC', 0), 0o666)
            try:
                locked = _flock(file)
                content = os.pread(file, MAX_BYTES, 0)
                if content or locked is False:
                    self._refuse_running(content, locked)
                if locked is False:
                    # Its process is dead, but a child that it forked keeps the file open.
                    self.path.unlink(missing_ok=True)
                    continue
                if not _is_same(file, self.path):  # Removed by its holder between open and flock.
                    continue
                os.ftruncate(file, 0)
                os.pwrite(file, self._content(), 0)
                if not locked:
                    time.sleep(SETTLE_SECONDS)
                    if not self._is_mine():
                        continue
                self._file, file = file, None
                return
            finally:
                if file is not None:
                    os.close(file)
        raise CheckpointError(f'{self.path} keeps changing: several runs are starting; try again')

    def _take_object(self) -> None:
        for _ in range(ATTEMPTS):
            content = self.path.read_bytes() if self.path.exists() else b''
            if content:
                self._refuse_running(content, None)
            self.path.write_bytes(self._content())
            time.sleep(SETTLE_SECONDS)
            if self._is_mine():
                return
        raise CheckpointError(f'{self.path} keeps changing: several runs are starting; try again')

    def _refuse_running(self, content: bytes, locked: bool | None) -> None:
        """Returns if the lock is left over from a dead process.

        Args:
          content: Content of the file.
          locked: Whether this process could flock it; None: the file system has no flock.

        Raises:
          CheckpointError: Its process runs.
        """
        holder = _parse(content)
        runs = None if holder is None else process_runs(holder, self._mine)
        if locked and (holder is None or holder.machine == self._mine.machine):
            return  # On one machine the kernel's word is enough.
        if runs is None:
            runs = locked is False or self._beats(holder)
        if runs:
            raise CheckpointError(
                f'--workdir {self.path.parent} is in use by {holder or "another process"}; wait '
                'until that run ends, stop it, or choose another --workdir'
            )

    def _beats(self, holder: Holder | None) -> bool:
        """Watches a lock until it is renewed, or was not for long enough."""
        first = self._last_beat()
        began, reported = time.monotonic(), False
        while True:
            if self._last_beat() != first:
                return True
            # By the clock of the file system, where there is one; and by ours, whatever it says.
            if self._clock() - (first or 0) >= STALE_SECONDS:
                return False
            if time.monotonic() - began >= STALE_SECONDS:
                return False
            if not reported:
                self._say(
                    f'{self.path} is of {holder or "an unknown process"}: watching whether it '
                    f'still runs, {STALE_SECONDS:.0f} s at most'
                )
                reported = True
            time.sleep(min(0.5, STALE_SECONDS / 20))

    def _last_beat(self) -> float | None:
        try:
            if not is_bucket(self.path):
                return self.path.stat().st_mtime
            return float(json.loads(self.path.read_bytes())['beat'])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _clock(self) -> float:
        """Returns the time by the clock that dates the locks."""
        if is_bucket(self.path):
            return time.time()
        probe = self.path.with_name(f'.{LOCK_FILE}.{self._mine.token}')
        try:
            probe.touch()
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _is_mine(self) -> bool:
        holder = _parse(self.path.read_bytes())
        return holder is not None and holder.token == self._mine.token

    def _beat(self) -> None:
        while not self._done.wait(BEAT_SECONDS):
            try:
                if not self._is_mine():
                    self._lost = True
                    return
                if self._file is None:
                    self.path.write_bytes(self._content())
                else:
                    os.utime(self.path)
            except FileNotFoundError:
                self._lost = True
                return
            except Exception:  # A network that fails for a moment; the next beat may succeed.
                continue


def _flock(file: int) -> bool | None:
    """Locks an open file; False if another process has, None if the file system cannot."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_same(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def hold_workdir(workdir: Any, say: Callable[[str], None] = print) -> Iterator[WorkdirLock | None]:
    """Makes a working directory if it is absent, and locks it while the block runs.

    The first of several processes holds the lock; every process must call this, and all of them
    are refused together.

    Yields:
      The lock, None in every process but the first.

    Raises:
      CheckpointError: Another run is in the directory, or it cannot be written.
    """
    lock, problem = None, None
    if jax.process_index() == 0:
        try:
            lock = _lock(workdir, say)
        except UserError as error:
            problem = error
    try:
        if any_process(problem is not None):
            raise problem or CheckpointError(
                f'the first process cannot lock --workdir {workdir}; see what it says'
            )
        yield lock
    finally:
        if lock is not None:
            lock.release()


def _lock(workdir: Any, say: Callable[[str], None]) -> WorkdirLock:
    if not is_bucket(workdir) and workdir.exists() and not workdir.is_dir():
        raise CheckpointError(f'--workdir {workdir} is a file; name a directory')
    try:
        with explain_bucket(workdir, CheckpointError, '--workdir'):
            workdir.mkdir(parents=True, exist_ok=True)
            return WorkdirLock(workdir, say)
    except OSError as error:
        raise CheckpointError(
            f'--workdir {workdir} cannot be written: {reason(error)}; choose another one'
        ) from error
