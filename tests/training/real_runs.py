"""Starts train.py in processes of their own, for tests with real signals and real connections."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CONFIG = HERE / 'tiny_config.py'
PATIENCE_SECONDS = 600


class Run:
    """One start of the command, in one or more processes.

    Args:
      workdir: Of the run.
      *settings: Flags such as '--config.training.seed=1'.
      place: Directory for data set, compiled code, and what the processes print.
      processes: Number of processes.
      devices: Devices of each process.
      program: What to run instead of train.py.
    """

    def __init__(
        self,
        workdir: Path,
        *settings: str,
        place: Path,
        processes: int = 1,
        devices: int = 1,
        program: Path = ROOT / 'train.py',
    ) -> None:
        self.workdir = workdir
        environment = os.environ | {
            'JAX_PLATFORMS': 'cpu',
            'JAX_ENABLE_COMPILATION_CACHE': 'true',
            'PYTHONPATH': str(ROOT),
            'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices} '
            '--xla_backend_optimization_level=0',
        }
        command = [sys.executable, str(program), f'--config={CONFIG}', f'--workdir={workdir}']
        command += [f'--config.data.data_dir={place / "data"}']
        command += [f'--config.runtime.compilation_cache={place / "compiled"}', *settings]
        port = _free_port()
        self.outputs = [place / f'{workdir.name}-{port}-{index}' for index in range(processes)]
        self.processes = []
        for index, output in enumerate(self.outputs):
            several = ()
            if processes > 1:
                several = (
                    '--config.runtime.distributed',
                    f'--config.runtime.coordinator_address=localhost:{port}',
                    f'--config.runtime.num_processes={processes}',
                    f'--config.runtime.process_id={index}',
                )
            with output.open('w') as file:
                self.processes.append(
                    subprocess.Popen(
                        [*command, *several], env=environment, stdout=file, stderr=file
                    )
                )

    def printed(self, index: int = 0) -> str:
        """What a process has printed."""
        return self.outputs[index].read_text()

    def step(self) -> int:
        """The step of the last line of metrics."""
        path = self.workdir / 'metrics.jsonl'
        lines = path.read_text().splitlines() if path.exists() else []
        found = re.match(r'{"step": (\d+),', lines[-1]) if lines else None
        return int(found.group(1)) if found else 0

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Waits for something to happen while all processes run."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < deadline, self.printed()
            ended = [process.poll() for process in self.processes]
            assert ended == [None] * len(ended), (ended, self.printed())
            time.sleep(0.002)

    def send(self, number: signal.Signals, index: int = 0) -> None:
        """Sends a signal to one process."""
        self.processes[index].send_signal(number)

    def codes(self) -> list[int]:
        """Waits for the end of all processes and returns their exit codes."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        return [process.wait(deadline - time.monotonic()) for process in self.processes]


@contextlib.contextmanager
def running(workdir: Path, *settings: str, **options) -> Iterator[Run]:
    """Starts a run, and leaves none of its processes behind."""
    run = Run(workdir, *settings, **options)
    try:
        yield run
    finally:
        for process in run.processes:
            process.kill()
            process.wait()


def complete(workdir: Path, *settings: str, **options) -> Run:
    """Runs to the end."""
    with running(workdir, *settings, **options) as run:
        codes = run.codes()
        assert codes == [0] * len(codes), '\n'.join(map(run.printed, range(len(codes))))
    return run


def stored_sums(workdir: Path, step: int) -> dict:
    """The checksums of everything in a checkpoint that the next steps depend on."""
    place = workdir / 'checkpoints' / str(step) / 'checksums' / 'metadata'
    sums = json.loads(place.read_text())
    return {name: sums[name] for name in ('variables', 'training', 'position')}


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(('localhost', 0))
        return server.getsockname()[1]
