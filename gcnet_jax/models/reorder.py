"""A pass for training: the same ResNet with fewer passes over its widest maps.

`model.apply` runs the layers in the order written. On a TPU, memory traffic bounds a training step.
In exact arithmetic three layers can do with less of it:

- A bottleneck's last norm: its statistics are those of a linear map of conv3's input, and follow
  from the input's own mean and covariance. Norm and convolution are then one convolution, whose
  output goes straight into the residual sum; neither direction stores or reads it.
- The global context behind that norm: the pooling is linear too, and takes place in conv3's input,
  which is a quarter as wide.
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

# A covariance costs as much for few positions as for many: below this number of positions for each
# of conv3's input channels, a bottleneck keeps the order written.
POSITIONS_PER_CHANNEL = 16


def reorder(model: nn.Module, platform: str) -> nn.Module:
    """Returns the same network, with the same variables, that moves less memory in training.

    Whatever is no ResNet itself (a subclass, one with inserted blocks, another network), and a
    ResNet whose norms are not one affine map per channel, is returned as it is. Blocks keep their
    order where they drop (stochastic depth), where a batch has few positions, or where the context
    after conv3 is anything but one GlobalContext with attention pooling that is added. Sown values
    are those of the other blocks.

    Args:
      model: Any network.
      platform: That of the devices, 'tpu', 'gpu' or 'cpu'. On a CPU sums bound the step, of which
        the pass has some more, so the model is returned as it is.
    """
    if platform == 'cpu' or type(model) is not ResNet:
        return model
    norm = model.norm(dtype=model.dtype)
    if not isinstance(norm, BatchNorm) or norm.group_size is not None:
        return model
    block = ReorderedBottleneck if model.block is BottleneckBlock else model.block
    fields = [field.name for field in dataclasses.fields(model) if field.name != 'parent']
    return ReorderedResNet(**{name: getattr(model, name) for name in fields} | {'block': block})


class ReorderedResNet(ResNet):
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


class ReorderedBottleneck(BottleneckBlock):
    """A bottleneck that never stores conv3's output in training."""

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
            and branch.size >= POSITIONS_PER_CHANNEL * branch.shape[-1] ** 2
            and len(context) <= 1
            and all(map(_is_linear_when_pooled, context))
        ):
            return _project_and_add(branch, shortcut, conv3, norm3, context)
        return super()._expand_and_add(branch, shortcut, conv3, norm3, context, train=train)


def _is_linear_when_pooled(context: nn.Module) -> bool:
    """Whether a block adds one vector, pooled by attention, to all positions."""
    return isinstance(context, GlobalContext) and (context.pooling, context.fusion) == (
        'attention',
        'add',
    )


def _project_and_add(
    inner: Inner,
    shortcut: Maps,
    conv3: nn.Module,
    norm3: BatchNorm,
    context: Sequence[GlobalContext],
) -> Maps:
    """Returns `z + shortcut` with `z = norm3(conv3(inner))`, plus the context of `z`, if any.

    That is one convolution, whose output takes its shift and the shortcut where it is made. Its
    gradients need `inner` and the sum's gradient, and no map of `z`.
    """
    kernel = nn.meta.unbox(conv3.get_variable('params', 'kernel'))[0, 0]
    # Under jit, conv3's output is not computed: nothing reads it.
    mean, scale, shift = norm3(
        conv3(inner),
        train=True,
        normalize=False,
        statistics=projected_statistics(inner, kernel.astype(inner.dtype)),
    )
    shift = shift - mean * scale
    kernel = (kernel.astype(scale.dtype) * scale[None]).astype(inner.dtype)
    for module in context:
        params = nn.meta.unbox(module.variables['params'])
        vector = pool_projected(inner, kernel, shift, params['pool']['logits']['kernel'][:, 0])
        transform = module.transform(vector.shape[-1], parent=None)
        update = transform.apply({'params': params['add']}, vector).astype(shift.dtype)
        # For each image too, for the gradients' sake: the sums behind that of the shift then have
        # the update's shape, and one pass makes both. The barrier keeps it so.
        shift = jax.lax.optimization_barrier(jnp.broadcast_to(shift[None], update.shape))
        shift = shift + update
    branch = convolve(inner, kernel[None, None]).astype(shift.dtype)
    branch = branch + shift.reshape((-1, 1, 1, shift.shape[-1]))
    return (branch + shortcut.astype(branch.dtype)).astype(shortcut.dtype)


def projected_statistics(
    inner: Inner, kernel: Float[Array, 'inner_channel channel']
) -> tuple[PerChannel, PerChannel]:
    """Returns mean and biased variance of `inner @ kernel` over the positions of all images.

    For a column `k` of the kernel they are `mean . k` and `k . covariance . k` of `inner`.
    """
    wide = float32_or_wider(inner.dtype)
    axes = tuple(range(inner.ndim - 1))
    mean = jnp.mean(inner, axis=axes, dtype=wide)
    products = jax.lax.dot_general(inner, inner, ((axes, axes), ((), ())), None, wide)
    positions = inner.size // inner.shape[-1]
    covariance = products / positions - jnp.outer(mean, mean)
    kernel = kernel.astype(wide)
    with jax.default_matmul_precision('highest'):
        variance = jnp.sum(kernel * (covariance @ kernel), axis=0)
        return mean @ kernel, jnp.maximum(0.0, variance)


def pool_projected(
    inner: Inner,
    kernel: Float[Array, 'inner_channel channel'],
    shift: PerChannel,
    weights: PerChannel,
) -> Float[Array, 'batch channel']:
    """Pools `z = inner @ kernel + shift` by attention, without computing it.

    With `w` the attention's weights, the logits are `inner . (kernel @ w)` up to a constant that
    the softmax removes, and the context is that map of the pooled `inner`, as the attention sums to
    one. In exact arithmetic the result is that of the plain order.

    Args:
      inner: What is projected.
      kernel: The 1x1 convolution with its norm, in the inner type.
      shift: The norm's, in float32.
      weights: `w`.
    """
    batch, *spatial, _ = inner.shape
    wide = float32_or_wider(inner.dtype)
    direction = kernel @ weights.astype(inner.dtype)
    logits = jnp.dot(inner, direction, preferred_element_type=wide)
    attention = masked_softmax(logits.reshape(batch, -1), None).reshape(batch, *spatial)
    # Not a product of matrices: the TPU would lay every map out anew for it.
    pooled = jnp.sum(inner.astype(wide) * attention[..., None], axis=(1, 2))
    return ((pooled.astype(inner.dtype) @ kernel).astype(wide) + shift[None]).astype(inner.dtype)
