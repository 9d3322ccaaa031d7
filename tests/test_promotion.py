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
from gcnet_jax.data.on_device import zero_padding
from gcnet_jax.inference.fold import fold_batch_norms, folded_batch_norm
from gcnet_jax.inference.quantize import dequantize_kernels, quantize_kernels
from gcnet_jax.models import create_model
from gcnet_jax.ops.resize import map_resized
from gcnet_jax.tasks import Classification, Detection, MultiLabel, Segmentation
from gcnet_jax.training.state import state_initializer
from gcnet_jax.training.steps import StepOptions, make_evaluation_step, make_train_step
from tests.models.test_layers import SMALL
from tests.training.test_segmentation_steps import OPTIONS as SEGMENTER
from tests.training.tiny_detection import DETECTOR

GC = {'stages': (1,), 'position': 'after_conv3', 'ratio': 0.5}
NETWORKS = SMALL | {'gc_resnet50': SMALL['resnet50'] | {'context': GC}}
PIXELS = (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)

# Its deltas are class-agnostic, its backbone has deformable convolutions.
CASCADE = DETECTOR | {
    'backbone': 'resnext101_32x4d',
    'widths': (8, 8, 8, 8),
    'groups': 2,
    'base_width': 64,
    'context': GC,
}
DETECTORS = {
    'masks': ('mask_rcnn_resnet50_fpn', DETECTOR, 16),
    'boxes alone': ('mask_rcnn_resnet50_fpn', DETECTOR, None),
    'cascade': ('cascade_mask_rcnn_resnext101_dcn_fpn_syncbn', CASCADE, 16),
}
SEGMENTERS = {
    'whole images': {},
    'windows': {'align_corners': True, 'window': 32, 'window_stride': 20},
    'plain head': {'context_ratio': None, 'auxiliary_channels': 0},
}

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
    trace_training_step(name, norm, dtype)


@pytest.mark.usefixtures('reordered')
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('norm', ['batch', 'frozen'])
def test_training_steps_in_the_order_of_a_tpu(norm, dtype):
    trace_training_step('gc_resnet50', norm, dtype)


def trace_training_step(name, norm, dtype):
    options = NETWORKS[name] | {'norm': {'kind': norm}}
    model = create_model(name, num_classes=3, dtype=dtype, dropout_rate=0.1, **options)
    optimizer = optax.sgd(0.1, momentum=0.9)
    initialize = state_initializer(model, optimizer, (32, 32, 3), use_ema=True)
    classification = Classification(
        3,
        *PIXELS,
        label_smoothing=0.1,
        mixup_alpha=0.2,
        cutmix_alpha=1.0,
        erasing_probability=0.2,
        class_weights=(1.0, 2.0, 0.5),
    )
    settings = StepOptions(ema_decay=0.9, accumulation_steps=2)
    state = jax.eval_shape(initialize, jax.random.key(0))
    variables = {'params': state.params, 'batch_stats': state.batch_stats}
    for task in (classification, MultiLabel(3, *PIXELS, erasing_probability=0.2)):
        batch = task.batch_shapes(4, 32, 32)
        step = make_train_step(model, optimizer, task, settings, make_mesh_of_one())
        again, _ = jax.eval_shape(step, state, batch)
        assert dtypes(again) == dtypes(state)
        evaluate = make_evaluation_step(model, task)
        jax.eval_shape(evaluate, variables, batch | {'mask': jax.ShapeDtypeStruct((4,), bool)})


def dtypes(tree):
    return [leaf.dtype for leaf in jax.tree.leaves(tree)]


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


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('kind', DETECTORS)
def test_detectors(kind, dtype):
    name, options, cells = DETECTORS[kind]
    model = create_model(name, dtype=dtype, **options | {'num_classes': 3})
    task = Detection(3, *PIXELS, max_boxes=3, mask_size=cells)
    sizes = jax.ShapeDtypeStruct((2, 2), jnp.int32)
    index = jax.ShapeDtypeStruct((2,), jnp.int32)
    results = trace_steps(
        model, task, (64, 96), {'size': sizes, 'original_size': sizes, 'index': index}
    )
    assert results['boxes'].dtype == results['scores'].dtype == jnp.float32
    assert ('masks' in results) == (cells is not None)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('kind', SEGMENTERS)
def test_segmenters(kind, dtype):
    model = create_model('gc_resnet50_d8_voc', dtype=dtype, **SEGMENTER | SEGMENTERS[kind])
    task = Segmentation(SEGMENTER['num_classes'], *PIXELS)
    given = {
        'label': jax.ShapeDtypeStruct((2, 47, 61), jnp.uint8),
        'size': jax.ShapeDtypeStruct((2, 2), jnp.int32),
    }
    assert trace_steps(model, task, (47, 61), given)['loss'].dtype == jnp.float32


def trace_steps(model, task, size, given):
    """Traces a training step and an evaluation step; returns the shapes of the latter's results.

    Args:
      given: What a batch of evaluation holds for its two images beside pixels and mask.
    """
    optimizer = optax.sgd(0.1, momentum=0.9)
    initialize = state_initializer(model, optimizer, (*size, 3), use_ema=False)
    state = jax.eval_shape(initialize, jax.random.key(0))
    batch = task.batch_shapes(2, *size)
    step = make_train_step(model, optimizer, task, StepOptions(), make_mesh_of_one())
    again, _ = jax.eval_shape(step, state, batch)
    assert dtypes(again) == dtypes(state)
    batch = {'image': batch['image'], 'mask': jax.ShapeDtypeStruct((2,), bool), **given}
    evaluate = make_evaluation_step(model, task)
    return jax.eval_shape(evaluate, state.evaluation_variables(), batch)


@pytest.mark.parametrize('dtype', ['float32', 'int32'])
def test_padding_of_images(dtype):
    """Sizes are float32 where a stored detector pads, int32 in a batch."""
    images = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)
    padded = jax.eval_shape(zero_padding, images, jax.ShapeDtypeStruct((2, 2), dtype))
    assert (padded.shape, padded.dtype) == (images.shape, images.dtype)


@pytest.mark.parametrize('max_values', [2000, 10**6])
def test_maps_resized_by_block(max_values):
    largest = functools.partial(jnp.argmax, axis=-1)
    resize = functools.partial(map_resized, largest, size=(45, 60), max_values=max_values)
    assert jax.eval_shape(resize, jax.ShapeDtypeStruct((2, 6, 8, 4), 'float32')).shape == (
        2,
        45,
        60,
    )
