"""Forms of a convolution and of its gradients that a CPU does better than XLA's own.

Each takes some kernels, strides or sizes only; `gcnet_jax.ops.convolution` chooses among them. The
results agree to rounding.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gcnet_jax.context.common import float32_or_wider

Features = Float[Array, 'batch height width channel']
Kernel = Float[Array, 'size size in_channel out_channel']
Output = Float[Array, 'batch out_height out_width out_channel']

# Found by measuring ResNet-20, ResNet-50 and the digits' network.
WINDOWS_AT_ONCE = 2_048

# JAX's own transposes exchange the dimensions of XLA's convolution. XLA puts them in order for its
# CPU, but not inside loops and branches (jaxlib 0.10.2), where they take forty times as long.


def ordered_features_gradient(
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


def ordered_kernel_gradient(
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


def product(features: Features, kernel: Kernel, stride: int) -> Output:
    """A 1x1 convolution: the product of every position's channels with one matrix."""
    return jax.lax.dot_general(
        features[:, ::stride, ::stride], kernel[0, 0], (((3,), (0,)), ((), ()))
    )


def window_product(features: Features, kernel: Kernel, stride: int) -> Output:
    """A 3x3 convolution: the product of all that a window sees with one matrix.

    Of a map that is hardly larger than the kernel, XLA exchanges the two, which is very slow.
    """
    padded = jnp.pad(features, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = (-(-size // stride) for size in features.shape[1:3])
    seen = [_row_windows(padded, row, stride, height, width) for row in range(3)]
    matrix = kernel.reshape(-1, kernel.shape[-1])
    return jax.lax.dot_general(jnp.concatenate(seen, -1), matrix, (((3,), (0,)), ((), ())))


def joined_columns(features: Features, kernel: Kernel, columns: int) -> Output:
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


def depthwise(features: Features, kernel: Kernel, stride: int) -> Output:
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


def window_kernel_gradient(features: Features, gradient: Output, stride: int) -> Kernel:
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
        # Positions are one dimension, as in `product_kernel_gradient`.
        outer = outer.reshape(-1, outputs)
        windows = jnp.concatenate(seen, axis=-1).reshape(len(outer), -1)
        over = (((0,), (0,)), ((), ()))
        return total + jax.lax.dot_general(outer, windows, over, preferred_element_type=dtype)

    start = jnp.zeros((outputs, 9 * channels), dtype)
    total = jax.lax.fori_loop(0, images // at_once, add, start)
    total = total.reshape(outputs, 3, 3, channels)
    return total.transpose(1, 2, 3, 0).astype(features.dtype)


def product_kernel_gradient(features: Features, gradient: Output, stride: int) -> Kernel:
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
