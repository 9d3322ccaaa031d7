"""What timm, torchvision and the paper's block computed, against what is computed here.

The golden files hold outputs and names, not weights: see make_golden.py.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from gcnet_jax.context import GlobalContext
from gcnet_jax.models import create_model
from gcnet_jax.porting import to_torch
from gcnet_jax.porting.convert import from_torch
from gcnet_jax.porting.recognise import recognise_block, recognise_family, recognise_model
from tests.porting.seeded import in_memory, seeded_images, seeded_tensors

GOLDEN = Path(__file__).parent / 'golden'
LIBRARIES = {
    'gccnn': 'gccnn',
    'gc_resnet50': 'mmdetection',
    'gcresnext26ts': 'timm',
    'gcresnet33ts': 'timm',
    'gcresnet50t': 'timm',
    'gcresnext50ts': 'timm',
    'gc_efficientnetv2_rw_t': 'timm',
    'resnet18': 'torchvision',
    'resnet50': 'torchvision',
    'resnext50_32x4d': 'torchvision',
}
# In CHECKPOINTS.md: parameters of the published files and of the paper's networks.
PARAMETERS = {
    'gccnn': 1_213_885,
    'gc_resnet50': 28_078_773,
    'gcresnext26ts': 10_476_600,
    'gcresnet33ts': 19_880_698,
    'gcresnet50t': 25_897_080,
    'gcresnext50ts': 15_667_320,
    'gc_efficientnetv2_rw_t': 13_677_713,
    'resnet18': 11_689_512,
    'resnet50': 25_557_032,
    'resnext50_32x4d': 25_028_904,
}


def read_golden(name):
    """(the seeded state dict, the outputs by size)."""
    golden = dict(np.load(GOLDEN / f'{name}.npz'))
    return seeded_tensors(json.loads(golden.pop('state_dict').tobytes())), golden


def quickly(function, *arguments):
    """Compiles for a short compilation: here each network runs once."""
    options = {'xla_backend_optimization_level': 0}
    return jax.jit(function).lower(*arguments).compile(compiler_options=options)(*arguments)


@pytest.fixture(scope='module', params=LIBRARIES)
def ported(request):
    name = request.param
    state, outputs = read_golden(name)
    tensors = in_memory(state)
    family = recognise_family(tensors)
    found, options = recognise_model(tensors.shapes, family)
    assert (family.library, found) == (LIBRARIES[name], name)
    model = create_model(found, **options)
    return name, state, outputs, model, *from_torch(tensors, family, model)


@pytest.mark.parametrize('size', ['97x71', pytest.param('64x64', marks=pytest.mark.slow)])
def test_logits_are_those_of_the_library(ported, size):
    _, _, outputs, model, variables, _ = ported
    images = jnp.asarray(seeded_images(*map(int, size.split('x'))))
    logits = quickly(lambda v, x: model.apply(v, x, train=False), variables, images)
    expected = outputs[size]
    assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()


def test_every_tensor_is_accounted_for(ported):
    name, state, _, _, variables, report = ported
    counters = [key for key in state if key.endswith('num_batches_tracked')]
    assert report.ported == len(state) - len(counters)
    assert [len(names) for names in report.left.values()] == [len(counters)]
    assert not report.initialised
    assert not report.warnings
    assert sum(leaf.size for leaf in jax.tree.leaves(variables['params'])) == PARAMETERS[name]
    assert report.values == sum(state[key].size for key in state if key not in counters)


def test_back_to_the_library_gives_the_same_bytes(ported):
    name, state, _, model, variables, _ = ported
    library = LIBRARIES[name]
    back = to_torch(model, variables, library)
    if library == 'mmdetection':  # a detector's backbone: with its prefix, without a classifier
        assert all(key.startswith('backbone.') for key in back)
        back = {key.removeprefix('backbone.'): value for key, value in back.items()}
        state = {key: value for key, value in state.items() if not key.startswith('fc.')}
    assert set(back) == set(state)
    for key, value in state.items():
        assert (back[key].shape, back[key].dtype) == (value.shape, value.dtype)
        if not key.endswith('num_batches_tracked'):
            assert back[key].tobytes() == value.tobytes(), key


@pytest.mark.parametrize('name', ['add', 'scale', 'scale_add', 'average'])
def test_the_paper_block_alone(name):
    state, outputs = read_golden(f'block_{name}')
    # as mmsegmentation's head holds it, in a segmenter, of which it is asked for alone
    head = {f'decode_head.gc_block.{key}': value for key, value in state.items()}
    head |= {'backbone.stem.0.weight': np.ones(1), 'decode_head.conv_seg.weight': np.ones(1)}
    for names in (state, head):
        tensors = in_memory(names)
        family = recognise_family(tensors, module=GlobalContext)
        assert family.library == 'mmsegmentation'
        block, channels = recognise_block(tensors.shapes, family)
        variables, report = from_torch(tensors, family, block, channels=channels)
        assert report.ported == len(state)
        assert sum(map(len, report.left.values())) == len(names) - len(state)
        for size, expected in outputs.items():
            features = seeded_images(*map(int, size.split('x')), channels=channels)
            result = block.apply(variables, features)
            assert np.abs(result - expected).max() < 1e-5 * np.abs(expected).max()
    back = to_torch(block, variables, 'mmsegmentation')
    assert {k: v.tobytes() for k, v in back.items()} == {
        k: v.tobytes() for k, v in head.items() if 'gc_block' in k
    }
