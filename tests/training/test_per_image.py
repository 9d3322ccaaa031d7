"""A detector's training on several devices, each of which computes its own images' boxes."""

import re

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gcnet_jax.models import create_model
from gcnet_jax.models.mask_rcnn import MaskRCNN
from gcnet_jax.tasks.detection_losses import detection_losses, total_loss
from gcnet_jax.training.mesh import make_mesh
from gcnet_jax.training.per_image import split_by_image

pytestmark = pytest.mark.usefixtures('quick_compilation')
IMAGES, PLACES = 4, 2


def make_batch():
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 30, (IMAGES, PLACES, 2))
    boxes = np.concatenate([low, low + rng.uniform(10, 30, low.shape)], -1).astype(np.float32)
    labels = rng.integers(-1, 3, (IMAGES, PLACES)).astype(np.int32)
    corners = np.floor(boxes[..., :2])
    return {
        'image': rng.normal(size=(IMAGES, 64, 64, 3)).astype(np.float32),
        'size': np.array([[64, 64], [50, 64], [64, 33], [40, 40]], np.int32),
        'boxes': boxes,
        'labels': labels,
        'masks': rng.integers(0, 2, (IMAGES, PLACES, 32, 32)).astype(np.uint8),
        'mask_boxes': np.concatenate([corners, corners + 32], -1),
    }


@pytest.mark.slow
def test_devices_give_the_loss_and_gradient_of_one(random_variables):
    backbone = create_model('gc_resnet18', num_classes=0, widths=(4, 4, 8, 8), context=None)
    model = MaskRCNN(backbone, num_classes=3, channels=8, box_channels=16)
    batch = make_batch()
    variables = random_variables(model, batch['image'], train=False)

    def compiled(mesh):
        def loss(params, batch):
            with nn.intercept_methods(split_by_image(mesh)):
                outputs = model.apply(
                    {**variables, 'params': params},
                    *(batch['image'], batch),
                    train=False,
                    rngs={'sampling': jax.random.key(0)},
                    method='training_outputs',
                )
            return total_loss(detection_losses(outputs))

        places = (PartitionSpec(), PartitionSpec(('data', 'fsdp')))
        shardings = tuple(NamedSharding(mesh, place) for place in places)
        compute = jax.jit(jax.value_and_grad(loss), in_shardings=shardings)
        return compute.lower(variables['params'], batch).compile()

    one, four = (
        compiled(make_mesh(*shape, 1, devices=jax.devices()[: shape[0] * shape[1]]))
        for shape in ((1, 1), (2, 2))
    )
    (loss, gradient), (other_loss, other_gradient) = (
        compute(variables['params'], batch) for compute in (one, four)
    )
    assert other_loss == pytest.approx(float(loss), rel=1e-5)
    for (path, value), other in zip(
        jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(other_gradient), strict=True
    ):
        np.testing.assert_allclose(
            other, value, atol=1e-4 * np.abs(value).max() + 1e-7, err_msg=str(path)
        )
    # No device gets the maps of another's images: their positions, all levels in one.
    positions = IMAGES * sum((64 // stride) ** 2 for stride in (4, 8, 16, 32))
    gathered = re.findall(r'= \w+\[([\d,]*)\]\S* all-gather\(', four.as_text())
    assert not any(shape.startswith(f'{positions},') for shape in gathered)
