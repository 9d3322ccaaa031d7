import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gcnet_jax.models.registry import create_model
from gcnet_jax.tasks.classification import ClassificationEvaluation
from gcnet_jax.training.mesh import batch_shardings, feature_sharding, make_mesh
from gcnet_jax.training.optimizers import make_optimizer
from gcnet_jax.training.steps import (
    jit_evaluation_step,
    jit_train_step,
    make_apply,
    make_evaluation_step,
    make_split,
    make_train_step,
    moving_average,
    place_features,
)

EVERYTHING = {
    'label_smoothing': 0.1,
    'mixup_alpha': 0.4,
    'accumulation_steps': 2,
    'ema_decay': 0.9,
}
SGD = optax.sgd(0.1, momentum=0.9)


def close(actual, expected, tolerance=1e-5):
    """Compares trees of arrays, relative to the largest value of each leaf; returns the worst."""
    worst = 0.0
    for (path, one), two in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        two = np.asarray(two, np.float64)
        bound = tolerance * max(1.0, np.abs(two).max(initial=0))
        np.testing.assert_allclose(one, two, rtol=0, atol=bound, err_msg=str(path))
        worst = max(worst, tolerance * np.abs(np.asarray(one) - two).max(initial=0) / bound)
    return worst


def compiled(model, job, mesh, shardings, optimizer=SGD):
    step = make_train_step(model, optimizer, job.task, job.options, mesh)
    return jit_train_step(step, job.task, mesh, shardings)


@pytest.fixture(scope='module')
def ten_steps(place, put, tiny_model):
    """Runs ten steps on a mesh: the first gradient, all losses, and the moving average."""
    done = {}

    def run(shape, job, make_batch):
        if shape in done:
            return done[shape]
        optimizer = optax.sgd(1e-4, momentum=0.9)
        mesh, shardings, state = place(shape, tiny_model, optimizer, use_ema=True)
        step = compiled(tiny_model, job, mesh, shardings, optimizer)
        losses = []
        for index in range(10):
            state, metrics = step(state, put(make_batch(seed=index), job.places(mesh)))
            losses.append(float(metrics['loss']) / float(metrics['count']))
            if index == 0:  # The momentum after one step is the gradient itself.
                gradient = jax.device_get(optax.tree.get(state.opt_state, 'trace'))
        done[shape] = losses, gradient, jax.device_get(state.ema)
        return done[shape]

    return run


@pytest.mark.parametrize(
    'shape',
    [
        (2, 2, 2),
        *(
            pytest.param(shape, marks=pytest.mark.slow)
            for shape in [(8, 1, 1), (1, 8, 1), (1, 1, 8)]
        ),
    ],
)
def test_any_mesh_gives_one_devices_losses_and_gradients(shape, ten_steps, job, make_batch):
    job = job.changed(**EVERYTHING)
    losses, gradient, average = ten_steps((1, 1, 1), job, make_batch)
    # There is something to compare: ten losses, and a gradient in the attention of the block.
    assert len(set(losses)) == 10
    pool = gradient['stage1_0']['context_after_conv2_0']['pool']
    assert np.abs(pool['logits']['kernel']).max() > 1e-5
    worst = close(ten_steps(shape, job, make_batch), (losses, gradient, average))
    print(f'{shape}: differs from one device by at most {worst:.1e}')


@pytest.mark.parametrize(
    'norm',
    [
        {'kind': 'batch', 'group_size': 4},
        pytest.param({'kind': 'group', 'channel_groups': 4}, marks=pytest.mark.slow),
        pytest.param({'kind': 'frozen'}, marks=pytest.mark.slow),
    ],
)
def test_any_kind_of_norm_gives_the_same_on_any_mesh(norm, place, put, job, make_batch):
    """A group of four images is spread over four devices on the second mesh."""
    options = {'widths': (8,), 'stage_sizes': (1,), 'context': None, 'num_classes': 4}
    model = create_model('gccnn', norm=norm, **options)
    job = job.changed(accumulation_steps=2)
    results = []
    for shape in [(1, 1, 1), (4, 1, 2)]:
        mesh, shardings, state = place(shape, model, SGD)
        step = compiled(model, job, mesh, shardings)
        for seed in range(2):
            state, metrics = step(state, put(make_batch(seed=seed), job.places(mesh)))
        results.append(jax.device_get((state.params, state.batch_stats, metrics)))
    close(results[1], results[0])


@pytest.mark.slow
@pytest.mark.usefixtures('reordered')
def test_a_reordered_network_gives_the_same_on_any_mesh(place, put, job, make_batch):
    context = {'block': 'global_context', 'stages': 1, 'position': 'after_conv3', 'ratio': 1 / 4}
    model = create_model('resnet50', widths=(4,), stage_sizes=(2,), context=context, num_classes=4)
    results = []
    for shape in [(1, 1, 1), (2, 2, 2)]:
        mesh, shardings, state = place(shape, model, SGD)
        step = compiled(model, job, mesh, shardings)
        for seed in range(2):
            state, metrics = step(
                state,
                put(
                    make_batch(image_size=32, seed=seed),
                    job.places(mesh),
                ),
            )
        gradient = optax.tree.get(state.opt_state, 'trace')
        results.append(jax.device_get((gradient, state.batch_stats, metrics)))
    expand = results[0][0]['stage1_1']['context_after_conv3_0']['add']['expand']
    assert np.abs(expand['kernel']).max() > 1e-5
    close(results[1], results[0])


class PlainNet(nn.Module):
    """No batch statistics, so a batch is the sum of its examples."""

    @nn.compact
    def __call__(self, images, *, train):
        features = nn.relu(nn.Conv(8, (3, 3))(images))
        return nn.Dense(4)(features.mean(axis=(1, 2)))

    def outputs(self, images, *, train):
        return {'logits': self(images, train=train)}


@pytest.mark.parametrize('shape', [(1, 1, 1), (4, 1, 2)])
def test_accumulation_gives_the_big_batchs_gradient(shape, place, put, job, make_batch):
    model = PlainNet()
    results = []
    for count in (1, 4):
        job = job.changed(accumulation_steps=count, mixup_alpha=0.5)
        optimizer = optax.sgd(1.0)
        mesh, shardings, state = place(shape, model, optimizer)
        step = compiled(model, job, mesh, shardings, optimizer)
        state, metrics = step(state, put(make_batch(), job.places(mesh)))
        results.append(jax.device_get((state.params, metrics)))
    assert results[0][1]['count'] == 16
    close(results[1], results[0])


def test_micro_batches_are_every_nth_example_on_the_device_where_it_lies(put, job, make_batch):
    mesh = make_mesh(2, 2, 2)
    batch = make_batch()
    placed = put(batch, job.places(mesh))
    split = jax.jit(make_split(job.task, 4, mesh))(placed)
    for name, spec in (
        ('image', PartitionSpec(None, ('data', 'fsdp'), 'spatial')),
        ('label', PartitionSpec(None, ('data', 'fsdp'))),
    ):
        parts = split[name]
        assert parts.sharding.is_equivalent_to(NamedSharding(mesh, spec), parts.ndim)
        for index in range(4):
            np.testing.assert_array_equal(parts[index], batch[name][index::4])


def test_feature_maps_are_placed_where_a_module_returns_them(job):
    class Network(nn.Module):
        def double(self, x):
            return 2 * x

        @nn.compact
        def __call__(self, x, *, train=False):
            x = self.double(self.double(nn.Conv(4, (3, 3), strides=2)(x)))
            return nn.Dense(3)(x.mean(axis=(1, 2)))

        def outputs(self, images, *, train):
            return {'logits': self(images, train=train)}

    mesh, images = make_mesh(2, 1, 4), jnp.ones((4, 16, 8, 3))
    variables = jax.eval_shape(Network().init, jax.random.key(0), images)

    def placed(function, *arguments):
        equations = jax.make_jaxpr(function)(*arguments).eqns
        return [
            e.params['sharding'] for e in equations if e.primitive.name == 'sharding_constraint'
        ]

    with nn.intercept_methods(place_features(mesh)):
        assert placed(Network().apply, variables, images) == [feature_sharding(mesh, 8)]
    # In training, where the height is split.
    for split_mesh, expected in ((mesh, [feature_sharding(mesh, 8)]), (make_mesh(8, 1, 1), [])):
        apply = make_apply(Network(), job.task, job.options, split_mesh)
        assert placed(apply, variables['params'], {}, (images,), jax.random.key(0)) == expected


def test_the_gradient_is_that_of_the_mean_loss(place, put, job, make_batch):
    model, job = PlainNet(), job.changed(label_smoothing=0.2)
    mesh, shardings, state = place((1, 1, 1), model, optax.sgd(0.5))
    batch = make_batch()

    def reference(params):
        images = (
            jnp.asarray(batch['image'], jnp.float32) / 255 - jnp.array(job.task.mean)
        ) / jnp.array(job.task.std)
        logits = model.apply({'params': params}, images, train=True)
        labels = jnp.eye(4)[batch['label']] * 0.8 + 0.2 / 4
        logs = logits - jnp.log(jnp.exp(logits).sum(axis=1, keepdims=True))
        return -(labels * logs).sum() / 16, (logits.argmax(axis=1) == batch['label']).sum()

    params = jax.device_get(state.params)
    (loss, correct), gradient = jax.value_and_grad(reference, has_aux=True)(params)
    step = compiled(model, job, mesh, shardings, optax.sgd(0.5))
    state, metrics = step(state, put(batch, job.places(mesh)))
    close(state.params, jax.tree.map(lambda leaf, g: leaf - 0.5 * g, params, gradient))
    np.testing.assert_allclose(metrics['loss'] / metrics['count'], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics['gradient_norm'], optax.tree.norm(gradient), rtol=1e-5)
    assert 0 < correct < 16
    assert metrics['correct'] == correct
    assert state.step == 1


def test_one_step_of_eight_devices(place, put, small_model, job, make_batch):
    """Batch norm sees all images; evaluation uses the moving average; the old state is donated."""
    job = job.changed(ema_decay=0.5)
    mesh, shardings, state = place((8, 1, 1), small_model, SGD, use_ema=True)
    # A copy: a buffer that numpy looks at is not donated.
    before = jax.device_get(jax.tree.map(jnp.copy, state))
    batch = make_batch()
    step = compiled(small_model, job, mesh, shardings)
    new, _ = step(state, put(batch, job.places(mesh)))

    kernel, bias = before.params['conv']['kernel'].astype(np.float64), before.params['conv']['bias']
    images = (batch['image'] / 255 - job.task.mean) / job.task.std
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    convolved = bias + sum(
        padded[:, row : row + 8, column : column + 8] @ kernel[row, column]
        for row in range(3)
        for column in range(3)
    )
    old = before.batch_stats['norm']
    close(new.batch_stats['norm']['mean'], 0.9 * old['mean'] + 0.1 * convolved.mean(axis=(0, 1, 2)))
    close(new.batch_stats['norm']['var'], 0.9 * old['var'] + 0.1 * convolved.var(axis=(0, 1, 2)))

    after = jax.device_get({'params': new.params, 'batch_stats': new.batch_stats})
    average = jax.tree.map(lambda old, leaf: 0.1 * old + 0.9 * leaf, before.ema, after)
    close(new.evaluation_variables(), average)

    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert jax.tree.map(lambda leaf: leaf.sharding, new.params) == shardings.params


def test_moving_average_forgets_the_start_early_and_slows_down():
    old, new = {'w': jnp.array([1.0, 2.0])}, {'w': jnp.array([3.0, -2.0])}
    for step, decay in [(0, 1 / 10), (10, 11 / 20), (10**6, 0.999)]:
        result = moving_average(old, new, 0.999, jnp.asarray(step))
        expected = decay * np.array([1.0, 2.0]) + (1 - decay) * np.array([3.0, -2.0])
        np.testing.assert_allclose(result['w'], expected, rtol=1e-5)


def test_a_step_that_is_not_finite_changes_no_weight(place, put, small_model, job, make_batch):
    job = job.changed(std=(0.0, 1.0, 1.0))
    mesh, shardings, state = place((2, 2, 1), small_model, SGD, use_ema=True)
    before = jax.device_get(state)
    step = compiled(small_model, job, mesh, shardings)
    state, metrics = step(state, put(make_batch(), job.places(mesh)))
    assert not metrics['finite']
    after = jax.device_get(state)
    assert after.step == 1
    jax.tree.map(np.testing.assert_array_equal, after.replace(step=before.step), before)


def test_a_gradient_that_is_not_finite_changes_no_weight_even_where_the_loss_is(
    place, put, job, make_batch
):
    class Steep(nn.Module):
        @nn.compact
        def __call__(self, images, *, train):
            root = self.param('root', nn.initializers.ones, (4,))
            return jnp.sqrt(0 * root) + jnp.zeros((16, 4))

        def outputs(self, images, *, train):
            return {'logits': self(images, train=train)}

    mesh, _, state = place((1, 1, 1), Steep(), SGD)
    step = jax.jit(make_train_step(Steep(), SGD, job.task, job.options, mesh))
    after, metrics = step(state, put(make_batch(), job.places(mesh)))
    assert np.isfinite(metrics['loss'])
    assert not np.isfinite(metrics['gradient_norm'])
    assert not metrics['finite']
    np.testing.assert_array_equal(after.params['root'], state.params['root'])


def test_randomness_follows_from_key_and_step(place, put, small_model, job, make_batch):
    job = job.changed(erasing_probability=0.9)
    mesh, _, state = place((1, 1, 1), small_model, SGD)
    step = jax.jit(make_train_step(small_model, SGD, job.task, job.options, mesh))
    batch = put(make_batch(), job.places(mesh))
    first = step(state, batch)[1]['loss']
    assert step(state, batch)[1]['loss'] == first
    assert step(state.replace(step=state.step + 1), batch)[1]['loss'] != first
    assert step(state.replace(key=state.key + 1), batch)[1]['loss'] != first


@pytest.mark.parametrize('size', [8, 16, 24])
def test_evaluation_counts_every_example_once(size, place, put, small_model, job, make_batch):
    """Twenty-one examples in padded batches of any size, against numpy over all of them."""
    mesh, shardings, state = place((8, 1, 1), small_model, SGD)
    data = make_batch(21)
    images = (data['image'] / 255 - job.task.mean) / job.task.std
    variables = jax.device_get(state.evaluation_variables())
    logits = np.asarray(
        small_model.apply(variables, jnp.asarray(images, jnp.float32), train=False), np.float64
    )
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = {
        'examples': 21,
        'loss': -logs[np.arange(21), data['label']].mean(),
        'accuracy': (logits.argmax(axis=1) == data['label']).mean(),
        'top5': 1,
    }
    step = make_evaluation_step(small_model, job.task)
    step = jit_evaluation_step(step, job.task, mesh, shardings)
    evaluation = ClassificationEvaluation(4)
    for start in range(0, 21, size):
        rows = {name: value[start : start + size] for name, value in data.items()}
        real = len(rows['label'])
        batch = {
            'image': np.zeros((size, 8, 8, 3), np.uint8),
            'label': np.zeros(size, np.int32),
            'mask': np.arange(size) < real,
        }
        batch['image'][:real], batch['label'][:real] = rows['image'], rows['label']
        where = batch_shardings(mesh, job.task.evaluation_spec())
        evaluation.add(jax.device_get(step(state.evaluation_variables(), put(batch, where))))
    metrics = evaluation.metrics()
    np.testing.assert_allclose(metrics['loss'], expected['loss'], rtol=1e-5)
    assert {**metrics, 'loss': 0} == {**expected, 'loss': 0}


def test_padding_that_is_not_finite_does_not_count(place, put, job, make_batch):
    class Fragile(nn.Module):
        @nn.compact
        def __call__(self, images, *, train):
            return nn.Dense(4)(images.mean(axis=(1, 2))) / (
                images.max(axis=(1, 2, 3))[:, None] > -2
            )

        def outputs(self, images, *, train):
            return {'logits': self(images, train=train)}

    _, _, state = place((1, 1, 1), Fragile(), SGD)
    step = jax.jit(make_evaluation_step(Fragile(), job.task))
    batch = make_batch(8) | {'mask': np.arange(8) < 5}
    batch['image'][5:] = 0
    evaluation = ClassificationEvaluation(4)
    evaluation.add(jax.device_get(step(state.evaluation_variables(), batch)))
    assert np.isfinite(evaluation.metrics()['loss'])
    assert evaluation.metrics()['examples'] == 5


@pytest.mark.parametrize('shape', [(1, 1, 1), (2, 2, 2)])
def test_frozen_modules_stay_bit_for_bit_and_the_rest_is_trained(
    shape, place, put, tiny_model, job, make_batch
):
    """With weight decay, momentum, accumulation and a moving average, on one device and many."""
    job = job.changed(**EVERYTHING, frozen=('stage1*',))
    optimizer = make_optimizer('sgd', 0.1, weight_decay=0.1, frozen=job.options.frozen)
    mesh, shardings, state = place(shape, tiny_model, optimizer, use_ema=True)
    before = jax.device_get(state)
    step = compiled(tiny_model, job, mesh, shardings, optimizer)
    for seed in range(2):
        state, metrics = step(state, put(make_batch(seed=seed), job.places(mesh)))
    after = jax.device_get(state)
    assert metrics['finite']
    assert after.step == 2
    for name in ('params', 'batch_stats'):
        for old, new in (
            (getattr(before, name), getattr(after, name)),
            (before.ema[name], after.ema[name]),
        ):
            jax.tree.map(np.testing.assert_array_equal, old['stage1_0'], new['stage1_0'])
            for one, two in zip(
                jax.tree.leaves(old['stage2_0']), jax.tree.leaves(new['stage2_0']), strict=True
            ):
                # The bias below a softmax has no gradient, and no decay.
                if name == 'batch_stats' or one.ndim > 1:
                    assert not np.array_equal(one, two)
    trained = len(jax.tree.leaves(before.params)) - len(jax.tree.leaves(before.params['stage1_0']))
    assert len(jax.tree.leaves(optax.tree.get(after.opt_state, 'trace'))) == trained


def test_frozen_modules_use_their_running_statistics(place, put, job, make_batch):
    """Only the classifier is trained: the step has evaluation's loss, and its gradient alone."""
    shape = {'widths': (8,), 'stage_sizes': (1,), 'context': None}
    model = create_model('gccnn', num_classes=4, stochastic_depth_rate=0.5, **shape)
    job = job.changed(frozen=('*', '!classifier'))
    optimizer = make_optimizer('sgd', 0.1, frozen=job.options.frozen)
    mesh, shardings, state = place((4, 1, 2), model, optimizer)
    variables = jax.device_get(state.evaluation_variables())
    batch = make_batch()
    images = (batch['image'] / 255 - job.task.mean) / job.task.std

    def loss(classifier):
        params = {**variables['params'], 'classifier': classifier}
        logits = model.apply(
            {**variables, 'params': params}, images.astype(np.float32), train=False
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch['label']).mean()

    expected, gradient = jax.value_and_grad(loss)(variables['params']['classifier'])
    step = compiled(model, job, mesh, shardings, optimizer)
    _, metrics = step(state, put(batch, job.places(mesh)))
    np.testing.assert_allclose(metrics['loss'] / metrics['count'], expected, rtol=1e-5)
    np.testing.assert_allclose(metrics['gradient_norm'], optax.tree.norm(gradient), rtol=1e-4)


def test_frozen_parameters_cost_no_gradient(place, small_model, job, make_batch):
    flops = []
    for frozen in ((), ('conv', 'norm')):
        job = job.changed(frozen=frozen)
        optimizer = make_optimizer('sgd', 0.1, frozen=frozen)
        mesh, shardings, state = place((1, 1, 1), small_model, optimizer)
        step = compiled(small_model, job, mesh, shardings, optimizer)
        flops.append(step.lower(state, make_batch()).compile().cost_analysis()['flops'])
    assert flops[1] < 0.7 * flops[0]


@pytest.mark.parametrize(('shape', 'count'), [((1, 1, 1), 1), ((4, 1, 2), 1), ((2, 2, 1), 4)])
def test_class_weights_are_exact_over_devices_and_micro_batches(
    shape, count, place, put, job, make_batch
):
    """The weighted mean over the whole batch, with smoothed labels, and its gradient."""
    model, weights = PlainNet(), (0.5, 4.0, 0.0, 1.5)
    job = job.changed(class_weights=weights, label_smoothing=0.1, accumulation_steps=count)
    mesh, shardings, state = place(shape, model, SGD)
    params, batch = jax.device_get(state.params), make_batch()
    images = ((batch['image'] / 255 - job.task.mean) / job.task.std).astype(np.float32)
    each = np.asarray(weights, np.float32)[batch['label']]

    def loss(params):
        logits = model.apply({'params': params}, images, train=True)
        labels = optax.smooth_labels(jax.nn.one_hot(batch['label'], 4), 0.1)
        return (each * optax.softmax_cross_entropy(logits, labels)).sum() / each.sum()

    expected, gradient = jax.value_and_grad(loss)(params)
    step = compiled(model, job, mesh, shardings)
    state, metrics = step(state, put(batch, job.places(mesh)))
    close(jax.device_get(optax.tree.get(state.opt_state, 'trace')), gradient)
    np.testing.assert_allclose(metrics['weight'], each.sum(), rtol=1e-6)
    np.testing.assert_allclose(metrics['loss'] / metrics['weight'], expected, rtol=1e-5)
    np.testing.assert_allclose(metrics['count'], 16)


def test_a_batch_without_weight_teaches_nothing(place, put, job, make_batch):
    job = job.changed(class_weights=(0.0, 1.0, 1.0, 1.0))
    mesh, shardings, state = place((1, 1, 1), PlainNet(), SGD)
    before = jax.device_get(state.params)
    step = compiled(PlainNet(), job, mesh, shardings)
    batch = make_batch() | {'label': np.zeros(16, np.int32)}
    state, metrics = step(state, put(batch, job.places(mesh)))
    assert metrics['finite']
    assert metrics['loss'] == metrics['weight'] == 0
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), before)
