"""With the real TPU compiler: pip install "jax[tpu]" and `pytest -m tpu_compiler`.

Each plan is made in a process of its own: libtpu reads its environment once.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gcnet_jax.models.mask_rcnn import MASK_CHUNK

pytestmark = pytest.mark.tpu_compiler

ROOT = Path(__file__).parents[2]
SMALL = """
from gcnet_jax.training.config import default_config


def get_config():
    config = default_config()
    config.model.widths = (64,)
    config.model.stage_sizes = (1,)
    config.model.dtype = 'bfloat16'
    config.model.context = {
        'block': 'global_context', 'stages': (1,), 'position': 'after_conv2', 'ratio': 0.5
    }
    config.data.image_size = 16
    config.data.augmentation = 'none'
    config.data.flip = False
    config.training.batch_size = 64
    return config
"""


@pytest.fixture
def plan(tmp_path):
    (tmp_path / 'small.py').write_text(SMALL)

    def run(*arguments):
        command = [sys.executable, '-m', 'gcnet_jax', 'plan', '--config', tmp_path / 'small.py']
        # The command itself sees to it that jax does not look for a TPU.
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ('JAX_PLATFORMS', 'XLA_FLAGS')
        }
        return subprocess.run(
            [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
        )

    return run


def test_one_chip_and_four(plan):
    topologies = ['--topology', 'v5e:1x1', '--topology', 'v5e:2x2']
    done = plan(*topologies, '--batch-per-chip', '64', '--json')
    assert done.returncode == 0, done.stderr
    one, four = json.loads(done.stdout)
    assert (one['chips'], four['chips'], four['batch_size']) == (1, 4, 256)
    assert one['fits']
    assert four['fits']
    assert one['collectives'] == {}
    # Gradients of kernels are reduced in the type they are computed in, two bytes; others in four.
    gradients = 4 * four['parameters']
    assert 0.5 * gradients < four['collectives']['all-reduce']['bytes'] <= 1.1 * gradients
    assert four['flops'] == pytest.approx(one['flops'], rel=0.02)
    # Parameters, momentum and statistics in four bytes each, and 64 images.
    state = 2 * 4 * one['parameters']
    assert state < one['arguments'] < 2 * state + 64 * (16 * 16 * 128)
    assert one['hbm_available_bytes'] == four['hbm_available_bytes']
    assert 0 < one['hbm_bytes'] <= 1.1 * one['bytes_accessed']
    assert one['without_context']['flops'] < one['flops']
    assert 'without_context' not in four
    assert one['unknown_loops'] == four['unknown_loops'] == 0
    results = [line for line in done.stderr.splitlines() if 'compiled in' in line]
    assert [line.split(',')[0] for line in results] == ['v5e:1x1', 'v5e:2x2']


def test_parameters_in_parts_and_micro_batches(plan):
    done = plan(
        '--topology', 'v5e:2x2', '--json', '--config.mesh.data=2', '--config.mesh.fsdp=2',
        '--config.training.accumulation_steps=4', '--config.model.widths=(256,)',
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)
    assert found['batch_per_chip'] == 16
    assert found['unknown_loops'] == 0
    assert 'all-gather' in found['collectives']
    # Half of nearly all parameters and momenta.
    assert found['arguments'] < 0.7 * 2 * 4 * found['parameters']


def test_what_does_not_fit(plan):
    done = plan('--topology', 'v5e:1x1', '--batch-per-chip', str(2**18), '--json')
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)
    assert found['fits'] is False
    assert found['hbm_needed_bytes'] > found['hbm_available_bytes']
    assert 'DOES NOT FIT' in done.stderr


def test_what_the_compiler_refuses(plan):
    done = plan('--topology', 'v5e:3x3')
    assert done.returncode == 1
    assert done.stdout == ''
    assert done.stderr.splitlines()[-1].startswith("gcnet_jax plan: topology 'v5e:3x3': ")
    assert 'Traceback' not in done.stderr


DETECTOR = """
import json
from gcnet_jax.planning.chips import prepare_process, topology_devices

prepare_process()
from gcnet_jax.models import create_model
from gcnet_jax.planning.inference import compile_inference

model = create_model(
    'gc_mask_rcnn_resnet50_fpn', num_classes=3, channels=32, box_channels=64,
    stage_sizes=(1, 1, 1, 1), widths=(16, 16, 16, 16), dtype='bfloat16',
)
program = compile_inference(model, topology_devices('v5e:1x1')[0], (2, 64, 96))
print(json.dumps({'memory': program.memory, 'flops': program.flops}))
"""


def test_a_detector_is_one_program():
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ('JAX_PLATFORMS', 'XLA_FLAGS')
    }
    command = [sys.executable, '-c', DETECTOR]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # The four convolutions and the upsampling of the masks that are computed together, alone: the
    # compiler counts the loop over them once.
    masks = 2 * MASK_CHUNK * 14 * 14 * 32 * 32 * (4 * 9 + 4)
    assert 2 * masks < found['flops'] < 20 * masks
    assert 0 < found['memory'] < 200 * 2**20
