"""The losses of Mask R-CNN and of Cascade Mask R-CNN, as mmdetection 3.3.0 weighs them.

Each term is a mean over what was chosen in the whole batch, whose number is known only after the
choice. So the terms are complete as they are; a sum over images is the mean times their number.
Sums over the batch are global in one jitted program, whatever devices the images live on.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gcnet_jax.context.common import float32_or_wider

# Below these differences a cascade's box losses are quadratic; Mask R-CNN's are linear throughout.
CASCADE_RPN_BETA, CASCADE_BOX_BETA = 1 / 9, 1.0
# Weight of each box head's terms, and of those of its mask head.
STAGE_WEIGHTS = (1.0, 0.5, 0.25)


def detection_losses(outputs: Mapping[str, Array]) -> dict[str, Float[Array, '']]:
    """Returns every term of the loss, float32 and not weighted yet, of a batch.

    Args:
      outputs: Of `MaskRCNN.training_outputs`. More than one box head makes a cascade.

    Returns:
      'rpn_class' and 'rpn_box' of the proposal network; of each stage k 'class_k' (cross-entropy),
      'box_k' and 'mask_k'. `total_loss` sums them up.
    """
    stages = sum(name.startswith('box_logits_') for name in outputs)
    is_cascade = stages > 1
    losses = rpn_losses(outputs, CASCADE_RPN_BETA if is_cascade else 0.0)
    for stage in range(stages):
        terms = box_losses(outputs, stage, CASCADE_BOX_BETA if is_cascade else 0.0)
        terms['mask'] = mask_loss(
            outputs[f'mask_logits_{stage}'],
            outputs[f'mask_targets_{stage}'],
            outputs[f'mask_valid_{stage}'],
        )
        losses |= {f'{name}_{stage}': value for name, value in terms.items()}
    return losses


def total_loss(losses: Mapping[str, Float[Array, '']]) -> Float[Array, '']:
    """Returns the weighted sum of the terms of `detection_losses`: stages count 1, 1/2 and 1/4."""
    total = losses['rpn_class'] + losses['rpn_box']
    for name, value in losses.items():
        stage = name.rpartition('_')[2]
        if stage.isdigit():
            total += STAGE_WEIGHTS[int(stage)] * value
    return total


def loss_sums(outputs: Mapping[str, Array]) -> dict[str, Float[Array, '']]:
    """Returns what a task's `loss` adds up over the parts of a batch, see `gcnet_jax.tasks.Task`.

    All but the counts are means times the number of images, so that the divisor (the task's
    `weight`) is the number of images. In a batch that is computed in parts, each part has means of
    its own, as in mmdetection's accumulation of gradients.

    Args:
      outputs: Of `MaskRCNN.training_outputs`.

    Returns:
      'loss'; its weighted terms 'rpn_class', 'rpn_box', 'class', 'box' and 'mask', each summed over
      the stages; and of the first box head 'positives', the number of chosen boxes of objects,
      'boxes', that of all chosen boxes, and 'correct', of those that got their label.
    """
    losses = detection_losses(outputs)
    images = outputs['rpn_logits'].shape[0]
    terms = {name: losses[name] for name in ('rpn_class', 'rpn_box')}
    for kind in ('class', 'box', 'mask'):
        stages = (losses.get(f'{kind}_{stage}') for stage in range(len(STAGE_WEIGHTS)))
        weighted = zip(STAGE_WEIGHTS, stages, strict=True)
        terms[kind] = sum(weight * value for weight, value in weighted if value is not None)
    terms['loss'] = sum(terms.values())
    valid, answers = outputs['box_valid_0'], jnp.argmax(outputs['box_logits_0'], axis=-1)
    correct = (answers == outputs['box_labels_0']) & valid
    counts = {'positives': outputs['box_positive_0'], 'boxes': valid, 'correct': correct}
    return {name: images * value for name, value in terms.items()} | {
        name: jnp.sum(values.astype(jnp.float32)) for name, values in counts.items()
    }


def rpn_losses(outputs: Mapping[str, Array], beta: float) -> dict[str, Float[Array, '']]:
    """Returns 'rpn_class' and 'rpn_box', both over the number of chosen anchors.

    As in mmdetection an image without an anchor of either kind counts as if it had one of it.
    """
    positive, valid = outputs['rpn_positive'], outputs['rpn_valid']
    counts = [part.sum(axis=1).clip(1) for part in (positive, valid & ~positive)]
    divisor = sum(counts).sum().astype(jnp.float32)
    classes = binary_cross_entropy(outputs['rpn_logits'], positive)
    boxes = smooth_l1(outputs['rpn_deltas'] - outputs['rpn_targets'], beta)
    return {
        'rpn_class': _sum_where(valid, classes) / divisor,
        'rpn_box': _sum_where(positive, boxes.sum(axis=-1)) / divisor,
    }


def box_losses(
    outputs: Mapping[str, Array], stage: int, beta: float
) -> dict[str, Float[Array, '']]:
    """Returns 'class' and 'box' of one box head, both over the number of chosen boxes."""
    logits, deltas, targets, labels, positive, valid = (
        outputs[f'box_{name}_{stage}']
        for name in ('logits', 'deltas', 'targets', 'labels', 'positive', 'valid')
    )
    divisor = valid.sum().clip(1).astype(jnp.float32)
    boxes = smooth_l1(deltas - targets, beta).sum(axis=-1)
    return {
        'class': _sum_where(valid, cross_entropy(logits, labels)) / divisor,
        'box': _sum_where(positive, boxes) / divisor,
    }


def mask_loss(
    logits: Float[Array, 'batch n height width'],
    targets: Bool[Array, 'batch n height width'],
    valid: Bool[Array, 'batch n'],
) -> Float[Array, '']:
    """Returns the mean binary cross-entropy of all cells of all boxes; 0 without a box."""
    cells = logits.shape[2] * logits.shape[3]
    each = binary_cross_entropy(logits, targets).sum(axis=(2, 3))
    return _sum_where(valid, each) / (valid.sum().clip(1) * cells).astype(jnp.float32)


def binary_cross_entropy(
    logits: Float[Array, '*any'], targets: Bool[Array, '*any']
) -> Float[Array, '*any']:
    """Returns the cross-entropy of each logit of the positive class, in float32."""
    logits = logits.astype(float32_or_wider(logits.dtype))
    return jax.nn.softplus(jnp.where(targets, -logits, logits))


def cross_entropy(
    logits: Float[Array, '*any classes'], labels: Int[Array, '*any']
) -> Float[Array, '*any']:
    """Returns the cross-entropy of each label, in float32."""
    logits = jax.nn.log_softmax(logits.astype(float32_or_wider(logits.dtype)))
    return -jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]


def smooth_l1(difference: Float[Array, '*any'], beta: float) -> Float[Array, '*any']:
    """Returns the absolute value, replaced by a parabola below `beta` (Girshick, 1504.08083)."""
    size = jnp.abs(difference)
    if not beta:
        return size
    return jnp.where(size < beta, 0.5 * size**2 / beta, size - 0.5 * beta)


def _sum_where(counts: Bool[Array, '*any'], values: Float[Array, '*any']) -> Float[Array, '']:
    return jnp.sum(jnp.where(counts, values, 0))
