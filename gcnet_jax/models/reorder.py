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

from gcnet_jax.context.common import float32_or_wider, masked_softmax
from gcnet_jax.context.global_context import GlobalContext
from gcnet_jax.models.backbone import Features, Map
from gcnet_jax.models.layers import BatchNorm, max_pool
from gcnet_jax.models.resnet import BottleneckBlock, ResNet
from gcnet_jax.ops.convolution import convolve

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
    """A bottleneck that takes all that training needs of conv3's output from its input."""

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
            and all(map(_pools_linearly, context))
            and len(context) <= 1
        ):
            return _add_projected(branch, shortcut, conv3, norm3, context)
        return super()._expand_and_add(branch, shortcut, conv3, norm3, context, train=train)


def _pools_linearly(context: nn.Module) -> bool:
    return isinstance(context, GlobalContext) and (context.pooling, context.fusion) == (
        'attention',
        'add',
    )


def _add_projected(inner, shortcut, conv3, norm3, context):
    kernel = nn.meta.unbox(conv3.get_variable('params', 'kernel'))[0, 0]
    statistics = projected_statistics(inner, kernel.astype(inner.dtype))
    mean, scale, shift = norm3(conv3(inner), train=True, normalize=False, statistics=statistics)
    shift = shift - mean * scale
    kernel = (kernel * scale).astype(inner.dtype)
    if context:
        params = nn.meta.unbox(context[0].variables['params'])
        vector = pool_before_projection(
            inner, kernel, shift, params['pool']['logits']['kernel'][:, 0]
        )
        transform = context[0].transform(vector.shape[-1], parent=None)
        update = transform.apply({'params': params['add']}, vector).astype(shift.dtype)
        shift = (shift + update)[:, None, None]
    branch = convolve(inner, kernel[None, None]).astype(shift.dtype) + shift
    return (branch + shortcut.astype(branch.dtype)).astype(shortcut.dtype)


def projected_statistics(inner, kernel):
    """Mean and variance of `inner @ kernel` over the positions, from the moments of `inner`."""
    wide = float32_or_wider(inner.dtype)
    count = inner.size // inner.shape[-1]
    mean = jnp.mean(inner.astype(wide), axis=(0, 1, 2))
    moments = jax.lax.dot_general(
        inner, inner, (((0, 1, 2), (0, 1, 2)), ((), ())), preferred_element_type=wide
    )
    covariance = moments / count - jnp.outer(mean, mean)
    kernel = kernel.astype(wide)
    with jax.default_matmul_precision('highest'):
        return mean @ kernel, jnp.maximum(0, jnp.sum(kernel * (covariance @ kernel), axis=0))


def pool_before_projection(inner, kernel, shift, weights):
    batch, *spatial, _ = inner.shape
    wide = float32_or_wider(inner.dtype)
    direction = kernel @ weights.astype(inner.dtype)
    logits = jnp.dot(inner, direction, preferred_element_type=wide)
    attention = masked_softmax(logits.reshape(batch, -1), None).reshape(batch, *spatial)
    # Not a product of matrices: the TPU would lay every map out anew for it.
    pooled = jnp.sum(inner.astype(wide) * attention[..., None], axis=(1, 2))
    return (pooled.astype(inner.dtype) @ kernel + shift).astype(inner.dtype)
