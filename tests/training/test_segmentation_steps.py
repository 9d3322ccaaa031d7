"""Training steps of a small segmenter: any mesh and any micro-batches give one device's numbers."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gcnet_jax.models.registry import create_model
from gcnet_jax.tasks import Segmentation
from gcnet_jax.tasks.segmentation import SegmentationEvaluation
from gcnet_jax.training.mesh import batch_shardings, make_mesh, state_shardings, to_global
from gcnet_jax.training.state import TrainState
from gcnet_jax.training.steps import (
    StepOptions,
    jit_evaluation_step,
    jit_train_step,
    make_evaluation_step,
    make_train_step,
)

pytestmark = pytest.mark.usefixtures('quick_compilation')
CLASSES, IGNORED = 4, 255
TASK = Segmentation(CLASSES, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
OPTIONS = {
    'backbone': 'resnet20',
    'widths': (4, 8),
    'stage_sizes': (1, 1),
    'channels': 8,
    'context_ratio': 1 / 2,
    'auxiliary_channels': 4,
    'num_classes': CLASSES,
    'stem': 'small',
    'output_stride': None,
}
# As segmenters are: a stem with pooling, stages that dilate instead of striding.
DILATED = {
    'backbone': 'resnet18',
    'widths': (4, 8, 8, 8),
    'stage_sizes': (1, 1, 1, 1),
    'stem': 'imagenet',
    'output_stride': 8,
}
ONE = (1, 1, 1)


def segmenter(**options):
    return create_model('gc_resnet50_d8_voc', **{**OPTIONS, **options})


@pytest.fixture(scope='module')
def model():
    return segmenter()


@pytest.fixture(scope='module')
def start(random_variables):
    """Variables of a network, drawn once, with a state on a mesh around them."""

    def on(shape, model, optimizer):
        mesh = make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
        images = np.zeros((1, 16, 24, 3), np.float32)
        variables = random_variables(model, images, train=False)
        state = TrainState(
            step=np.zeros((), np.int32),
            key=np.array([1, 2], np.uint32),
            params=variables['params'],
            batch_stats=variables.get('batch_stats', {}),
            opt_state=jax.device_get(optimizer.init(variables['params'])),
            ema=None,
        )
        shardings = state_shardings(state, mesh, smallest=2)
        return mesh, shardings, jax.device_put(jax.tree.map(np.array, state), shardings)

    return on


def make_batch(seed=0, size=16):
    """Images whose labels follow from their colours; some pixels, and one image, do not count."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.repeat(rng.integers(0, CLASSES, (size, 4, 6)), 4, 1), 4, 2)
    images = 30 + 60 * labels[..., None] + rng.integers(-25, 26, (*labels.shape, 3))
    labels[rng.random(labels.shape) < 0.2] = IGNORED
    labels[1] = IGNORED
    return {'image': images.astype(np.uint8), 'label': labels.astype(np.uint8)}


def run(shape, model, start, steps=1, task=TASK, **options):
    """Returns the losses of some steps, the first gradient, and the variables behind them."""
    # So low a rate that rounding does not grow from step to step.
    optimizer = optax.sgd(1e-3, momentum=0.9)
    mesh, shardings, state = start(shape, model, optimizer)
    step = make_train_step(model, optimizer, task, StepOptions(**options), mesh)
    step = jit_train_step(step, task, mesh, shardings)
    places, losses, gradient = batch_shardings(mesh, task.batch_spec()), [], None
    for index in range(steps):
        state, metrics = step(state, to_global(make_batch(index), places))
        assert metrics['finite']
        losses.append(float(metrics['loss']) / float(metrics['weight']))
        if gradient is None:  # The momentum after one step is the gradient itself.
            gradient = jax.device_get(optax.tree.get(state.opt_state, 'trace'))
    return losses, gradient, jax.device_get((state.params, state.batch_stats))


def close(actual, expected, tolerance):
    """Compares trees, relative to the largest value of each leaf."""
    for (path, one), two in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        bound = tolerance * max(np.abs(two).max(initial=0), 1e-3)
        np.testing.assert_allclose(one, two, rtol=0, atol=bound, err_msg=str(path))


@pytest.fixture(scope='module')
def ten_steps(start):
    done = {}

    def of(shape, parts, options):
        key = shape, parts, tuple(options)
        if key not in done:
            model = segmenter(**options)
            done[key] = run(shape, model, start, steps=10, accumulation_steps=parts)
        return done[key]

    return of


@pytest.mark.parametrize(
    ('shape', 'parts', 'options'),
    [
        ((2, 2, 2), 1, {}),
        ((8, 1, 1), 2, {}),
        ((1, 1, 8), 2, {}),
        ((2, 4, 1), 2, DILATED),
        ((2, 1, 4), 2, DILATED),
    ],
)
@pytest.mark.slow
def test_any_mesh_gives_one_devices_losses_gradient_and_ten_steps(shape, parts, options, ten_steps):
    """With dropout, micro-batches, an image without labels, and parameters in shards."""
    losses, gradient, after = ten_steps(ONE, parts, options)
    assert len(set(losses)) == 10
    context = gradient['head']['context']['pool']['logits']['kernel']
    assert np.abs(context).max() > 1e-6
    others = ten_steps(shape, parts, options)
    close(others[1], gradient, 1e-4)
    np.testing.assert_allclose(others[0], losses, rtol=1e-4)
    close(others[2], after, 1e-3)


def reference_loss(model, params, statistics, batch):
    """Cross-entropy by way of gathered log-probabilities, over the labelled pixels."""
    images = (batch['image'] / 255 - np.array(TASK.mean)) / np.array(TASK.std)
    outputs, updated = model.apply(
        {'params': params, 'batch_stats': statistics},
        images.astype(np.float32),
        train=True,
        mutable=['batch_stats'],
        method='outputs',
    )
    labels = batch['label'].reshape(-1)
    rows = np.flatnonzero(labels != IGNORED)

    def mean(logits):
        chosen = jax.nn.log_softmax(logits.reshape(-1, CLASSES))[rows]
        return -jnp.take_along_axis(chosen, labels[rows, None].astype(int), axis=1).mean()

    loss = mean(outputs['logits']) + 0.4 * mean(outputs['auxiliary_logits'])
    return loss, updated['batch_stats']


def test_a_step_is_the_gradient_of_the_loss_over_the_labelled_pixels(start):
    model = segmenter(dropout_rate=0.0)
    losses, gradient, (_, statistics) = run(ONE, model, start)
    _, _, state = start(ONE, model, optax.sgd(0.02))
    state = jax.device_get(state)
    reference = partial(reference_loss, model, statistics=state.batch_stats, batch=make_batch())
    (loss, updated), expected = jax.jit(jax.value_and_grad(reference, has_aux=True))(state.params)
    np.testing.assert_allclose(losses[0], loss, rtol=1e-5)
    close(gradient, expected, 1e-4)
    close(statistics, updated, 1e-5)


@pytest.mark.slow
def test_micro_batches_give_the_whole_batchs_gradient_where_no_norm_mixes_images(start):
    model = segmenter(dropout_rate=0.0, norm={'kind': 'group', 'channel_groups': 2})
    whole, parts = run(ONE, model, start), run(ONE, model, start, accumulation_steps=4)
    np.testing.assert_allclose(parts[0], whole[0], rtol=1e-5)
    close(parts[1], whole[1], 1e-4)


def test_a_frozen_norm_keeps_its_statistics_and_is_evaluations(start):
    model = segmenter(dropout_rate=0.0, norm={'kind': 'frozen'})
    losses, gradient, (_, statistics) = run((2, 2, 2), model, start)
    _, _, state = start(ONE, model, optax.sgd(0.02))
    state = jax.device_get(state)
    jax.tree.map(np.testing.assert_array_equal, statistics, state.batch_stats)

    def loss(params):
        batch = TASK.prepare(make_batch(), None)
        variables = {'params': params, 'batch_stats': state.batch_stats}
        outputs = model.apply(variables, batch['image'], train=False, method='outputs')
        return TASK.loss(outputs, batch)['loss'] / TASK.weight(batch)

    expected = jax.jit(jax.value_and_grad(loss))(state.params)
    np.testing.assert_allclose(losses[0], expected[0], rtol=1e-5)
    close(gradient, expected[1], 1e-4)


@pytest.mark.slow
def test_all_pixels_can_divide_the_loss(start):
    task = dataclasses.replace(TASK, count_ignored=True, auxiliary_weight=0.0)
    model = segmenter(dropout_rate=0.0, auxiliary_channels=0)
    losses, _, _ = run(ONE, model, start, task=dataclasses.replace(TASK, auxiliary_weight=0.0))
    over_all, _, _ = run(ONE, model, start, task=task)
    labels = make_batch()['label']
    assert over_all[0] == pytest.approx(losses[0] * (labels != IGNORED).mean(), rel=1e-5)


@pytest.mark.parametrize('shape', [ONE, (2, 2, 2)])
def test_evaluation_counts_the_pixels_of_every_image_once(shape, model, start):
    mesh, shardings, state = start(shape, model, optax.sgd(0.1))
    batch = make_batch() | {
        'mask': np.arange(16) < 5,
        'size': np.tile(np.array([[12, 20]], np.int32), (16, 1)),
    }
    batch['label'][:, 12:], batch['label'][:, :, 20:] = IGNORED, IGNORED
    step = make_evaluation_step(model, TASK)
    step = jit_evaluation_step(step, TASK, mesh, shardings)
    places = batch_shardings(mesh, TASK.evaluation_spec())
    evaluation = SegmentationEvaluation(CLASSES)
    evaluation.add(jax.device_get(step(state.evaluation_variables(), to_global(batch, places))))

    images = (batch['image'] / 255 - np.array(TASK.mean)) / np.array(TASK.std)
    images[:, 12:], images[:, :, 20:] = 0, 0
    variables = jax.device_get(state.evaluation_variables())
    answer = jax.jit(partial(model.apply, train=False))
    logits = np.asarray(answer(variables, images.astype(np.float32)))
    labels = batch['label'][:5]
    counted = labels != IGNORED
    matrix = np.zeros((CLASSES, CLASSES), int)
    np.add.at(matrix, (labels[counted], logits[:5].argmax(-1)[counted]), 1)
    assert np.abs(evaluation.confusion - matrix).sum() <= 4  # Where two logits are equal.
    assert evaluation.examples == 5
    log = logits[:5] - np.log(np.exp(logits[:5]).sum(-1, keepdims=True))
    losses = -np.take_along_axis(log, np.minimum(labels, 3)[..., None].astype(int), -1)[..., 0]
    assert evaluation.metrics()['loss'] == pytest.approx(losses[counted].mean(), rel=1e-4)
