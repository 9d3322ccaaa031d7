"""Kernels of 8 bits: how far they are off, and that nothing else changes."""

import jax
import numpy as np
import pytest

from gcnet_jax.inference.quantize import QuantizedKernel, dequantize_kernels, quantize_kernels


@pytest.fixture
def variables():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 3, 4, 6)).astype(np.float32) * 10.0 ** np.arange(-3, 3)
    kernel[..., 2] = 0
    return {
        'params': {
            'conv': {'kernel': kernel.astype(np.float32), 'bias': np.ones(6, np.float32)},
            'classifier': {'kernel': rng.normal(size=(6, 5)).astype(np.float32)},
        },
        'batch_stats': {'norm': {'mean': np.full(6, 0.3, np.float32)}},
    }


def test_each_channel_is_off_by_half_a_step_at_most(variables):
    again = jax.jit(dequantize_kernels)(quantize_kernels(variables))
    for name in ('conv', 'classifier'):
        kernel = variables['params'][name]['kernel']
        step = np.abs(kernel).max(axis=tuple(range(kernel.ndim - 1))) / 127
        error = np.abs(again['params'][name]['kernel'] - kernel)
        assert (error <= 0.5001 * step).all()
        assert error.max() > 0
    assert not np.asarray(again['params']['conv']['kernel'])[..., 2].any()


def test_the_largest_value_of_a_channel_is_kept(variables):
    again = dequantize_kernels(quantize_kernels(variables))
    for name in ('conv', 'classifier'):
        kernel = variables['params'][name]['kernel']
        axes = tuple(range(kernel.ndim - 1))
        largest = np.abs(np.asarray(again['params'][name]['kernel'])).max(axes)
        np.testing.assert_allclose(largest, np.abs(kernel).max(axes), rtol=1e-6)


def test_only_kernels_become_integers(variables):
    quantized = quantize_kernels(variables)
    kernel = quantized['params']['conv']['kernel']
    assert isinstance(kernel, QuantizedKernel)
    assert (kernel.values.dtype, kernel.scale.shape) == (np.int8, (6,))
    assert quantized['params']['conv']['bias'] is variables['params']['conv']['bias']
    assert quantized['batch_stats']['norm']['mean'] is variables['batch_stats']['norm']['mean']
    assert jax.tree.structure(dequantize_kernels(quantized)) == jax.tree.structure(variables)
