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

from gcnet_jax.context.common import float32_or_wider
from gcnet_jax.ops.primitives import make_primitive

Features = Float[Array, 'batch height width channel']
Kernel = Float[Array, 'size size in_channel out_channel']
Output = Float[Array, 'batch out_height out_width out_channel']

# Found by measuring ResNet-20, ResNet-50, ResNeXt-50 and the digits' network: the height or width
# below which XLA's 3x3 convolution is slow, the input and output channels up to which it is, the
# windows that its kernel's gradient takes at once, and the input channels that narrow groups are
# put together to reach.
TINY = 5
THIN = 16
WINDOWS_AT_ONCE = 2_048
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
            return partial(_product, stride=stride)
        if kernel.shape[0] == 3 and min(features.shape[1:3]) < TINY:
            return partial(_window_product, stride=stride)
        columns = 4 if kernel.shape[2] <= 4 else 2
        thin = max(kernel.shape[2:]) <= THIN and features.shape[2] % columns == 0
        if kernel.shape[0] == 3 and stride == 1 and thin:
            return partial(_joined_columns, columns=columns)
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
    """Whether a form is XLA's own convolution, without groups; see `_ordered_features_gradient`."""
    return compute.func is plain_convolution and groups == 1


def _cpu_features_gradient(
    gradient: Output, kernel: Kernel, *, size: tuple[int, int], **geometry: int
) -> Features:
    features = _features_of(gradient, kernel, size, geometry['groups'])
    compute = _cpu_form(features, kernel, **geometry)
    if compute.func is _joined_columns:
        return compute(gradient, kernel[::-1, ::-1].swapaxes(2, 3))
    if _has_ordered_gradients(compute, geometry['groups']):
        return _ordered_features_gradient(
            gradient, kernel, size, geometry['stride'], geometry['dilation']
        )
    return _features_gradient(_cpu_form, gradient, kernel, size=size, **geometry)


def _cpu_kernel_gradient(
    features: Features, gradient: Output, *, size: int, stride: int, groups: int, dilation: int
) -> Kernel:
    if groups == dilation == size == 1:
        return _product_kernel_gradient(features, gradient, stride)
    if groups == dilation == 1 and size == 3:
        return _window_kernel_gradient(features, gradient, stride)
    geometry = {'stride': stride, 'groups': groups, 'dilation': dilation}
    kernel = _kernel_of(features, gradient, size, groups)
    if _has_ordered_gradients(_cpu_form(features, kernel, **geometry), groups):
        return _ordered_kernel_gradient(features, gradient, size, stride, dilation)
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


# JAX's own transposes exchange the dimensions of XLA's convolution. XLA puts them in order for its
# CPU, but not inside loops and branches (jaxlib 0.10.2), where they take forty times as long.


def _ordered_features_gradient(
    gradient: Output, kernel: Kernel, size: tuple[int, int], stride: int, dilation: int
) -> Features:
    """A convolution of the gradient, its positions `stride` apart, with the kernel turned round."""
    reach = dilation * (kernel.shape[0] - 1)
    low = reach - reach // 2
    spread = [stride * (out - 1) + 1 for out in gradient.shape[1:3]]
    return jax.lax.conv_general_dilated(
        gradient,
        kernel[::-1, ::-1].swapaxes(2, 3),
        window_strides=(1, 1),
        padding=[(low, side + reach - out - low) for side, out in zip(size, spread, strict=True)],
        lhs_dilation=(stride, stride),
        rhs_dilation=(dilation, dilation),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )


def _ordered_kernel_gradient(
    features: Features, gradient: Output, size: int, stride: int, dilation: int
) -> Kernel:
    """A convolution whose channels are the images, and whose kernel is the gradient."""
    reach = dilation * (size - 1)
    low = reach // 2
    spread = [stride * (out - 1) + 1 for out in gradient.shape[1:3]]
    sides = zip(features.shape[1:3], spread, strict=True)
    return jax.lax.conv_general_dilated(
        features.transpose(3, 1, 2, 0),
        gradient.transpose(1, 2, 0, 3),
        window_strides=(dilation, dilation),
        padding=[(low, reach + out - side - low) for side, out in sides],
        rhs_dilation=(stride, stride),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    ).transpose(1, 2, 0, 3)


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


def _joined_columns(features: Features, kernel: Kernel, columns: int) -> Output:
    """A 3x3 convolution at stride 1 with few channels, neighbouring columns computed as one.

    XLA's multiplies matrices as wide as the output has channels, too few to fill a CPU's registers.
    A kernel that is wider by zeros computes some columns at once: more products, at a higher rate.
    Its zeros make NaN of an infinite value in a column beside the window.
    """
    shifts = [((0, 0), (shift, columns - 1 - shift), (0, 0), (0, 0)) for shift in range(columns)]
    joined = jax.lax.conv_general_dilated(
        features,
        jnp.concatenate([jnp.pad(kernel, shift) for shift in shifts], axis=3),
        window_strides=(1, columns),
        padding=((1, 1), (1, 1)),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )
    return joined.reshape(*features.shape[:3], kernel.shape[3])


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


def _window_kernel_gradient(features: Features, gradient: Output, stride: int) -> Kernel:
    """A 3x3 kernel's gradient: the product of what each window saw with the output's gradient.

    XLA makes a convolution of it whose channels are the images, for which both sides are transposed
    and what they were made from is computed anew. What the windows saw takes nine times the memory
    of the features, so some images are done at a time. All else is done in the loop too, or XLA
    would compute both sides anew for it.
    """
    images, height, width, outputs = gradient.shape
    channels, dtype = features.shape[3], float32_or_wider(features.dtype)
    at_once = max(1, WINDOWS_AT_ONCE // (height * width))
    while images % at_once:
        at_once -= 1
    # The columns from one window to the next are a block; a window sees two or three of them.
    spans = range(-(-3 // stride))
    right = stride * (width + spans[-1]) - features.shape[2] - 1
    around = ((0, 0), (1, 1), (1, right), (0, 0))
    lines = [slice(row, row + stride * (height - 1) + 1, stride) for row in range(3)]

    def add(index: Array, total: Array) -> Array:
        inputs, outer = (
            jax.lax.dynamic_slice_in_dim(array, index * at_once, at_once)
            for array in (features, gradient)
        )
        padded = jnp.pad(inputs, around)
        blocks = padded.reshape(*padded.shape[:2], width + spans[-1], stride * channels)
        seen = [
            blocks[:, rows, span : span + width, : (3 - span * stride) * channels]
            for rows in lines
            for span in spans
        ]
        # Positions are one dimension, as in `_product_kernel_gradient`.
        outer = outer.reshape(-1, outputs)
        windows = jnp.concatenate(seen, axis=-1).reshape(len(outer), -1)
        over = (((0,), (0,)), ((), ()))
        return total + jax.lax.dot_general(outer, windows, over, preferred_element_type=dtype)

    start = jnp.zeros((outputs, 9 * channels), dtype)
    total = jax.lax.fori_loop(0, images // at_once, add, start)
    total = total.reshape(outputs, 3, 3, channels)
    return total.transpose(1, 2, 3, 0).astype(features.dtype)


def _product_kernel_gradient(features: Features, gradient: Output, stride: int) -> Kernel:
    """A 1x1 kernel's gradient: a sum of products over images and positions.

    Positions are flattened first: XLA then reads both as they are. Of maps it writes a transposed
    copy, and computes what they were made from anew for it.
    """
    sides = (features[:, ::stride, ::stride], gradient)
    left, right = (side.reshape(-1, side.shape[-1]) for side in sides)
    total = jax.lax.dot_general(
        left,
        right,
        (((0,), (0,)), ((), ())),
        preferred_element_type=float32_or_wider(left.dtype),
    )
    return total[None, None].astype(features.dtype)
