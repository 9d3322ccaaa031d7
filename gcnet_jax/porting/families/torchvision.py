"""torchvision's ResNets; mmdetection and akamaster's CIFAR networks follow its names.

Its networks have no context blocks: loaded into a GC network, the blocks are newly initialised, and
a GC network cannot be written in these names.
"""

from typing import Any

from gcnet_jax.errors import CheckpointError
from gcnet_jax.models.resnet import ResNet
from gcnet_jax.porting.families import resnet
from gcnet_jax.porting.families.rules import Family, Rules, Shapes, under


def rules(ours: str, theirs: str, *, shortcut: str = 'downsample', classifier: str = 'fc') -> Rules:
    """The table of a ResNet without context blocks.

    Args:
      ours, theirs: The prefixes here and in the file.
      shortcut, classifier: The two names in which libraries differ.
    """
    return (
        *under(
            ours,
            theirs,
            (
                ('stem_conv', 'conv1', 'convolution'),
                ('stem_norm', 'bn1', 'batch_norm'),
                ('classifier', classifier, 'linear'),
            ),
        ),
        *under(
            f'{ours}stage{{stage}}_{{block}}/',
            f'{theirs}layer{{stage}}.{{block}}.',
            (
                ('conv{i}', 'conv{i}', 'convolution'),
                ('norm{i}', 'bn{i}', 'batch_norm'),
                ('shortcut_conv', f'{shortcut}.0', 'convolution'),
                ('shortcut_norm', f'{shortcut}.1', 'batch_norm'),
            ),
        ),
    )


def network(shapes: Shapes) -> tuple[str, dict[str, Any]]:
    """The registered ResNet with as many blocks of the same widths."""
    name = resnet.plain_network(shapes)
    if resnet.shortcuts(shapes) == 'zero_pad':
        raise CheckpointError(
            f'the file has {resnet.SHORTCUTS["zero_pad"]}, and its names do not tell where the '
            f'zeros are: name {name} (--model) if half of them precede the channels of the input '
            'and half follow'
        )
    return name, {}


FAMILY = Family(
    'torchvision',
    ResNet,
    rules,
    recognise=(r'conv1\.weight', r'layer1\.0\.conv1\.weight'),
    network=network,
    classifier=r'(.*\.)?fc',
    may_be_new=r'.*/context_.*',
    unsupported=resnet.SE_RESNET,
)
