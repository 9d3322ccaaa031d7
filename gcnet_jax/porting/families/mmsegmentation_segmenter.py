"""mmsegmentation's GCNet segmenters, whole: backbone, head and auxiliary head; and the plain FCN.

Dilation, windows and the rule by which logits are enlarged have no tensors: see
`porting.published_segmenters`.
"""

import dataclasses
import re
from typing import Any

from gcnet_jax.errors import CheckpointError
from gcnet_jax.models.encoder_decoder import EncoderDecoder
from gcnet_jax.models.options import module_options
from gcnet_jax.models.registry import model_entry
from gcnet_jax.porting.families import mmcv_context, mmdetection, mmsegmentation_backbone, resnet
from gcnet_jax.porting.families.rules import BOOKKEEPING, Family, Rules, Shapes, under

BACKBONE, HEAD, AUXILIARY = 'backbone.', 'decode_head.', 'auxiliary_head.'
# The data sets of the rows, by their number of classes.
DATA_SETS = {19: 'cityscapes', 150: 'ade20k', 21: 'voc'}
_LAYER = r'(conv\.weight|bn\.\w+)'
_KNOWN = (
    rf'decode_head\.(convs\.[01]|conv_cat)\.{_LAYER}|decode_head\.conv_seg\.(weight|bias)|'
    r'decode_head\.gc_block\.(conv_mask|channel_add_conv)\..*|'
    rf'auxiliary_head\.(convs\.0\.{_LAYER}|conv_seg\.(weight|bias))'
)
# What the tensors of other heads are called.
_OTHER_HEADS = {
    r'decode_head\.psp_modules\.': 'PSPHead',
    r'decode_head\.(aspp_modules|image_pool)\.': 'ASPPHead (DeepLab)',
    r'decode_head\.nl_block\.': 'NLHead (non-local)',
    r'decode_head\.dnl_block\.': 'DNLHead (disentangled non-local)',
    r'decode_head\.cca\.': 'CCHead (criss-cross)',
    r'decode_head\.(pam|cam)\.': 'DAHead (dual attention)',
    r'decode_head\.(lateral_convs|fpn_convs)\.': 'UPerHead',
    r'decode_head\.gc_block\.channel_mul_conv\.': 'GCHead whose context multiplies',
    r'(decode_head|auxiliary_head)\.\d+\.': 'chain of several',
}
_ONLY = (
    'the segmenters here have one GCHead or FCNHead of two convolutions, and one auxiliary FCNHead '
    'of one convolution or none; the backbone alone can be loaded by its name, such as resnet50'
)


def rules(ours: str, theirs: str) -> Rules:
    """The table of a segmenter."""
    return (
        *mmsegmentation_backbone.rules(f'{ours}backbone/', f'{theirs}{BACKBONE}'),
        *_head(f'{ours}head/', f'{theirs}{HEAD}'),
        *mmcv_context.rules(f'{ours}head/context/', f'{theirs}{HEAD}gc_block.'),
        *_head(f'{ours}auxiliary_head/', f'{theirs}{AUXILIARY}'),
    )


def _head(ours: str, theirs: str) -> Rules:
    return under(
        ours,
        theirs,
        (
            ('conv{i}/conv', 'convs.{i-1}.conv', 'convolution'),
            ('conv{i}/norm', 'convs.{i-1}.bn', 'batch_norm'),
            ('conv_cat/conv', 'conv_cat.conv', 'convolution'),
            ('conv_cat/norm', 'conv_cat.bn', 'batch_norm'),
            ('logits', 'conv_seg', 'pointwise'),
        ),
    )


def network(shapes: Shapes) -> tuple[str, dict[str, Any]]:
    """The registered segmenter with this backbone, this head and as many classes.

    Raises:
      CheckpointError: It has another head, or a backbone that is no ResNet.
    """
    _check_heads(shapes)
    backbone = {
        name.removeprefix(BACKBONE): shape
        for name, shape in shapes.items()
        if name.startswith(BACKBONE)
    }
    if 'layer1.0.conv1.weight' not in backbone:
        raise CheckpointError('the backbone of this segmenter is no ResNet, and those here are')
    for pattern, explanation in resnet.AVERAGED_SHORTCUTS.items():
        if any(re.match(pattern, name) for name in backbone):
            raise CheckpointError(explanation)
    name, options = mmdetection.network(backbone)
    options |= {'backbone': name, 'channels': shapes[f'{HEAD}conv_seg.weight'][1]} | told(shapes)
    kind, context = 'fcn', f'{HEAD}gc_block.'
    if any(name.startswith(context) for name in shapes):
        kind = 'gc'
        block, channels = mmcv_context.block_options(shapes, context)
        options['context_ratio'] = mmcv_context.ratio_of(block['hidden_channels'], channels)
    depth = name if name in ('resnet50', 'resnet101') else 'resnet50'
    # Other data sets are mostly prepared as ADE20K is.
    data_set = DATA_SETS.get(shapes[f'{HEAD}conv_seg.weight'][0], 'ade20k')
    return differing(f'{kind}_{depth}_d8_{data_set}', options)


def differing(name: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns a segmenter's name, and those options that are not its row's or its module's."""
    row = row_settings(name)
    return name, {key: value for key, value in options.items() if row.get(key, ...) != value}


def row_settings(name: str) -> dict[str, Any]:
    """Returns all settings of a segmenter of the registry, with its module's defaults."""
    options = module_options(EncoderDecoder)
    fields = {field.name: field for field in dataclasses.fields(EncoderDecoder)}
    defaults = {option: fields[option].default for option in options if option != 'backbone'}
    return defaults | dict(model_entry(name).module.keywords)


def told(shapes: Shapes) -> dict[str, Any]:
    """The kind of the stem and the width of the auxiliary head, 0 for none."""
    auxiliary = shapes.get(f'{AUXILIARY}conv_seg.weight', ())
    return {
        'stem': 'deep' if f'{BACKBONE}stem.0.weight' in shapes else 'imagenet',
        'auxiliary_channels': auxiliary[1] if len(auxiliary) == 4 else 0,
    }


def _check_heads(shapes: Shapes) -> None:
    heads = [name for name in shapes if name.startswith((HEAD, AUXILIARY))]
    others = [
        name
        for name in heads
        if not re.fullmatch(_KNOWN, name) and not name.endswith('num_batches_tracked')
    ]
    for pattern, kind in (*_OTHER_HEADS.items(), ('', 'head of other layers')):
        if any(re.match(pattern, name) for name in others):
            raise CheckpointError(_explanation(kind))
    logits = shapes.get(f'{HEAD}conv_seg.weight', ())
    layers = [f'{HEAD}{layer}.conv.weight' for layer in ('convs.0', 'convs.1', 'conv_cat')]
    if len(logits) != 4 or not all(layer in shapes for layer in layers):
        raise CheckpointError(_explanation('head of fewer layers'))
    if logits[0] < 2:
        raise CheckpointError(
            'its head has one logit, a sigmoid over foreground and background; the segmenters here '
            'have a logit for each class'
        )


def _explanation(kind: str) -> str:
    return f"its head is mmsegmentation's {kind}, and {_ONLY}"


FAMILY = Family(
    'mmsegmentation',
    EncoderDecoder,
    rules,
    recognise=(r'backbone\..*', r'decode_head\..*'),
    network=network,
    told=told,
    classifier=r'(decode_head|auxiliary_head)\.conv_seg',
    context='gc_block|context_block',
    left=BOOKKEEPING | {r'data_preprocessor\..*': 'what is in the preprocessing here'},
    unsupported=resnet.AVERAGED_SHORTCUTS
    | {pattern: _explanation(kind) for pattern, kind in _OTHER_HEADS.items()},
)
