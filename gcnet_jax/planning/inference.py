"""What one batch costs a network that is trained, on a TPU that is not there."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from gcnet_jax.planning.program import Program, compile_lowered, placed


def compile_inference(
    model: nn.Module, device: Any, shape: tuple[int, int, int], *, precision: str = 'default'
) -> Program:
    """Compiles a network's outputs of a batch for one device.

    Args:
      model: A network for images; `train=False` is given to it.
      device: One of `topology_devices`.
      shape: Number of images, their height and width.
      precision: Of products of float32, as in `jax.default_matmul_precision`.

    Raises:
      OutOfMemory: It does not fit into the chip's memory.
    """
    images = jax.ShapeDtypeStruct((*shape, 3), jnp.float32)
    variables = jax.eval_shape(
        lambda images: model.init(jax.random.key(0), images, train=False), images
    )

    @jax.jit
    def compute(variables: Any, images: jax.Array) -> Any:
        with jax.default_matmul_precision(precision):
            return model.apply(variables, images, train=False)

    inputs = (variables, images)
    sharding = SingleDeviceSharding(device)
    shardings = jax.tree.map(lambda _: sharding, inputs)
    return compile_lowered(compute.lower(*placed(inputs, shardings)))
