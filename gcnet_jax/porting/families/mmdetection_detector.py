"""mmdetection's Mask R-CNN and Cascade Mask R-CNN, whole: backbone, neck and heads.

The files of GCNet's model zoo that follow mmdetection 2 and later. Its predecessor of 2019 had the
same layers and other rules (the background is class 0, boxes are a pixel wider, RoIAlign samples
elsewhere): those files are refused, though their backbones can be loaded alone.
"""

import re
from typing import Any

from gcnet_jax.errors import CheckpointError
from gcnet_jax.models.mask_rcnn import MaskRCNN
from gcnet_jax.models.registry import list_models, model_entry
from gcnet_jax.porting.families import mmdetection
from gcnet_jax.porting.families.rules import BOOKKEEPING, Family, Rules, Shapes, under

BACKBONE = 'backbone.'
# A cascade has a number in its names there; here all heads have one.
ONE_HEAD, CASCADE_HEAD = ('0', ''), ('{stage}', '{stage}.')


def rules(ours: str, theirs: str) -> Rules:
    """The table of a detector."""
    return (
        *mmdetection.rules(f'{ours}backbone/', f'{theirs}{BACKBONE}'),
        *under(
            f'{ours}neck/',
            f'{theirs}neck.',
            (
                ('lateral{i}', 'lateral_convs.{i-1}.conv', 'convolution'),
                ('output{i}', 'fpn_convs.{i-1}.conv', 'convolution'),
            ),
        ),
        *under(
            f'{ours}rpn_head/',
            f'{theirs}rpn_head.',
            (
                ('conv', 'rpn_conv', 'convolution'),
                ('logits', 'rpn_cls', 'convolution'),
                ('deltas', 'rpn_reg', 'convolution'),
            ),
        ),
        *_heads(ours, theirs, *CASCADE_HEAD, beside=f'/{ours}box_head_1/logits'),
        *_heads(ours, theirs, *ONE_HEAD, beside=''),
    )


def _heads(ours: str, theirs: str, number: str, their_number: str, *, beside: str) -> Rules:
    boxes = (
        ('shared1', 'shared_fcs.0', 'linear_of_7x7', beside),
        ('shared2', 'shared_fcs.1', 'linear', beside),
        ('logits', 'fc_cls', 'linear', beside),
        ('deltas', 'fc_reg', 'linear', beside),
    )
    masks = (
        ('/conv{i}', 'convs.{i-1}.conv', 'convolution', beside),
        ('/upsample', 'upsample', 'transposed_convolution', beside),
        ('', 'conv_logits', 'pointwise', beside),
    )
    return (
        *under(f'{ours}box_head_{number}/', f'{theirs}roi_head.bbox_head.{their_number}', boxes),
        *under(f'{ours}mask_head_{number}', f'{theirs}roi_head.mask_head.{their_number}', masks),
    )


def network(shapes: Shapes) -> tuple[str, dict[str, Any]]:
    """The registered detector with this backbone and these heads.

    Raises:
      CheckpointError: It follows the rules of 2019, or has other heads.
    """
    if not any(name.startswith('roi_head.') for name in shapes):
        raise CheckpointError(
            'it is a detector of the official repository of 2019 (mmdetection 1), which computes '
            'other boxes from the same layers: take the file of this network in the model zoo of '
            'mmdetection 2 and later, or name its backbone alone, such as --model gc_resnet50'
        )
    backbone = {
        name.removeprefix(BACKBONE): shape
        for name, shape in shapes.items()
        if name.startswith(BACKBONE)
    }
    name, options = mmdetection.network(backbone)
    options['backbone'] = name
    if 'roi_head.bbox_head.0.fc_cls.weight' in shapes:
        options['cascade'] = True
    return _row(options)


def _row(options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The first row of these layers, whatever its norms do in training; else one that is near."""
    rows = [model_entry(name) for name in list_models(task='detection')]
    layers = {row.name: dict(row.module.keywords) for row in rows}
    for name, keywords in layers.items():
        if {k: v for k, v in keywords.items() if k not in ('norm', 'num_classes')} == options:
            return name, {}
    return 'mask_rcnn_resnet50_fpn', options


def num_classes(shapes: Shapes) -> int:
    """The classes without the background, which is the last logit."""
    logits = [s for name, s in shapes.items() if re.fullmatch(r'.*\.fc_cls\.weight', name)]
    return logits[0][0] - 1 if logits else 0


FAMILY = Family(
    'mmdetection',
    MaskRCNN,
    rules,
    recognise=(
        r'rpn_head\.rpn_conv\.weight',
        r'(roi_head\.)?bbox_head\..*',
        r'(roi_head\.)?mask_head\..*',
    ),
    network=network,
    num_classes=num_classes,
    classifier=(
        r'roi_head\.bbox_head\.(\d+\.)?(fc_cls|fc_reg)|roi_head\.mask_head\.(\d+\.)?conv_logits'
    ),
    context='context_block',
    left=BOOKKEEPING | {r'data_preprocessor\..*': 'what is in the preprocessing here'},
    unsupported={
        r'semantic_head\.|mask_head\.\d+\.conv_res\.': (
            'it is a HybridTaskCascade, which is not among the networks here'
        ),
        r'bbox_head\..*(convs|norm|bn)': (
            'its box head has convolutions; the box heads here have two dense layers'
        ),
    },
)
