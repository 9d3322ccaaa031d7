"""The blocks inside a network of Flax NNX, through `flax.nnx.bridge.ToNNX`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gcnet_jax.context import GlobalContext, NonLocal, SimplifiedNonLocal, SqueezeExcite

BLOCKS = [GlobalContext(ratio=0.25), NonLocal(), SimplifiedNonLocal(), SqueezeExcite(ratio=0.25)]


class Network(nnx.Module):
    def __init__(self, block, rngs):
        self.conv = nnx.Conv(3, 16, (3, 3), rngs=rngs)
        block = nnx.bridge.ToNNX(block, rngs=rngs)
        self.context = block.lazy_init(jnp.zeros((1, 8, 8, 16)))

    def __call__(self, images):
        return self.context(self.conv(images)).mean((1, 2))


def mean_square(network, images):
    return (network(images) ** 2).mean()


def pure(state):
    """Its arrays by name, as linen has them."""
    return jax.tree.map(jnp.asarray, nnx.to_pure_dict(state))


@pytest.mark.parametrize('block', BLOCKS, ids=lambda block: type(block).__name__)
def test_a_block_is_a_part_of_an_nnx_network(block):
    network = Network(block, nnx.Rngs(0))
    random = np.random.default_rng(0)
    images = jnp.asarray(random.normal(size=(2, 8, 8, 3)), jnp.float32)
    # Fresh blocks add nothing, so that most gradients would be zero.
    drawn = jax.tree.map(
        lambda leaf: leaf + 0.1 * random.normal(size=leaf.shape).astype(np.float32),
        nnx.state(network.context, nnx.Param),
    )
    nnx.update(network.context, drawn)
    params = pure(nnx.state(network.context, nnx.Param))
    maps = network.conv(images)

    @jax.jit
    def plain(params):
        return block.apply({'params': params}, maps).mean((1, 2))

    expected = plain(params)
    np.testing.assert_allclose(nnx.jit(Network.__call__)(network, images), expected, atol=1e-5)

    found = pure(nnx.jit(nnx.grad(mean_square))(network, images)['context'])
    wanted = jax.jit(jax.grad(lambda params: (plain(params) ** 2).mean()))(params)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted)) > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, wanted)


def test_training_with_nnx_changes_the_block():
    network = Network(BLOCKS[0], nnx.Rngs(0))
    images = jnp.ones((2, 8, 8, 3))
    gradient = nnx.jit(nnx.grad(mean_square))
    before = mean_square(network, images)
    for _ in range(3):
        gradients = gradient(network, images)
        state = nnx.state(network, nnx.Param)
        nnx.update(network, jax.tree.map(lambda leaf, g: leaf - 0.1 * g, state, gradients))
    assert mean_square(network, images) < before
