"""Eight CPU devices for every test, and variables drawn without running a network's own init."""

import os

# The tests compile a lot and compute little: without LLVM's optimisations they take a fifth.
os.environ['XLA_FLAGS'] = ' '.join(
    (
        os.environ.get('XLA_FLAGS', ''),
        '--xla_force_host_platform_device_count=8',
        '--xla_backend_optimization_level=0',
    )
)
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# What one test compiled must not help another; those about the cache turn it on.
os.environ['JAX_ENABLE_COMPILATION_CACHE'] = 'false'

import math

import jax
import numpy as np
import pytest


@pytest.fixture
def float64():
    """JAX computes in float64 for one test; the setting's name that every JAX from 0.7.2 on has."""
    jax.config.update('jax_enable_x64', True)
    yield
    jax.config.update('jax_enable_x64', False)


@pytest.fixture(scope='session')
def random_variables():
    """A function `(model, *inputs, seed=0, **options) -> variables` of numpy arrays.

    Kernels have unit gain, statistics and biases are not trivial, and nothing is zero: what an
    initialisation would hide (a zero kernel, a unit scale) shows. It compiles nothing.
    """

    def draw(model, *inputs, seed=0, **options):
        shapes = jax.eval_shape(
            lambda *values: model.init(jax.random.key(0), *values, **options), *inputs
        )
        shapes = {name: shapes[name] for name in shapes if name in ('params', 'batch_stats')}
        generator = np.random.default_rng(seed)

        def leaf(path, shape):
            name = path[-1].key
            values = generator.normal(size=shape.shape)
            if name == 'kernel':
                values /= math.sqrt(math.prod(shape.shape[:-1]))
            elif name in ('scale', 'var'):
                values = 1 + 0.2 * np.abs(values)
            else:
                values *= 0.2
            return values.astype(shape.dtype)

        return jax.tree_util.tree_map_with_path(leaf, shapes)

    return draw
