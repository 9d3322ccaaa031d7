"""A small config, and plans with round numbers."""

from pathlib import Path

import pytest
from ml_collections import ConfigDict

from gcnet_jax.commands.config_files import load_config
from gcnet_jax.planning.chips import CHIPS
from gcnet_jax.planning.hlo import Collective, Traffic
from gcnet_jax.planning.plan import Plan
from gcnet_jax.planning.program import Program

CONFIGS = Path(__file__).parents[2] / 'configs'


@pytest.fixture(scope='session')
def make_small_config():
    """The digits' config with the smallest network that has a context block, made anew."""

    def make():
        tree = load_config(str(CONFIGS / 'digits.py')).to_dict()
        context = {
            'block': 'global_context',
            'stages': (1,),
            'position': 'after_conv2',
            'ratio': 0.5,
        }
        tree['model'] |= {'widths': (8,), 'stage_sizes': (1,), 'context': context}
        tree['task']['mixup_alpha'] = 0.0
        return ConfigDict(tree)

    return make


@pytest.fixture
def small_config(make_small_config):
    return make_small_config()


@pytest.fixture
def make_program():
    def make(flops=197e12 / 4, hbm_bytes=409_500_000_000, collectives=None, **changes):
        sizes = {'arguments': 5, 'outputs': 4, 'temporaries': 3, 'code': 2, 'aliased': 1}
        sizes = {name: size * 2**30 for name, size in sizes.items()}
        if collectives is None:
            collectives = {'all-reduce': Collective(count=3, bytes=2_500_000)}
        return Program(
            **{
                **sizes,
                'flops': flops,
                'bytes_accessed': 1e12,
                'traffic': Traffic(collectives, hbm_bytes),
                'compile_seconds': 12.3,
                **changes,
            }
        )

    return make


@pytest.fixture
def example_plan(make_program):
    """A quarter of a second for the FLOPs, half a second for the bytes."""
    program = make_program()
    return Plan(
        network='net, 8 pixels, float32',
        topology='v5e:2x2',
        chip=CHIPS['v5e'],
        chips=4,
        batch_size=400,
        parameters=1_000_000,
        program=program,
        needed_bytes=program.memory,
    )
