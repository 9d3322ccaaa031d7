"""timm's GC-ResNets and GC-ResNeXts, which are ByobNets: `gcresnet50t` and others."""

from typing import Any

import flax.linen as nn

from gcnet_jax.models.byobnet import ByobNet
from gcnet_jax.porting.families import timm_context
from gcnet_jax.porting.families.rules import Family, Rules, Shapes, under
from gcnet_jax.porting.families.structure import registered_network, stage_sizes


def rules(ours: str, theirs: str) -> Rules:
    """The table of a ByobNet. Stages count from 1 here and from 0 there; stem layers vice versa."""
    block = f'{ours}stage{{stage}}_{{block}}/'
    their_block = f'{theirs}stages.{{stage-1}}.{{block}}.'
    return (
        *under(
            ours,
            theirs,
            (
                ('stem_conv_{i}', 'stem.conv{i+1}.conv', 'convolution'),
                ('stem_norm_{i}', 'stem.conv{i+1}.bn', 'batch_norm'),
                ('head_conv', 'final_conv.conv', 'convolution'),
                ('head_norm', 'final_conv.bn', 'batch_norm'),
                ('classifier', 'head.fc', 'linear'),
            ),
        ),
        *under(
            block,
            their_block,
            (
                ('conv1', 'conv1_1x1.conv', 'convolution'),
                ('norm1', 'conv1_1x1.bn', 'batch_norm'),
                ('conv2', 'conv2_kxk.conv', 'convolution'),
                ('norm2', 'conv2_kxk.bn', 'batch_norm'),
                ('conv3', 'conv3_1x1.conv', 'convolution'),
                ('norm3', 'conv3_1x1.bn', 'batch_norm'),
                ('shortcut_conv', 'shortcut.conv', 'convolution'),
                ('shortcut_norm', 'shortcut.bn', 'batch_norm'),
            ),
        ),
        *timm_context.rules(f'{block}context_after_conv2_0/', f'{their_block}attn.'),
    )


def network(shapes: Shapes) -> tuple[str, dict[str, Any]]:
    """The registered ByobNet with as many blocks of the same widths and group size."""
    sizes = stage_sizes(shapes, r'stages\.(\d+)\.(\d+)\.')
    widths = tuple(
        shapes.get(f'stages.{stage}.0.conv3_1x1.conv.weight', (0,))[0]
        for stage in range(len(sizes))
    )
    grouped = shapes['stages.0.0.conv2_kxk.conv.weight']
    group_size = grouped[1] if grouped[1] != grouped[0] else 0
    return registered_network((sizes, widths, group_size), _structure_of), {}


def _structure_of(model: nn.Module) -> tuple | None:
    if not isinstance(model, ByobNet):
        return None
    return tuple(model.stage_sizes), tuple(model.widths), model.group_size


FAMILY = Family(
    'timm',
    ByobNet,
    rules,
    recognise=(r'stages\.0\.0\.conv1_1x1\.conv\.weight',),
    network=network,
    classifier=r'head\.fc',
    context='attn',
)
