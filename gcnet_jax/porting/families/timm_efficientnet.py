"""timm's `gc_efficientnetv2_rw_t`, the only EfficientNet here.

A block is an inverted residual, an edge residual or one convolution; timm numbers the norms of each
in the order in which they run, so that `bn2` is another norm in each.
"""

from typing import Any

from gcnet_jax.models.efficientnet import EfficientNet
from gcnet_jax.porting.families import timm_context
from gcnet_jax.porting.families.rules import Family, Rules, Shapes, under

# The fourth column is the module here that tells which of the three a block is.
_BLOCK = (
    # an inverted residual
    ('expand_conv', 'conv_pw', 'convolution', 'depthwise_conv'),
    ('expand_norm', 'bn1', 'batch_norm', 'depthwise_conv'),
    ('depthwise_conv', 'conv_dw', 'convolution'),
    ('depthwise_norm', 'bn2', 'batch_norm'),
    ('project_conv', 'conv_pwl', 'convolution', 'depthwise_conv'),
    ('project_norm', 'bn3', 'batch_norm', 'depthwise_conv'),
    # an edge residual
    ('expand_conv', 'conv_exp', 'convolution', 'project_conv'),
    ('expand_norm', 'bn1', 'batch_norm', 'project_conv'),
    ('project_conv', 'conv_pwl', 'convolution'),
    ('project_norm', 'bn2', 'batch_norm'),
    # one convolution
    ('expand_conv', 'conv', 'convolution'),
    ('expand_norm', 'bn1', 'batch_norm'),
)


def rules(ours: str, theirs: str) -> Rules:
    """The table of an EfficientNet; stages count from 1 here and from 0 there."""
    block = f'{ours}stage{{stage}}_{{block}}/'
    their_block = f'{theirs}blocks.{{stage-1}}.{{block}}.'
    return (
        *under(
            ours,
            theirs,
            (
                ('stem_conv', 'conv_stem', 'convolution'),
                ('stem_norm', 'bn1', 'batch_norm'),
                ('head_conv', 'conv_head', 'convolution'),
                ('head_norm', 'bn2', 'batch_norm'),
                ('classifier', 'classifier', 'linear'),
            ),
        ),
        *under(block, their_block, _BLOCK),
        *timm_context.rules(f'{block}context/', f'{their_block}se.'),
    )


def network(shapes: Shapes) -> tuple[str, dict[str, Any]]:
    """The only one; a file of another is refused for its shapes."""
    del shapes
    return 'gc_efficientnetv2_rw_t', {}


FAMILY = Family(
    'timm',
    EfficientNet,
    rules,
    recognise=(r'conv_stem\.weight', r'blocks\.0\.0\.conv\.weight'),
    network=network,
    classifier=r'(.*\.)?classifier',
    context='se',
)
