"""The device and the precision that candidates compute with, and the packages that they need."""

import argparse
import contextlib
import dataclasses
import importlib.util
import resource
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

DEVICES = ('cpu', 'gpu')
PRECISIONS = ('float32', 'tf32', 'bfloat16')
# They run our ONNX file, which computes in float32, on the CPU.
RUNTIMES = ('onnxruntime', 'OpenVINO')

_TORCH = (('torch', 'torchvision', 'timm'), 'pip install -r requirements-torch.txt')
# By candidate: the packages that it needs, and what installs them.
NEEDS = {
    'torch': _TORCH,
    'torch eager': _TORCH,
    'torch.compile': _TORCH,
    'onnxruntime': (('jax2onnx', 'onnxruntime'), "pip install '.[onnx]'"),
    'OpenVINO': (
        ('jax2onnx', 'onnxruntime', 'openvino'),
        "pip install '.[onnx]' -r requirements-serving.txt",
    ),
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What candidates compute with.

    Attributes:
      device: 'cpu' or 'gpu', of which the first one is taken.
      precision: 'float32', in which a GPU multiplies in float32 too; 'tf32', in which a GPU rounds
        factors to TF32 and a CPU does as in float32; or 'bfloat16', with weights in float32 where
        they are trained.
    """

    device: str = 'cpu'
    precision: str = 'float32'

    @property
    def dtype(self) -> str:
        """The type that networks compute in."""
        return 'bfloat16' if self.precision == 'bfloat16' else 'float32'

    def start_jax(self) -> None:
        """Makes JAX compute so; call it before JAX does anything else in this process."""
        import jax

        jax.config.update('jax_platforms', {'cpu': 'cpu', 'gpu': 'cuda'}[self.device])
        multiply = {'float32': 'float32', 'tf32': 'tensorfloat32'}
        if self.device == 'gpu' and self.precision in multiply:
            jax.config.update('jax_default_matmul_precision', multiply[self.precision])

    def start_torch(self) -> Any:
        """Makes PyTorch compute so; returns the `torch.device` for networks and images."""
        import torch

        if self.device == 'cpu':
            return torch.device('cpu')
        rounded = self.precision == 'tf32'
        torch.set_float32_matmul_precision('high' if rounded else 'highest')
        torch.backends.cudnn.allow_tf32 = rounded
        torch.backends.cudnn.benchmark = True
        return torch.device('cuda')

    def wait_for_torch(self) -> None:
        """Returns when what PyTorch was asked to compute is done."""
        if self.device == 'gpu':
            import torch

            torch.cuda.synchronize()


def gpus() -> list[str]:
    """Returns the names of the NVIDIA GPUs of this machine, without starting a library on them."""
    query = ['nvidia-smi', '--query-gpu=name', '--format=csv,noheader']
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        printed = subprocess.run(query, check=True, capture_output=True, text=True).stdout
        return [line.strip() for line in printed.splitlines() if line.strip()]
    return []


def peak_bytes() -> int:
    """Returns the most memory that this process held: of the GPU that it computes on, or its own.

    Of a GPU it is what arrays and kernels took, not what a library keeps in reserve.
    """
    torch, jax = sys.modules.get('torch'), sys.modules.get('jax')
    if torch and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    if jax and jax.default_backend() == 'gpu':
        return jax.local_devices()[0].memory_stats()['peak_bytes_in_use']
    # Linux counts in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def add_device_flag(parser: argparse.ArgumentParser) -> None:
    """Adds the flag that `choose_device` reads."""
    parser.add_argument('--device', choices=DEVICES, help='gpu where there is one, if not given')


def choose_device(given: str | None) -> str:
    """Returns the device that was given, or else the GPU if there is one."""
    return given or ('gpu' if gpus() else 'cpu')


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of a setting."""
    add_device_flag(parser)
    parser.add_argument('--precision', choices=PRECISIONS, default='float32')


def read_flags(parser: argparse.ArgumentParser, flags: argparse.Namespace) -> Setting:
    """Returns the setting; ends the program if the candidates cannot run, and says why."""
    setting = Setting(choose_device(flags.device), flags.precision)
    require_packages(parser, flags.candidates)
    runtimes = [name for name in flags.candidates if name in RUNTIMES]
    if runtimes and (setting.device == 'gpu' or setting.dtype != 'float32'):
        parser.error(f'{runtimes[0]} runs with --device cpu --precision float32 only')
    return setting


def require_packages(parser: argparse.ArgumentParser, candidates: Iterable[str]) -> None:
    """Ends the program if a candidate's package is missing, and names it."""
    for candidate in candidates:
        packages, command = NEEDS.get(candidate, ((), ''))
        for package in packages:
            if importlib.util.find_spec(package) is None:
                parser.error(f'{candidate} needs {package}: {command}')
