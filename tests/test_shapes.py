"""The shapes in the signatures are true: blocks and networks run with every annotation checked.

In a process of its own, because the checks come before the package's own errors.
"""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
from jaxtyping import install_import_hook

with install_import_hook('gcnet_jax', 'beartype.beartype'):
    from gcnet_jax import GlobalContext, NonLocal, SimplifiedNonLocal, SqueezeExcite, create_model
    from gcnet_jax import tasks
    from gcnet_jax.training import steps

import jax
import jax.numpy as jnp

BLOCKS = (
    GlobalContext(fusion='scale_add'),
    GlobalContext(pooling='average'),
    NonLocal(),
    NonLocal(mode='concatenation'),
    SimplifiedNonLocal(),
    SqueezeExcite(),
)
for block in BLOCKS:
    for shape in ((2, 5, 8), (2, 4, 3, 8), (2, 2, 3, 4, 8)):
        for mask in (None, jnp.ones(shape[:-1], bool)):
            jax.eval_shape(block.init, jax.random.key(0), jnp.ones(shape), mask)
for name in ('gc_resnet18', 'nl_resnet50_c4', 'gcresnext26ts', 'gc_efficientnetv2_rw_t'):
    images = jnp.ones((1, 64, 64, 3))
    model = create_model(name, dropout_rate=0.1)
    keys = {'params': jax.random.key(0), 'dropout': jax.random.key(1)}
    jax.eval_shape(lambda images: model.init(keys, images, train=True), images)
for name in ('gc_resnet50', 'gccnn'):
    place = {'block': 'global_context', 'stages': 1, 'ratio': 1 / 4}
    place['position'] = 'after_conv3' if name == 'gc_resnet50' else 'after_conv2'
    model = create_model(name, stage_sizes=(1, 1), widths=(8, 16), context=place)
    images = jnp.ones((2, 16, 16, 3))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))

    def loss(variables, images):
        logits, _ = model.apply(variables, images, train=True, mutable=['batch_stats'])
        return logits.sum()

    jax.eval_shape(jax.grad(loss), variables, images)
detector = create_model(
    'mask_rcnn_resnet50_fpn', backbone='resnet50', stage_sizes=(1, 1, 1, 1), widths=(4, 4, 4, 4),
    deformable_stages=(4,), norm=None, cascade=True, num_classes=2, channels=4, box_channels=4,
)
images, sizes = jnp.zeros((2, 64, 96, 3)), jnp.zeros((2, 2))
variables = jax.eval_shape(lambda: detector.init(jax.random.key(0), images, sizes, train=False))
jax.eval_shape(lambda *given: detector.apply(*given, train=False), variables, images, sizes)
detection = tasks.Detection(2, (0.5,) * 3, (0.2,) * 3, max_boxes=3, mask_size=8)

def detection_sums(variables, batch, key):
    batch = detection.prepare(batch, key)
    outputs = detector.apply(
        variables, *detection.inputs(batch), train=False, rngs={'sampling': key},
        method=detection.training_method,
    )
    return detection.weight(batch), detection.loss(outputs, batch)

def detection_results(variables, batch):
    inputs = detection.evaluation_inputs(detection.prepare(batch, None))
    outputs = detector.apply(variables, *inputs, train=False, method='outputs')
    return detection.results(outputs, batch)

batch = detection.batch_shapes(2, 64, 96)
jax.eval_shape(detection_sums, variables, batch, jax.random.key(0))
size = jnp.full((2, 2), 32)
batch = {'image': batch['image'], 'size': size, 'original_size': size}
batch |= {'index': jnp.arange(2), 'mask': jnp.ones(2, bool)}
jax.eval_shape(detection_results, variables, batch)
for task in (
    tasks.Classification(4, (0.5,) * 3, (0.2,) * 3, mixup_alpha=0.2, class_weights=(1.0,) * 4),
    tasks.MultiLabel(4, (0.5,) * 3, (0.2,) * 3),
):
    batch = task.batch_shapes(4, 8, 8)

    def sums(batch, logits, key):
        batch = task.prepare(batch, key)
        return task.weight(batch), task.loss({'logits': logits}, batch)

    jax.eval_shape(sums, batch, jnp.zeros((4, 4)), jax.random.key(0))
print('checked')
"""


def run(program):
    root = Path(__file__).parent.parent
    environment = os.environ | {'PYTHONPATH': str(root)}
    return subprocess.run(
        [sys.executable, '-c', program], env=environment, capture_output=True, text=True
    )


def test_signatures_are_true():
    result = run(PROGRAM)
    assert result.returncode == 0, result.stderr
    assert result.stdout == 'checked\n'


def test_a_wrong_shape_would_be_seen():
    imports = PROGRAM.split('BLOCKS = (')[0]
    call = 'GlobalContext().init(jax.random.key(0), jnp.zeros((2, 4, 8)), jnp.ones((2, 3), bool))'
    assert 'TypeCheckError' in run(imports + call).stderr
