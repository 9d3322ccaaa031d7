"""Convolution in the form that the device it is compiled for does best.

XLA's own convolutions are as good as anything on a TPU or GPU. On a CPU some of them, the grouped
ones and gradients most of all, take several times what the same sums take written another way. The
results agree to rounding.

A convolution is bilinear, and so are its two gradients. Each is a primitive, whose transposes are
the other two:

    output            = convolution(features, kernel)
    features_gradient = convolution transposed by features (gradient, kernel)
    kernel_gradient   = convolution transposed by kernel (features, gradient)
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad
from jaxtyping import Array, Float

from gcnet_jax.ops import convolution_forms
from gcnet_jax.ops.convolution_forms import Features, Kernel, Output
from gcnet_jax.ops.primitives import make_primitive

# Found by measuring ResNet-20, ResNet-50, ResNeXt-50 and the digits' network: the height or width
# below which XLA's 3x3 convolution is slow, the input and output channels up to which it is, and
# the input channels that narrow groups are put together to reach.
TINY = 5
THIN = 16
NARROW_GROUP = 16


def convolve(
    features: Features, kernel: Kernel, stride: int = 1, groups: int = 1, dilation: int = 1
) -> Output:
    """Convolves with PyTorch's padding, `dilation * (size - 1) // 2` on both sides.

    Args:
      features: The input.
      kernel: With `in_channel = channel / groups`, in the features' type.
      stride: Step in both directions; the output is `ceil(size / stride)` high and wide.
      groups: Number of groups that input and output channels are split into.
      dilation: Distance of neighbouring elements of the kernel in the features.
    """
    return convolution.bind(features, kernel, stride=stride, groups=groups, dilation=dilation)


def plain_convolution(
    features: Features, kernel: Kernel, *, stride: int, groups: int, dilation: int
) -> Output:
    """The convolution as XLA has it."""
    padding = dilation * (kernel.shape[0] - 1) // 2
    return jax.lax.conv_general_dilated(
        features,
        kernel,
        window_strides=(stride, stride),
        padding=((padding, padding), (padding, padding)),
        rhs_dilation=(dilation, dilation),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=groups,
    )


def _plain_form(features: Any, kernel: Any, **geometry: int) -> Callable:
    return partial(plain_convolution, **geometry)


def _cpu_form(features: Any, kernel: Any, *, stride: int, groups: int, dilation: int) -> Callable:
    """Returns the form that a CPU does best for arrays of these shapes."""
    if dilation == 1:
        if groups > 1:
            return partial(_split_by_group, stride=stride, groups=groups)
        if kernel.shape[0] == 1:
            return partial(convolution_forms.product, stride=stride)
        if kernel.shape[0] == 3 and min(features.shape[1:3]) < TINY:
            return partial(convolution_forms.window_product, stride=stride)
        columns = 4 if kernel.shape[2] <= 4 else 2
        thin = max(kernel.shape[2:]) <= THIN and features.shape[2] % columns == 0
        if kernel.shape[0] == 3 and stride == 1 and thin:
            return partial(convolution_forms.joined_columns, columns=columns)
    return partial(plain_convolution, stride=stride, groups=groups, dilation=dilation)


def _convolution(form: Callable, features: Features, kernel: Kernel, **geometry: int) -> Output:
    return form(features, kernel, **geometry)(features, kernel)


def _features_gradient(
    form: Callable, gradient: Output, kernel: Kernel, *, size: tuple[int, int], **geometry: int
) -> Features:
    """Transposes the convolution of maps of this height and width."""
    features = _features_of(gradient, kernel, size, geometry['groups'])
    compute = form(features, kernel, **geometry)
    return jax.linear_transpose(lambda values: compute(values, kernel), features)(gradient)[0]


def _features_of(gradient: Output, kernel: Kernel, size: tuple[int, int], groups: int) -> Any:
    shape = (gradient.shape[0], *size, kernel.shape[2] * groups)
    return jax.ShapeDtypeStruct(shape, kernel.dtype)


def _kernel_gradient(
    form: Callable, features: Features, gradient: Output, *, size: int, **geometry: int
) -> Kernel:
    """Transposes the convolution with kernels of this height and width."""
    kernel = _kernel_of(features, gradient, size, geometry['groups'])
    compute = form(features, kernel, **geometry)
    return jax.linear_transpose(lambda values: compute(features, values), kernel)(gradient)[0]


def _kernel_of(features: Features, gradient: Output, size: int, groups: int) -> Any:
    shape = (size, size, features.shape[3] // groups, gradient.shape[3])
    return jax.ShapeDtypeStruct(shape, features.dtype)


def _has_ordered_gradients(compute: partial, groups: int) -> bool:
    """Whether a form is XLA's own, without groups: the ordered gradients are then faster."""
    return compute.func is plain_convolution and groups == 1


def _cpu_features_gradient(
    gradient: Output, kernel: Kernel, *, size: tuple[int, int], **geometry: int
) -> Features:
    features = _features_of(gradient, kernel, size, geometry['groups'])
    compute = _cpu_form(features, kernel, **geometry)
    if compute.func is convolution_forms.joined_columns:
        return compute(gradient, kernel[::-1, ::-1].swapaxes(2, 3))
    if _has_ordered_gradients(compute, geometry['groups']):
        return convolution_forms.ordered_features_gradient(
            gradient, kernel, size, geometry['stride'], geometry['dilation']
        )
    return _features_gradient(_cpu_form, gradient, kernel, size=size, **geometry)


def _cpu_kernel_gradient(
    features: Features, gradient: Output, *, size: int, stride: int, groups: int, dilation: int
) -> Kernel:
    if groups == dilation == size == 1:
        return convolution_forms.product_kernel_gradient(features, gradient, stride)
    if groups == dilation == 1 and size == 3:
        return convolution_forms.window_kernel_gradient(features, gradient, stride)
    geometry = {'stride': stride, 'groups': groups, 'dilation': dilation}
    kernel = _kernel_of(features, gradient, size, groups)
    if _has_ordered_gradients(_cpu_form(features, kernel, **geometry), groups):
        return convolution_forms.ordered_kernel_gradient(features, gradient, size, stride, dilation)
    return _kernel_gradient(_cpu_form, features, gradient, size=size, **geometry)


convolution = make_primitive(
    'convolution',
    partial(_convolution, _plain_form),
    partial(_convolution, _cpu_form),
    batched=(0,),
)
features_gradient = make_primitive(
    'convolution_features_gradient',
    partial(_features_gradient, _plain_form),
    _cpu_features_gradient,
    batched=(0,),
)
kernel_gradient = make_primitive(
    'convolution_kernel_gradient', partial(_kernel_gradient, _plain_form), _cpu_kernel_gradient
)


def _gradient_by_features(gradient, features, kernel, **geometry):
    size = features.aval.shape[1:3]
    return features_gradient.bind(gradient, kernel, size=size, **geometry)


def _gradient_by_kernel(gradient, features, kernel, **geometry):
    size = kernel.aval.shape[0]
    return kernel_gradient.bind(features, gradient, size=size, **geometry)


# Each rule gets the cotangent of the output, then both inputs, of which the one that it is for is
# known by its shape alone.
ad.defbilinear(convolution, _gradient_by_features, _gradient_by_kernel)
ad.defbilinear(
    features_gradient,
    lambda features, gradient, kernel, *, size, **geometry: convolution.bind(
        features, kernel, **geometry
    ),
    lambda features, gradient, kernel, *, size, **geometry: _gradient_by_kernel(
        gradient, features, kernel, **geometry
    ),
)
ad.defbilinear(
    kernel_gradient,
    lambda kernel, features, gradient, *, size, **geometry: _gradient_by_features(
        gradient, features, kernel, **geometry
    ),
    lambda kernel, features, gradient, *, size, **geometry: convolution.bind(
        features, kernel, **geometry
    ),
)


def _split_by_group(features: Features, kernel: Kernel, stride: int, groups: int) -> Output:
    """A grouped convolution: one for each group, or a few narrow groups together.

    For XLA's own the groups are one more dimension, which makes it several times slower, and its
    gradients up to a hundred times.
    """
    channels, outputs = kernel.shape[2], kernel.shape[3] // groups
    if channels == outputs == 1:
        return convolution_forms.depthwise(features, kernel, stride)
    sizes = (size for size in range(1, groups + 1) if groups % size == 0)
    together = next((size for size in sizes if size * channels >= NARROW_GROUP), groups)
    parts = []
    for first in range(0, groups, together):
        inputs, weights = (
            jax.lax.slice_in_dim(array, first * width, (first + together) * width, axis=3)
            for array, width in ((features, channels), (kernel, outputs))
        )
        joined = _block_diagonal(weights, together)
        parts.append(convolve(inputs, joined, stride))
    return jnp.concatenate(parts, axis=3)


def _block_diagonal(
    kernel: Float[Array, 'size size group_channel out_channel'], groups: int
) -> Float[Array, 'size size in_channel out_channel']:
    """The kernel of an ordinary convolution that does what this one does to groups.

    Its zeros make NaN of an infinite value in another group.
    """
    size, _, channels, outputs = kernel.shape
    # Five dimensions, six under `vmap`: of seven, XLA's CPU compiler of jaxlib 0.10.2 makes code
    # that crashes.
    apart = kernel.reshape(size * size, 1, channels, groups, outputs // groups)
    same_group = jnp.eye(groups, dtype=kernel.dtype)[:, None, :, None]
    return (apart * same_group).reshape(size, size, groups * channels, outputs)
