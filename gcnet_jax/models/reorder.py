"""A pass for training: the same ResNet with its pooling moved to where the maps are smaller.

`model.apply` runs the layers in the order written. On a TPU, memory traffic bounds a
training step, and two of the paper's poolings read a network's widest maps. In exact arithmetic
both can come earlier, where the maps are a quarter as wide or as large:

- The global context behind a bottleneck's conv3 and norm3: all three are linear in the positions.
- The stem's maximum behind norm and ReLU: neither changes the order of values.

The training step applies the pass, as inference folds norms; parameters are the same.
"""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gcnet_jax.context.common import float32_or_wider, masked_softmax, over_positions
from gcnet_jax.context.global_context import GlobalContext
from gcnet_jax.models.backbone import Features, Map
from gcnet_jax.models.layers import BatchNorm, max_pool
from gcnet_jax.models.resnet import BottleneckBlock, ResNet

Maps = Float[Array, 'batch height width channel']
Inner = Float[Array, 'batch height width inner_channel']
PerChannel = Float[Array, ' channel']


def reorder(model: nn.Module) -> nn.Module:
    """Returns the same network, with the same variables, that pools earlier in training.

    Whatever is no ResNet itself (a subclass, one with inserted blocks, another network), and a
    ResNet whose norms are not one affine map per channel, is returned as it is. Blocks keep their
    order where they drop (stochastic depth) or where the context after conv3 is not a single
    GlobalContext with attention pooling that is added. Sown values are those of the other blocks.
    """
    if type(model) is not ResNet:
        return model
    norm = model.norm(dtype=model.dtype)
    if not isinstance(norm, BatchNorm) or norm.group_size is not None:
        return model
    block = PooledFirstBottleneck if model.block is BottleneckBlock else model.block
    fields = [field.name for field in dataclasses.fields(model) if field.name != 'parent']
    return PooledFirstResNet(**{name: getattr(model, name) for name in fields} | {'block': block})


class PooledFirstResNet(ResNet):
    """A ResNet whose stem takes its maximum before norm and ReLU in training.

    They are left with a quarter of the positions, and the gradients need one map of this size, the
    network's largest, and not two.
    """

    def _stem(self, images: Features, *, train: bool) -> tuple[Map | None, Map]:
        if self.stem != 'imagenet' or not train or self.is_initializing():
            return super()._stem(images, train=train)
        # Where the scale is negative the smallest value becomes the largest: such a channel is
        # turned round before the maximum, by way of its kernel.
        gamma = nn.meta.unbox(self.stem_norm.get_variable('params', 'scale'))
        sign = jnp.where(gamma < 0, -1, 1).astype(gamma.dtype)
        kernel = nn.meta.unbox(self.stem_conv.get_variable('params', 'kernel'))
        conv = self.stem_conv.clone(parent=None, name=None)
        kernel = kernel * sign.astype(kernel.dtype)[None, None, None]
        turned = conv.apply({'params': {'kernel': kernel}}, images)
        mean, scale, shift = self.stem_norm(
            turned * sign.astype(turned.dtype)[None, None, None], train=True, normalize=False
        )
        shift = (shift - mean * scale)[None, None, None]
        scale = (scale * sign)[None, None, None]
        dtype = self.stem_norm.dtype or scale.dtype

        def finish(values):
            return nn.relu((values.astype(scale.dtype) * scale + shift).astype(dtype))

        # What is not used, most often the map, is not computed under jit.
        return finish(turned), finish(max_pool(turned))


class PooledFirstBottleneck(BottleneckBlock):
    """A bottleneck whose global context is pooled before conv3 in training."""

    @nn.nowrap
    def _expand_and_add(
        self,
        branch: Inner,
        shortcut: Maps,
        conv3: nn.Module,
        norm3: nn.Module,
        context: Sequence[nn.Module],
        *,
        train: bool,
    ) -> Maps:
        if (
            train
            and self.stochastic_depth_rate == 0
            and not self.is_initializing()
            and len(context) == 1
            and isinstance(context[0], GlobalContext)
            and (context[0].pooling, context[0].fusion) == ('attention', 'add')
        ):
            return _add_pooled_first(branch, shortcut, conv3, norm3, context[0])
        return super()._expand_and_add(branch, shortcut, conv3, norm3, context, train=train)


def _add_pooled_first(
    inner: Inner, shortcut: Maps, conv3: nn.Module, norm3: BatchNorm, context: GlobalContext
) -> Maps:
    """Returns `z + update(z) + shortcut` with `z = norm3(conv3(inner))`, in less memory traffic.

    The context comes from `inner`, a quarter as wide as `z`, and `z` itself is never stored: what
    norm, context and sum do to an element is one affine map for each image and channel. On a TPU
    this takes nearly all of the block's cost away.
    """
    expanded = conv3(inner)
    mean, scale, shift = norm3(expanded, train=True, normalize=False)
    kernel = nn.meta.unbox(conv3.get_variable('params', 'kernel'))[0, 0]
    params = nn.meta.unbox(context.variables['params'])
    vector = pool_before_expansion(
        inner, kernel, expanded, (mean, scale, shift), params['pool']['logits']['kernel'][:, 0]
    )
    transform = context.transform(vector.shape[-1], parent=None)
    update = transform.apply({'params': params['add']}, vector).astype(shift.dtype)
    # For each image and channel both, for the gradients' sake: the sums behind those of scale and
    # shift then have one shape, and one pass makes them both. The barrier keeps it so.
    scale, shift, mean = (jnp.broadcast_to(x[None], update.shape) for x in (scale, shift, mean))
    scale, shift = jax.lax.optimization_barrier((scale, shift + update - mean * scale))
    branch = expanded.astype(scale.dtype) * scale[:, None, None] + shift[:, None, None]
    return (branch + shortcut.astype(branch.dtype)).astype(shortcut.dtype)


def pool_before_expansion(
    inner: Inner,
    kernel: Float[Array, 'inner_channel channel'],
    expanded: Maps,
    norm: tuple[PerChannel, PerChannel, PerChannel],
    weights: PerChannel,
) -> Float[Array, 'batch channel']:
    """Pools `z = (inner @ kernel - mean) * scale + shift` by attention, without computing it.

    With `w` the attention's weights, the logits are `inner . (kernel @ (scale * w))` up to a
    constant that the softmax removes, and the context is that map of the pooled `inner`, as the
    attention sums to one. In exact arithmetic the result is that of the plain order.

    Args:
      inner: What is expanded.
      kernel: The 1x1 convolution.
      expanded: `inner @ kernel`, which is not read: the gradient of what is pooled goes this way.
      norm: Mean, scale and shift in float32.
      weights: `w`.
    """
    kernel = kernel.astype(inner.dtype)
    batch, *spatial, _ = inner.shape
    direction = kernel @ (norm[1] * weights).astype(inner.dtype)
    logits = jnp.dot(inner, direction, preferred_element_type=float32_or_wider(inner.dtype))
    attention = masked_softmax(logits.reshape(batch, -1), None).reshape(batch, *spatial)
    pooled = pooled_product(expanded, inner, kernel, attention)
    mean, scale, shift = (values[None] for values in norm)
    return ((pooled.astype(mean.dtype) - mean) * scale + shift).astype(inner.dtype)


@jax.custom_vjp
def pooled_product(
    product: Maps,
    inner: Inner,
    kernel: Float[Array, 'inner_channel channel'],
    attention: Float[Array, 'batch height width'],
) -> Float[Array, 'batch channel']:
    """Sums `product = inner @ kernel` by weight, and reads only `inner`, in the inner type.

    Its gradient goes to `product` and `attention`: `inner` and `kernel` receive theirs through
    `product`, in the same passes and, for the kernel, in the same sum over devices.
    """
    axes = tuple(range(1, inner.ndim - 1))
    # Not a product of matrices: the TPU would lay every map out anew for it.
    pooled = jnp.sum(inner.astype(attention.dtype) * attention[..., None], axis=axes)
    return pooled.astype(inner.dtype) @ kernel


def _pooled_product_forward(product, inner, kernel, attention):
    return pooled_product(product, inner, kernel, attention), (inner, kernel, attention)


def _pooled_product_backward(residuals, gradient):
    inner, kernel, attention = residuals
    of_pooled = over_positions(gradient @ kernel.T, inner.ndim).astype(attention.dtype)
    of_attention = jnp.sum(inner.astype(attention.dtype) * of_pooled, axis=-1)
    of_product = attention[..., None] * over_positions(gradient.astype(attention.dtype), inner.ndim)
    zeros = jnp.zeros_like(inner), jnp.zeros_like(kernel)
    return of_product.astype(gradient.dtype), *zeros, of_attention


pooled_product.defvjp(_pooled_product_forward, _pooled_product_backward)
