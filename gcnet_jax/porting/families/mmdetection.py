"""mmdetection's and the official repository's GCNet backbones: torchvision's names, and blocks.

Deformable convolutions are mmdetection's since version 2. Where only a backbone is wanted, the
detector's neck and heads are left. The backbone of a detector has no classifier: it is not
written, and newly initialised where the network here has one. Each residual block can hold one
context block.
"""

import re
from typing import Any

from gcnet_jax.errors import CheckpointError
from gcnet_jax.models.resnet import ResNet
from gcnet_jax.porting.families import mmcv_context, resnet, torchvision
from gcnet_jax.porting.families.rules import BOOKKEEPING, Family, Rules, Shapes, under


def rules(ours: str, theirs: str) -> Rules:
    """The table of a backbone."""
    return (
        *torchvision.rules(ours, theirs),
        *under(
            f'{ours}stage{{stage}}_{{block}}/',
            f'{theirs}layer{{stage}}.{{block}}.',
            (('conv{i}/offset', 'conv{i}.conv_offset', 'convolution'),),
        ),
        *mmcv_context.rules(
            f'{ours}stage{{stage}}_{{block}}/context_after_conv{{i}}_0/',
            f'{theirs}layer{{stage}}.{{block}}.context_block.',
        ),
    )


def network(shapes: Shapes) -> tuple[str, dict[str, Any]]:
    """The registered ResNet, and its options where the file has context or deformable blocks."""
    options = _context_options(shapes)
    pattern = r'layer(\d+)\.\d+\.conv2\.conv_offset\.weight'
    deformable = sorted({int(m[1]) for name in shapes if (m := re.fullmatch(pattern, name))})
    if deformable:
        options['deformable_stages'] = tuple(deformable)
    return resnet.plain_network(shapes), options


def _context_options(shapes: Shapes) -> dict[str, Any]:
    pattern = r'layer(\d+)\.(\d+)\.context_block\.'
    stages = tuple(sorted({int(m[1]) for name in shapes if (m := re.match(pattern, name))}))
    if not stages:
        return {}
    place = f'layer{stages[0]}.0.'
    options, channels = mmcv_context.block_options(shapes, place + 'context_block.')
    hidden = options.pop('hidden_channels')
    last = 'conv3' if place + 'conv3.weight' in shapes else 'conv2'
    if shapes.get(f'{place}{last}.weight', (0,))[0] != channels:
        raise CheckpointError(
            'the context blocks are on the inner channels, and the file does not tell whether '
            'behind conv1 or conv2: give the network, with context=dict(..., position=...)'
        )
    return {
        'context': {
            'block': 'global_context',
            'stages': stages,
            'position': f'after_{last}',
            'ratio': mmcv_context.ratio_of(hidden, channels),
            **options,
        }
    }


FAMILY = Family(
    'mmdetection',
    ResNet,
    rules,
    recognise=(
        r'backbone\.layer1\.0\.conv1\.weight|.*\.context_block\.channel_.*_conv\.0\.weight',
    ),
    network=network,
    classifier=r'(.*\.)?fc',
    context='context_block',
    prefix='backbone.',
    left=BOOKKEEPING
    | {
        r'(neck|rpn_head|roi_head|bbox_head|mask_head|semantic_head|data_preprocessor)\..*': (
            "the detector's neck and heads"
        )
    },
    may_be_new=r'params/classifier/.*',
    may_be_lost=r'params/classifier/.*',
    unsupported=resnet.SE_RESNET
    | {
        'conv2_offset': (
            'its deformable convolutions are those of mmdetection 1, which read the offsets of a '
            'file of 2019'
        ),
        'conv_offset': 'it has deformable convolutions: name a network with deformable_stages',
    },
)
