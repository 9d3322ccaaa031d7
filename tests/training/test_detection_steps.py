"""Training steps of a tiny detector: any mesh gives one device's loss and gradient."""

import functools

import jax
import numpy as np
import optax
import pytest

from gcnet_jax.models.registry import create_model
from gcnet_jax.tasks import Detection
from gcnet_jax.training.mesh import batch_shardings, make_mesh, state_shardings, to_global
from gcnet_jax.training.state import TrainState
from gcnet_jax.training.steps import (
    StepOptions,
    jit_evaluation_step,
    jit_train_step,
    make_evaluation_step,
    make_train_step,
)
from tests.training.tiny_detection import DETECTOR

pytestmark = [pytest.mark.usefixtures('quick_compilation'), pytest.mark.slow]
IMAGES, PLACES, SIDE, CELLS, CLASSES = 8, 3, 64, 16, 3
TASK = Detection(CLASSES, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), PLACES, CELLS)
ONE = (1, 1, 1)
FROZEN = ('backbone/stem*', 'backbone/stage1*')


@pytest.fixture(scope='module')
def model():
    """With frozen norms, as detectors have: rounding then changes no order of the proposals."""
    options = {**DETECTOR, 'num_classes': CLASSES, 'norm': {'kind': 'frozen'}}
    return create_model('mask_rcnn_resnet50_fpn', **options)


@pytest.fixture(scope='module')
def variables(model, random_variables):
    found = random_variables(model, np.zeros((1, SIDE, SIDE, 3), np.float32), train=False)
    logits = found['params']['box_head_0']['logits']
    logits['kernel'] = 20 * logits['kernel']  # So that there are detections.
    return found


def start(shape, variables, optimizer):
    mesh = make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    state = TrainState(
        step=np.zeros((), np.int32),
        key=np.array([1, 2], np.uint32),
        params=variables['params'],
        batch_stats=variables['batch_stats'],
        opt_state=jax.device_get(optimizer.init(variables['params'])),
        ema=None,
    )
    shardings = state_shardings(state, mesh, smallest=2)
    return mesh, shardings, jax.device_put(jax.tree.map(np.array, state), shardings)


def make_batch():
    """Images with up to three objects, one image without any, some of them padded."""
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 20, (IMAGES, PLACES, 2))
    boxes = np.concatenate([low, low + rng.uniform(12, 20, low.shape)], -1).astype(np.float32)
    labels = rng.integers(-1, CLASSES, (IMAGES, PLACES)).astype(np.int32)
    labels[1] = -1
    corners = np.floor(boxes[..., :2])
    return {
        'image': rng.integers(0, 256, (IMAGES, SIDE, SIDE, 3), dtype=np.uint8),
        'size': rng.integers(40, SIDE + 1, (IMAGES, 2)).astype(np.int32),
        'boxes': boxes,
        'labels': labels,
        'masks': rng.integers(0, 2, (IMAGES, PLACES, CELLS, CELLS)).astype(np.uint8),
        'mask_boxes': np.concatenate([corners, corners + CELLS], -1),
    }


def take_step(model, variables, shape, parts=1):
    """Returns the sums of a step, the gradient, and the state behind it."""
    optimizer = optax.sgd(1e-3, momentum=0.9)
    mesh, shardings, state = start(shape, variables, optimizer)
    options = StepOptions(accumulation_steps=parts, frozen=FROZEN)
    step = make_train_step(model, optimizer, TASK, options, mesh)
    step = jit_train_step(step, TASK, mesh, shardings)
    batch = to_global(make_batch(), batch_shardings(mesh, TASK.batch_spec()))
    state, metrics = step(state, batch)
    gradient = jax.device_get(optax.tree.get(state.opt_state, 'trace'))
    return jax.device_get(metrics), gradient, jax.device_get(state)


@pytest.fixture(scope='module')
def one_step(model, variables):
    return functools.cache(functools.partial(take_step, model, variables))


def close(actual, expected, tolerance):
    """Compares trees, relative to the largest value of each leaf."""
    for (path, one), two in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        bound = tolerance * max(np.abs(two).max(initial=0), 1e-3)
        np.testing.assert_allclose(one, two, rtol=0, atol=bound, err_msg=str(path))


@pytest.mark.parametrize('shape', [(8, 1, 1), (2, 4, 1), (2, 2, 2)])
def test_any_mesh_gives_one_devices_sums_and_gradient(shape, one_step):
    sums, gradient, _ = one_step(ONE)
    assert sums['finite']
    assert {'rpn_class', 'rpn_box', 'class', 'box', 'mask', 'positives'} <= sums.keys()
    block = gradient['backbone']['stage3_0']
    (context,) = (part for name, part in block.items() if name.startswith('context'))
    assert np.abs(context['pool']['logits']['kernel']).max() > 1e-6
    others = one_step(shape)
    for name, value in sums.items():
        np.testing.assert_allclose(others[0][name], value, rtol=1e-4, err_msg=name)
    close(others[1], gradient, 1e-4)


def test_norms_of_the_batch_have_the_statistics_of_all_devices_images(variables):
    """The losses behind the proposals are left out: by rounding their order may differ."""
    options = {**DETECTOR, 'num_classes': CLASSES, 'norm': {'kind': 'batch'}}
    model = create_model('mask_rcnn_resnet50_fpn', **options)
    sums, _, state = take_step(model, variables, ONE)
    others = take_step(model, variables, (4, 2, 1))
    for name in ('rpn_class', 'rpn_box'):
        np.testing.assert_allclose(others[0][name], sums[name], rtol=1e-4, err_msg=name)
    close(others[2].batch_stats, state.batch_stats, 1e-4)
    before, after = (
        tree['backbone']['stage2_0']['norm1']
        for tree in (variables['batch_stats'], state.batch_stats)
    )
    assert not np.allclose(before['mean'], after['mean'])


def test_frozen_parts_have_no_gradient_and_stay_as_they_are(one_step, variables):
    _, gradient, state = one_step(ONE)
    for name, leaf in variables['params']['backbone'].items():
        if name.startswith(('stem', 'stage1')):
            assert not any(part.any() for part in jax.tree.leaves(gradient['backbone'][name]))
            jax.tree.map(np.testing.assert_array_equal, state.params['backbone'][name], leaf)
    jax.tree.map(np.testing.assert_array_equal, state.batch_stats, variables['batch_stats'])
    trained = state.params['backbone']['stage2_0']['norm1']['scale']
    assert not np.array_equal(
        trained, variables['params']['backbone']['stage2_0']['norm1']['scale']
    )


def test_micro_batches_give_one_devices_sums_on_several(one_step):
    sums, gradient, _ = one_step(ONE, parts=2)
    others = one_step((2, 2, 1), parts=2)
    np.testing.assert_allclose(others[0]['loss'], sums['loss'], rtol=1e-4)
    close(others[1], gradient, 1e-4)


def test_every_device_evaluates_its_own_images(model, variables):
    batch = make_batch()
    batch = {name: batch[name] for name in ('image', 'size')} | {
        'original_size': 2 * batch['size'],
        'index': np.arange(IMAGES, dtype=np.int32),
        'mask': np.arange(IMAGES) < 5,
    }

    def results(shape):
        mesh, shardings, state = start(shape, variables, optax.sgd(0.1))
        step = make_evaluation_step(model, TASK, mesh)
        step = jit_evaluation_step(step, TASK, mesh, shardings)
        placed = to_global(batch, batch_shardings(mesh, TASK.evaluation_spec()))
        return jax.device_get(step(state.evaluation_variables(), placed))

    one = results(ONE)
    assert one['valid'].any()
    for shape in ((8, 1, 1), (2, 2, 2)):
        others = results(shape)
        for name in ('valid', 'index', 'mask', 'finite'):
            np.testing.assert_array_equal(others[name], one[name], err_msg=name)
        np.testing.assert_allclose(others['scores'], one['scores'], atol=1e-4)
        # Of nearly equal scores either may come first.
        assert (others['labels'] == one['labels']).mean() > 0.98
        assert np.isclose(others['boxes'], one['boxes'], atol=1e-3).mean() > 0.98
