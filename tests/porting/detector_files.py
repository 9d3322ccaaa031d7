"""Files of detectors and segmenters with all names and shapes, but without their many numbers."""

import json
import math
from pathlib import Path

import numpy as np

from tests.porting.crafted import program, tensor, zipped

HALF = 'torch HalfStorage'
GOLDEN = Path(__file__).parent / 'golden'


def shapes_of(case: str, kind: str = 'detector') -> dict[str, tuple[int, ...]]:
    """The names and shapes of the library's own state dict, from a golden file."""
    told = json.loads(np.load(GOLDEN / f'{kind}_{case}.npz')['told'].tobytes())
    return {name: tuple(shape) for name, shape in told['state_dict'].items()}


def write_detector(path: Path, shapes: dict[str, tuple[int, ...]], meta: object = None) -> Path:
    """Writes a file in which every tensor is the start of the same storage: a tenth of the size."""
    size = max(math.prod(shape) for shape in shapes.values())
    state = {name: tensor('0', shape, size=size, kind=HALF) for name, shape in shapes.items()}
    data = {'meta': {'epoch': 12} if meta is None else meta, 'state_dict': state}
    path.write_bytes(zipped(program(data), {'0': np.full(size, 0.5, np.float16).tobytes()}))
    return path
