"""The global context block of mmcv and of the official repository, `ContextBlock`.

No family of its own: mmdetection puts it into residual blocks, mmsegmentation into a head.
"""

from typing import Any

from gcnet_jax.errors import CheckpointError
from gcnet_jax.porting.families.rules import Rules, Shapes, under


def rules(ours: str, theirs: str) -> Rules:
    """The table of one block; index 2 of a branch is its ReLU."""
    return under(
        ours,
        theirs,
        (
            ('pool/logits', 'conv_mask', 'pointwise'),
            ('add/reduce', 'channel_add_conv.0', 'pointwise'),
            ('add/norm', 'channel_add_conv.1', 'layer_norm_of_map'),
            ('add/expand', 'channel_add_conv.3', 'pointwise'),
            ('scale/reduce', 'channel_mul_conv.0', 'pointwise'),
            ('scale/norm', 'channel_mul_conv.1', 'layer_norm_of_map'),
            ('scale/expand', 'channel_mul_conv.3', 'pointwise'),
        ),
    )


def ratio_of(hidden: int, channels: int) -> float:
    """Returns the ratio of a block's bottleneck, from which its width follows again.

    In floating point `hidden / channels * channels` can fall short of `hidden`, and the width is
    rounded down.
    """
    ratio = hidden / channels
    return ratio if int(ratio * channels) == hidden else (hidden + 0.5) / channels


def block_options(shapes: Shapes, place: str) -> tuple[dict[str, Any], int]:
    """Returns the options of `GlobalContext`, and the width of its input.

    Args:
      shapes: The file's.
      place: What precedes the names of the block.

    Raises:
      CheckpointError: The block neither adds nor scales, or a tensor of it is of no convolution.
    """
    branches = [b for b in ('mul', 'add') if f'{place}channel_{b}_conv.0.weight' in shapes]
    if not branches:
        raise CheckpointError(f'a context block without a transform: {place}channel_add_conv.0')
    name = f'{place}channel_{branches[0]}_conv.0.weight'
    if len(shapes[name]) != 4 or not all(shapes[name]):
        raise CheckpointError(f'{name} is of no convolution: its shape is {list(shapes[name])}')
    hidden, channels = shapes[name][:2]
    options: dict[str, Any] = {'hidden_channels': hidden}
    if branches != ['add']:
        options['fusion'] = 'scale_add' if len(branches) == 2 else 'scale'
    if f'{place}conv_mask.weight' not in shapes:
        options['pooling'] = 'average'
    return options, channels
