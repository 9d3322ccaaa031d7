import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

from gcnet_jax.models.registry import create_model
from gcnet_jax.training.statistics import (
    SETTLED_STEPS,
    fresh_statistics,
    have_moving_statistics,
    jit_statistics_step,
    make_statistics_step,
    statistics_batches,
    with_statistics,
)

SGD = optax.sgd(0.1)


def compiled(model, job, mesh, shardings):
    step = make_statistics_step(model, job.task, job.options, mesh)
    return jit_statistics_step(step, job.task, mesh, shardings)


def by_hand(model, variables, job, batches, parts=1):
    """Mean over micro-batches of what the norm's inputs have for mean and variance."""
    found = []
    for batch in batches:
        images = (batch['image'] / 255 - job.task.mean) / job.task.std
        for part in range(parts):
            _, kept = model.apply(
                variables,
                images[part::parts].astype(np.float32),
                train=False,
                capture_intermediates=lambda module, _: module.name == 'conv',
            )
            maps = np.asarray(kept['intermediates']['conv']['__call__'][0], np.float64)
            found.append((maps.mean(axis=(0, 1, 2)), maps.var(axis=(0, 1, 2))))
    return np.mean([mean for mean, _ in found], axis=0), np.mean([var for _, var in found], axis=0)


@pytest.mark.parametrize(('shape', 'parts'), [((1, 1, 1), 1), ((2, 2, 2), 1), ((4, 1, 1), 2)])
def test_statistics_are_the_mean_over_the_batches(
    shape, parts, place, put, small_model, job, make_batch
):
    job = job.changed(accumulation_steps=parts)
    mesh, shardings, state = place(shape, small_model, SGD)
    variables = jax.device_get(state.evaluation_variables())
    step = compiled(small_model, job, mesh, shardings)
    batches = [make_batch(seed=seed) for seed in range(3)]
    placed = [put(batch, job.places(mesh)) for batch in batches]
    found = fresh_statistics(step, state.evaluation_variables(), iter(placed), 3)
    mean, variance = by_hand(small_model, variables, job, batches, parts)
    np.testing.assert_allclose(found['norm']['mean'], mean, atol=1e-5)
    np.testing.assert_allclose(found['norm']['var'], variance, rtol=1e-4)


def test_statistics_of_frozen_modules_are_kept(place, put, job, make_batch):
    model = create_model('gccnn', widths=(8, 8), stage_sizes=(1, 1), num_classes=4, context=None)
    job = job.changed(frozen=('stage1*',))
    mesh, shardings, state = place((2, 2, 2), model, SGD)
    assert have_moving_statistics(state, job.options.frozen)
    assert not have_moving_statistics(state, ('*norm*',))
    before = jax.device_get(state.batch_stats)
    step = compiled(model, job, mesh, shardings)
    batch = put(make_batch(), job.places(mesh))
    found = jax.device_get(fresh_statistics(step, state.evaluation_variables(), iter([batch]), 1))
    jax.tree.map(np.testing.assert_array_equal, found['stage1_0'], before['stage1_0'])
    for old, new in zip(
        jax.tree.leaves(before['stage2_0']), jax.tree.leaves(found['stage2_0']), strict=True
    ):
        assert not np.allclose(old, new)


def test_statistics_that_are_not_finite_are_not_taken(place, put, small_model, job, make_batch):
    job = job.changed(std=(0.0, 1.0, 1.0))
    mesh, shardings, state = place((1, 1, 1), small_model, SGD)
    before = jax.device_get(state.batch_stats)
    step = compiled(small_model, job, mesh, shardings)
    placed = [put(make_batch(), job.places(mesh))] * 2
    found = fresh_statistics(step, state.evaluation_variables(), iter(placed), 2)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), before)


def test_they_are_computed_until_the_averages_have_settled():
    assert statistics_batches(1, 33, 64) == 1
    assert statistics_batches(1, 90, 64) == 2
    assert statistics_batches(SETTLED_STEPS - 1, 10**6, 64) == 16
    assert statistics_batches(SETTLED_STEPS - 1, 10**6, 4096) == 1
    assert statistics_batches(SETTLED_STEPS, 90, 64) == 0


@pytest.mark.parametrize('use_ema', [False, True])
def test_they_replace_those_that_evaluation_uses(use_ema, place, small_model):
    _, _, state = place((1, 1, 1), small_model, SGD, use_ema=use_ema)
    changed = with_statistics(state, 'new')
    assert changed.evaluation_variables()['batch_stats'] == 'new'
    assert changed.evaluation_variables()['params'] is state.evaluation_variables()['params']
    assert changed.params is state.params
    if use_ema:
        assert changed.batch_stats is state.batch_stats


class OwnMomentum(nn.Module):
    """A network whose norm has another momentum than the usual one."""

    @nn.compact
    def __call__(self, images, *, train):
        features = nn.Conv(8, (3, 3), name='conv')(images)
        norm = nn.BatchNorm(use_running_average=not train, momentum=0.6, name='norm')
        return nn.Dense(4, name='classifier')(norm(features).mean(axis=(1, 2)))

    def outputs(self, images, *, train):
        return {'logits': self(images, train=train)}


def test_the_momentum_of_a_norm_may_be_any(place, put, job, make_batch):
    model, batch = OwnMomentum(), make_batch()
    mesh, shardings, state = place((1, 1, 1), model, SGD)
    variables = jax.device_get(state.evaluation_variables())
    step = compiled(model, job, mesh, shardings)
    placed = put(batch, job.places(mesh))
    found = fresh_statistics(step, state.evaluation_variables(), iter([placed]), 1)
    _, variance = by_hand(model, variables, job, [batch])
    np.testing.assert_allclose(found['norm']['var'], variance, rtol=1e-4)
