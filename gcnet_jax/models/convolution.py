"""Convolution and max pooling, each in the form that the device it is compiled for does best.

XLA's own convolutions are as good as anything on a TPU or GPU. On a CPU some of them, the grouped
ones most of all, and the gradient of its pooling, take several times what the same sums take
written another way. Which form is taken is decided at lowering, by the device that is compiled for
and not by the one at hand, so that what is exported or planned for a TPU is the plain one. The
results agree to rounding.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gcnet_jax.context.common import float32_or_wider

Features = Float[Array, 'batch height width channel']
Kernel = Float[Array, 'size size in_channel out_channel']
Output = Float[Array, 'batch out_height out_width out_channel']
Pooled = Float[Array, 'batch half_height half_width channel']

# Found by measuring ResNet-20, ResNet-50, ResNeXt-50 and the digits' network: the height or width
# below which XLA's 3x3 convolution is slow, the input channels up to which its kernel's gradient
# is, the positions that the latter's replacement takes at once, and the input channels that narrow
# groups are put together to reach.
TINY = 5
NARROW = 64
POSITIONS_AT_ONCE = 6_400
NARROW_GROUP = 16

_plain_only = ContextVar('plain_only', default=False)


@contextmanager
def plain_operations() -> Iterator[None]:
    """Under it every platform gets the plain forms, and networks have the order of their text.

    For converters that know no platforms, for forward-mode differentiation (`jax.jvp`), which
    gradients written by hand do not have, and for `nn.intercept_methods` that change what a
    convolution or norm returns in training. It acts while a function is traced.
    """
    token = _plain_only.set(True)
    try:
        yield
    finally:
        _plain_only.reset(token)


def wants_plain_operations() -> bool:
    """Whether `plain_operations` is in force."""
    return _plain_only.get()


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
    if dilation > 1 or wants_plain_operations():
        return plain_convolution(features, kernel, stride, groups, dilation)
    return _convolve(features, kernel, stride, groups)


def max_pool(features: Features) -> Pooled:
    """Maximum over 3x3 windows at stride 2, padded by one on each side."""
    return plain_max_pool(features) if wants_plain_operations() else _max_pool(features)


def plain_convolution(
    features: Features, kernel: Kernel, stride: int, groups: int, dilation: int = 1
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


def plain_max_pool(features: Features) -> Pooled:
    """The maximum as XLA has it."""
    return nn.max_pool(features, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


def _by_platform(cpu: Callable, plain: Callable, *arguments: Any) -> Any:
    return jax.lax.platform_dependent(*arguments, cpu=cpu, default=plain)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(features: Features, kernel: Kernel, stride: int, groups: int) -> Output:
    plain = partial(plain_convolution, stride=stride, groups=groups)
    if groups > 1:
        split = partial(_split_by_group, stride=stride, groups=groups)
        return _by_platform(split, plain, features, kernel)
    if kernel.shape[0] > 3:
        return plain(features, kernel)
    if kernel.shape[0] == 1:
        return _by_platform(partial(_product, stride=stride), plain, features, kernel)
    if min(features.shape[1:3]) < TINY:
        return _by_platform(partial(_window_product, stride=stride), plain, features, kernel)
    return plain(features, kernel)


def _convolve_forward(features: Features, kernel: Kernel, stride: int, groups: int):
    return _convolve(features, kernel, stride, groups), (features, kernel)


def _convolve_backward(stride: int, groups: int, inputs: tuple[Features, Kernel], gradient: Array):
    def gradients(form):
        return lambda features, kernel, gradient: jax.vjp(form, features, kernel)[1](gradient)

    def products(features, kernel, gradient):
        by_features = jax.vjp(lambda values: _product(values, kernel, stride), features)[1]
        of_kernel = _sum_of_products(features[:, ::stride, ::stride], gradient)
        return by_features(gradient)[0], of_kernel[None, None].astype(kernel.dtype)

    def narrow(features, kernel, gradient):
        of_kernel = _narrow_kernel_gradient(features, kernel, gradient, stride)
        return plain(features, kernel, gradient)[0], of_kernel

    features, kernel = inputs
    plain = gradients(partial(plain_convolution, stride=stride, groups=groups))
    if groups > 1:
        split = gradients(partial(_split_by_group, stride=stride, groups=groups))
        return _by_platform(split, plain, *inputs, gradient)
    if kernel.shape[0] > 3:
        return plain(*inputs, gradient)
    if kernel.shape[0] == 1:
        return _by_platform(products, plain, *inputs, gradient)
    if min(features.shape[1:3]) < TINY:
        windows = gradients(partial(_window_product, stride=stride))
        return _by_platform(windows, plain, *inputs, gradient)
    if kernel.shape[2] <= NARROW:
        return _by_platform(narrow, plain, *inputs, gradient)
    return plain(*inputs, gradient)


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _product(features: Features, kernel: Kernel, stride: int) -> Output:
    """A 1x1 convolution: the product of every position's channels with one matrix."""
    return jax.lax.dot_general(
        features[:, ::stride, ::stride], kernel[0, 0], (((3,), (0,)), ((), ()))
    )


def _window_product(features: Features, kernel: Kernel, stride: int) -> Output:
    """A 3x3 convolution: the product of all that a window sees with one matrix.

    Of a map that is hardly larger than the kernel, XLA exchanges the two, which is very slow.
    """
    padded = jnp.pad(features, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = (-(-size // stride) for size in features.shape[1:3])
    seen = [_row_windows(padded, row, stride, height, width) for row in range(3)]
    matrix = kernel.reshape(-1, kernel.shape[-1])
    return jax.lax.dot_general(jnp.concatenate(seen, -1), matrix, (((3,), (0,)), ((), ())))


def _split_by_group(features: Features, kernel: Kernel, stride: int, groups: int) -> Output:
    """A grouped convolution: one for each group, or a few narrow groups together.

    For XLA's own the groups are one more dimension, which makes it several times slower, and its
    gradients up to a hundred times.
    """
    channels, outputs = kernel.shape[2], kernel.shape[3] // groups
    if channels == outputs == 1:
        return _depthwise(features, kernel, stride)
    sizes = (size for size in range(1, groups + 1) if groups % size == 0)
    together = next((size for size in sizes if size * channels >= NARROW_GROUP), groups)
    parts = []
    for first in range(0, groups, together):
        inputs, weights = (
            jax.lax.slice_in_dim(array, first * width, (first + together) * width, axis=3)
            for array, width in ((features, channels), (kernel, outputs))
        )
        parts.append(plain_convolution(inputs, _block_diagonal(weights, together), stride, 1))
    return jnp.concatenate(parts, axis=3)


def _block_diagonal(
    kernel: Float[Array, 'size size group_channel out_channel'], groups: int
) -> Float[Array, 'size size in_channel out_channel']:
    """The kernel of an ordinary convolution that does what this one does to groups.

    Its zeros make NaN of an infinite value in another group.
    """
    size, _, channels, outputs = kernel.shape
    apart = kernel.reshape(size, size, 1, channels, groups, outputs // groups)
    same_group = jnp.eye(groups, dtype=kernel.dtype)[:, None, :, None]
    return (apart * same_group).reshape(size, size, groups * channels, outputs)


def _depthwise(features: Features, kernel: Kernel, stride: int) -> Output:
    """A convolution of every channel by itself: a sum over the kernel's places, in one pass."""
    size = kernel.shape[0]
    padding = (size - 1) // 2
    # In float32 from here on, so that the sums of the gradient are too.
    dtype = float32_or_wider(features.dtype)
    around = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    padded = jnp.pad(features.astype(dtype), around)
    height, width = (stride * (-(-edge // stride) - 1) + 1 for edge in features.shape[1:3])
    total = jnp.zeros((), dtype)
    for row in range(size):
        for column in range(size):
            seen = padded[:, row : row + height : stride, column : column + width : stride]
            total += seen * kernel[None, None, row, column].astype(dtype)
    return total.astype(features.dtype)


def _row_windows(
    padded: Features, row: int, stride: int, height: int, width: int
) -> Float[Array, 'batch out_height out_width seen']:
    """Puts side by side the channels of three neighbours in a row, for every output position."""
    rows = padded[:, row : row + stride * (height - 1) + 1 : stride]
    columns = stride * (width - 1) + 1
    return jnp.concatenate(
        [rows[:, :, column : column + columns : stride] for column in range(3)], axis=-1
    )


def _narrow_kernel_gradient(
    features: Features, kernel: Kernel, gradient: Output, stride: int
) -> Kernel:
    """A 3x3 kernel's gradient: the product of what each window saw with the output's gradient.

    XLA makes a convolution of it whose channels are the images, for which both sides are transposed
    and what they were made from is computed anew. The windows take three times the memory, so some
    images are done at a time.
    """
    images, height, width, outputs = gradient.shape
    together = max(1, POSITIONS_AT_ONCE // (height * width))
    while images % together:
        together -= 1
    padded = jnp.pad(features, ((0, 0), (1, 1), (1, 1), (0, 0)))
    parts = [array.reshape(-1, together, *array.shape[1:]) for array in (padded, gradient)]
    dtype = float32_or_wider(kernel.dtype)

    def add(total: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        over = (((0, 1, 2), (0, 1, 2)), ((), ()))
        sums = [
            jax.lax.dot_general(
                part[1],
                _row_windows(part[0], row, stride, height, width),
                over,
                preferred_element_type=dtype,
            )
            for row in range(3)
        ]
        return total + jnp.stack(sums), None

    start = jnp.zeros((3, outputs, 3 * kernel.shape[2]), dtype)
    total, _ = jax.lax.scan(add, start, tuple(parts))
    return total.transpose(0, 2, 1).reshape(kernel.shape).astype(kernel.dtype)


def _sum_of_products(
    left: Float[Array, 'batch height width left_channel'],
    right: Float[Array, 'batch height width right_channel'],
) -> Float[Array, 'left_channel right_channel']:
    """Sums `left[c] * right[d]` over images and positions.

    Positions are flattened first: XLA then reads both as they are. Of maps it writes a transposed
    copy, and computes what they were made from anew for it.
    """
    left, right = (side.reshape(-1, side.shape[-1]) for side in (left, right))
    return jax.lax.dot_general(
        left,
        right,
        (((0,), (0,)), ((), ())),
        preferred_element_type=float32_or_wider(left.dtype),
    )


@jax.custom_vjp
def _max_pool(features: Features) -> Pooled:
    return plain_max_pool(features)


def _max_pool_backward(features: Features, gradient: Pooled) -> tuple[Features]:
    def plain(features, gradient):
        return jax.vjp(plain_max_pool, features)[1](gradient)[0]

    return (_by_platform(_max_pool_gradient, plain, features, gradient),)


_max_pool.defvjp(lambda features: (_max_pool(features), features), _max_pool_backward)


def _max_pool_gradient(features: Features, gradient: Pooled) -> Features:
    """Gives each window's gradient to the first of its maxima, as XLA does.

    The nine places of a window are compared one after the other, for all windows at once; XLA's
    scatter, which goes from window to window, takes about ten times as long.
    """
    height, width = features.shape[1:3]
    out_height, out_width = gradient.shape[1:3]
    lowest = -jnp.inf
    # As large as the windows reach, and one more so that its gradient has the same size.
    edges = [(1, 2 * out - size + 1) for out, size in ((out_height, height), (out_width, width))]
    padded = jnp.pad(features, ((0, 0), *edges, (0, 0)), constant_values=lowest)
    places = [
        padded[:, row : row + 2 * out_height - 1 : 2, column : column + 2 * out_width - 1 : 2]
        for row in range(3)
        for column in range(3)
    ]
    highest, chosen = places[0], jnp.zeros(gradient.shape, jnp.int8)
    for index, place in enumerate(places[1:], start=1):
        chosen = jnp.where(place > highest, jnp.int8(index), chosen)
        highest = jnp.maximum(highest, place)
    total = jnp.zeros_like(padded)
    zero = jnp.zeros((), gradient.dtype)
    for index in range(9):
        # Back to where the place was taken from.
        edges = [(first, 3 - first, 1) for first in divmod(index, 3)]
        share = jnp.where(chosen == index, gradient, zero)
        total += jax.lax.pad(share, zero, [(0, 0, 0), *edges, (0, 0, 0)])
    return total[:, 1 : height + 1, 1 : width + 1]
