"""Everything that one training step reads and the next one needs."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int, UInt32

from gcnet_jax.training.mesh import state_shardings


@flax.struct.dataclass
class TrainState:
    """The state of a training run.

    Attributes:
      step: Number of steps done.
      key: The run's random key as raw data; a step's key is this one with the step folded in, so it
        never changes.
      params: Trained parameters, float32.
      batch_stats: Running statistics of the norms; empty if the model has none.
      opt_state: The optimizer's state.
      ema: Moving average {'params', 'batch_stats'}, or None.
    """

    step: Int[Array, '']
    key: UInt32[Array, ' words']
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any

    def evaluation_variables(self) -> dict:
        """Returns the variables that evaluation uses: the moving average where there is one."""
        if self.ema is not None:
            return self.ema
        return {'params': self.params, 'batch_stats': self.batch_stats}


def state_initializer(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, int, int],
    *,
    use_ema: bool,
) -> Callable[[Array], TrainState]:
    """Returns the pure function from a random key to the state at step 0.

    Args:
      model: Takes images [batch, height, width, channel] and `train`.
      optimizer: Its state is made with the parameters.
      image_shape: Height, width and channels.
      use_ema: Whether to hold a moving average.
    """

    def initialize(key: Array) -> TrainState:
        images = jnp.zeros((1, *image_shape), jnp.float32)
        variables = model.init(jax.random.fold_in(key, 0), images, train=False)
        params, batch_stats = variables['params'], variables.get('batch_stats', {})
        # Copies, because donation refuses one buffer in two places.
        copies = jax.tree.map(jnp.copy, {'params': params, 'batch_stats': batch_stats})
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            key=jax.random.key_data(jax.random.fold_in(key, 1)),
            params=params,
            batch_stats=batch_stats,
            opt_state=optimizer.init(params),
            ema=copies if use_ema else None,
        )

    return initialize


def create_state(
    initialize: Callable[[Array], TrainState], seed: int, mesh: Mesh
) -> tuple[TrainState, TrainState]:
    """Makes the state where it will live, so that no device ever holds all of it.

    Returns:
      The state, and the sharding of each of its leaves.
    """
    key = jax.random.key(seed)
    shardings = state_shardings(jax.eval_shape(initialize, key), mesh)
    options = None
    if mesh.devices.flat[0].platform == 'cpu':
        # It runs once: to optimise it takes far longer than that saves.
        options = {'xla_backend_optimization_level': 0}
    draw = jax.jit(initialize, out_shardings=shardings, compiler_options=options)
    return draw(key), shardings
