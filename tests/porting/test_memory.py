"""What porting holds in memory, measured in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from gcnet_jax.models import create_model
from gcnet_jax.porting.convert import variable_shapes
from gcnet_jax.porting.names import pair_names
from gcnet_jax.porting.recognise import family_of
from tests.porting.seeded import seeded_tensors

MEGABYTE = 2**20
PROGRAM = """
import resource, sys
from gcnet_jax.porting import port
port(sys.argv[1], sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def peak_of_porting(directory: Path, name: str, library: str) -> tuple[int, int]:
    """(size of the file, peak of the resident memory) in bytes."""
    model = create_model(name)
    targets = variable_shapes(model)
    pairings, _ = pair_names(family_of(model, library), targets)
    shapes = {}
    for pairing in pairings:
        sizes = targets[pairing.ours].shape
        if pairing.leaf.ours == 'params/kernel' and len(sizes) == 4:
            sizes = (sizes[3], sizes[2], sizes[0], sizes[1])
        elif pairing.leaf.ours == 'params/kernel':
            ones = (1, 1) if 'classifier' not in pairing.ours else ()
            sizes = (sizes[1], sizes[0], *ones)
        shapes[pairing.theirs] = sizes
    file = directory / f'{name}.safetensors'
    save_file(seeded_tensors(shapes), file)
    size = file.stat().st_size
    finished = subprocess.run(
        [sys.executable, '-c', PROGRAM, str(file), str(directory / name)],
        env=os.environ | {'PYTHONPATH': str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    file.unlink()
    return size, int(finished.stdout)


@pytest.mark.slow
def test_porting_100_megabytes_takes_less_than_three_times_that(tmp_path):
    small, base = peak_of_porting(tmp_path, 'resnet20', 'torchvision')
    large, peak = peak_of_porting(tmp_path, 'gcresnet50t', 'timm')
    assert large > 95 * MEGABYTE
    times = (peak - base) / (large - small)
    print(f'{large / MEGABYTE:.0f} MB: {(peak - base) / MEGABYTE:.0f} MB more, {times:.2f} times')
    assert times < 3
