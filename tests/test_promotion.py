"""Everything works where JAX is told to raise on implicit promotion of ranks and types.

Such promotion is decided while tracing, so shapes are all that is computed here.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gcnet_jax.context import GlobalContext, NonLocal, SimplifiedNonLocal, SqueezeExcite
from gcnet_jax.inference.fold import fold_batch_norms, folded_batch_norm
from gcnet_jax.inference.quantize import dequantize_kernels, quantize_kernels
from gcnet_jax.models import create_model
from gcnet_jax.tasks import Classification, MultiLabel
from gcnet_jax.training.state import state_initializer
from gcnet_jax.training.steps import StepOptions, make_evaluation_step, make_train_step
from tests.models.test_layers import SMALL

GC = {'stages': (1,), 'position': 'after_conv3', 'ratio': 0.5}
NETWORKS = SMALL | {'gc_resnet50': SMALL['resnet50'] | {'context': GC}}

BLOCKS = {
    'attention, add': GlobalContext(ratio=1 / 2),
    'attention, scale': GlobalContext(ratio=1 / 2, fusion='scale'),
    'average, both': GlobalContext(ratio=1 / 2, pooling='average', fusion='scale_add'),
    **{
        mode: NonLocal(mode=mode)
        for mode in ('gaussian', 'embedded_gaussian', 'dot_product', 'concatenation')
    },
    'simplified': SimplifiedNonLocal(),
    'squeeze_excite': SqueezeExcite(ratio=1 / 2),
}


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_rank_promotion('raise'), jax.numpy_dtype_promotion('strict'):
        yield


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('name', BLOCKS)
@pytest.mark.parametrize('batch', [2, 0])
def test_blocks(name, masked, dtype, batch):
    features = jax.ShapeDtypeStruct((batch, 4, 3, 8), dtype)
    mask = jax.ShapeDtypeStruct((batch, 4, 3), bool) if masked else None

    def compute(features, mask):
        output, _ = BLOCKS[name].init_with_output(jax.random.key(0), features, mask)
        return output.astype(jnp.float32).sum(), output

    _, output = jax.eval_shape(compute, features, mask)
    assert (output.shape, output.dtype) == (features.shape, features.dtype)
    jax.eval_shape(jax.grad(compute, has_aux=True), features, mask)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('norm', ['batch', 'frozen'])
@pytest.mark.parametrize('name', NETWORKS)
def test_training_steps(name, norm, dtype):
    options = NETWORKS[name] | {'norm': {'kind': norm}}
    model = create_model(name, num_classes=3, dtype=dtype, dropout_rate=0.1, **options)
    optimizer = optax.sgd(0.1, momentum=0.9)
    initialize = state_initializer(model, optimizer, (32, 32, 3), use_ema=True)
    pixels = (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)
    classification = Classification(
        3,
        *pixels,
        label_smoothing=0.1,
        mixup_alpha=0.2,
        cutmix_alpha=1.0,
        erasing_probability=0.2,
        class_weights=(1.0, 2.0, 0.5),
    )
    settings = StepOptions(ema_decay=0.9, accumulation_steps=2)
    state = jax.eval_shape(initialize, jax.random.key(0))
    variables = {'params': state.params, 'batch_stats': state.batch_stats}
    for task in (classification, MultiLabel(3, *pixels, erasing_probability=0.2)):
        batch = task.batch_shapes(4, 32, 32)
        step = make_train_step(model, optimizer, task, settings, make_mesh_of_one())
        again, _ = jax.eval_shape(step, state, batch)
        same = jax.tree.map(lambda one, two: one.dtype == two.dtype, again, state)
        assert all(jax.tree.leaves(same))
        evaluate = make_evaluation_step(model, task)
        jax.eval_shape(evaluate, variables, batch | {'mask': jax.ShapeDtypeStruct((4,), bool)})


def make_mesh_of_one():
    from gcnet_jax.training.mesh import make_mesh

    return make_mesh(1, 1, 1, devices=jax.devices()[:1])


@pytest.mark.parametrize('batch', [2, 0])
@pytest.mark.parametrize('name', NETWORKS)
def test_inference_folded_and_with_integer_weights(name, batch, random_variables):
    model = create_model(name, num_classes=3, **NETWORKS[name])
    images = jax.ShapeDtypeStruct((batch, 32, 32, 3), jnp.float32)
    variables = random_variables(model, np.zeros((1, 32, 32, 3), np.float32), train=False)
    folded = quantize_kernels(fold_batch_norms(model, variables, images, train=False))

    def compute(variables, images):
        with folded_batch_norm():
            return model.apply(dequantize_kernels(variables), images, train=False)

    assert jax.eval_shape(compute, folded, images).shape == (batch, 3)
    plain = functools.partial(model.apply, train=False, method='outputs')
    maps = jax.eval_shape(plain, variables, images)
    assert {features.shape[0] for features in maps.values()} == {batch}
