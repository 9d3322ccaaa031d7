"""Everything to be measured on a machine with a GPU, one part after the other.

    python -m benchmarks.gpu --out DIR [--small] [--only PART ...]
        [--mmdetection-python PYTHON --mmdetection-config CONFIG [--mmdetection-setup MODULE]]

Needs requirements.txt, requirements-torch.txt with a PyTorch for the GPU, and JAX for it (`pip
install "jax[cuda13]"`). Parts are the core of the test suite, inference and training in every
precision, detectors and a detector's training step if an interpreter with mmdetection is given, and
the grids of accuracies at full length (80 runs of 200 epochs; CIFAR-10 and CIFAR-100 must have been
prepared). Each writes DIR/PART.md, and what it says besides to DIR/PART.log. What has its PART.md
already, of the same command on the same GPU, is left out, so a run that was stopped goes on. A part
that fails does not stop the others: it is named at the end, and the exit status is 1. `--small`
tries every part in a few minutes, on a CPU too, for no figures of any use.
"""

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import settings
from benchmarks.workers import sigterm_as_exit

ROOT = Path(__file__).parents[1]
# The operations, the blocks and the networks: what a GPU computes otherwise than a CPU.
TESTS = ('tests/ops', 'tests/context', 'tests/models')
NETWORKS = ('gc_resnet50', 'gcresnet50t')
BATCHES = ('1', '32', '256')
INFERENCE = ('--networks', *NETWORKS, '--batches', *BATCHES, '--rounds', '30')
TRAINING = ('--cases', *NETWORKS, '--batches', *BATCHES, '--rounds', '20')
DETECTION = ('--rounds', '10')
ACCURACY = ('cifar10_resnet20', 'cifar10_resnet56', 'cifar100_resnet20', 'cifar100_resnet56')
# The same in miniature.
SMALL_TESTS = ('tests/context/test_global_context.py',)
SMALL_INFERENCE = (
    *('--networks', 'gc_resnet20', '--size', '32'),
    *('--batches', '1', '2', '--rounds', '2'),
)
SMALL_TRAINING = ('--cases', 'gc_resnet20', '--batches', '2', '--rounds', '2')
SMALL_DETECTION = ('--size', '96', '128', '--rounds', '1')
SMALL_ACCURACY = (
    *('digits', '--networks', 'none', '--seeds', '2'),
    *('--config.training.total_steps=2', '--config.training.batch_size=16'),
)


def parts(flags: argparse.Namespace) -> dict[str, list[str]]:
    """Returns the command of each part, by name."""
    device = settings.choose_device(None)

    def benchmark(name: str, *arguments: str) -> list[str]:
        return [sys.executable, '-m', f'benchmarks.{name}', *arguments]

    tests = SMALL_TESTS if flags.small else TESTS
    inference = SMALL_INFERENCE if flags.small else INFERENCE
    training = SMALL_TRAINING if flags.small else TRAINING
    variables = ['JAX_PLATFORMS=cpu']
    if device == 'gpu':
        # With TF32, results differ from those of float32 by more than the tests allow.
        variables = ['JAX_PLATFORMS=cuda,cpu', 'JAX_DEFAULT_MATMUL_PRECISION=float32']
    pytest = [sys.executable, '-m', 'pytest', '-n', '0', '-q', *tests]
    found = {'tests': ['env', *variables, *pytest]}
    for precision in settings.PRECISIONS:
        how = ('--device', device, '--precision', precision)
        found[f'inference_{precision}'] = benchmark('inference', *inference, *how)
        found[f'training_{precision}'] = benchmark('training', *training, *how)
    if flags.mmdetection_python:
        theirs = [
            *('--device', device),
            *('--mmdetection-python', flags.mmdetection_python),
            *('--mmdetection-config', flags.mmdetection_config),
        ]
        if flags.mmdetection_setup:
            theirs += ['--mmdetection-setup', flags.mmdetection_setup]
        how = [*(SMALL_DETECTION if flags.small else DETECTION), *theirs]
        found['detection'] = benchmark('detection', *how)
        found['detection_training'] = benchmark('detection', '--train', *how)
    accuracy = SMALL_ACCURACY if flags.small else ACCURACY
    found['accuracy'] = benchmark('accuracy', *accuracy, '--workdir', str(flags.out / 'runs'))
    return found


def run(name: str, command: Sequence[str], out: Path) -> bool:
    """Runs a part; returns whether it succeeded. Its table is there then, and else is not."""
    partial, began = out / f'{name}.partial', time.monotonic()
    with open(partial, 'w') as table, open(out / f'{name}.log', 'w') as log:
        table.write(heading(command))
        table.flush()
        process = subprocess.Popen(command, cwd=ROOT, stdout=table, stderr=log)
        try:
            code = process.wait()
        finally:
            if process.poll() is None:  # This process was stopped: the part must not go on alone.
                process.terminate()
                process.wait()
    if code == 0:
        partial.rename(out / f'{name}.md')
    result = 'done' if code == 0 else f'failed ({code})'
    print(f'{name}: {result} after {time.monotonic() - began:.0f} s', flush=True)
    return code == 0


def heading(command: Sequence[str]) -> str:
    """Returns how a part's file begins: what was run, and on what."""
    return f'`{shlex.join(command)}` on {", ".join(settings.gpus()) or "a CPU"}\n\n'


def is_done(name: str, command: Sequence[str], out: Path) -> bool:
    """Whether a part's file is there, of the same command and the same GPU."""
    file = out / f'{name}.md'
    return file.exists() and file.read_text().startswith(heading(command))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what has no table yet; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--out', type=Path, required=True, help='directory of the tables')
    parser.add_argument('--small', action='store_true', help='try every part in miniature')
    parser.add_argument('--only', nargs='+', metavar='PART', help='these parts, by name')
    parser.add_argument('--mmdetection-python', help='see benchmarks.detection')
    parser.add_argument('--mmdetection-config', help='see benchmarks.detection')
    parser.add_argument('--mmdetection-setup', help='see benchmarks.detection')
    flags = parser.parse_args(arguments)
    if bool(flags.mmdetection_python) != bool(flags.mmdetection_config):
        parser.error('--mmdetection-python and --mmdetection-config go together')
    if not flags.small and not settings.gpus():
        parser.error('there is no GPU here (nvidia-smi names none); --small tries all on the CPU')
    known = parts(flags)
    wanted = known if flags.only is None else flags.only
    if unknown := [name for name in wanted if name not in known]:
        parser.error(f'no part {unknown[0]!r}; there are {", ".join(known)}')
    flags.out.mkdir(parents=True, exist_ok=True)
    failed = []
    with sigterm_as_exit():
        for name in wanted:
            if is_done(name, known[name], flags.out):
                print(f'{name}: there already', flush=True)
            elif not run(name, known[name], flags.out):
                failed.append(name)
    if failed:
        print(f'failed: {", ".join(failed)}; see {flags.out}/*.log', file=sys.stderr)
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
