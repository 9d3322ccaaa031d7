"""akamaster's pytorch_resnet_cifar10: torchvision's names with `shortcut` and `linear`.

Its shortcuts are zero-padded or projections; only projections have tensors. It has no context
blocks: loaded into a GC network, the blocks are newly initialised, and a GC network cannot be
written in these names.
"""

from typing import Any

from gcnet_jax.models.resnet import ResNet
from gcnet_jax.porting.families import resnet, torchvision
from gcnet_jax.porting.families.rules import Family, Rules, Shapes


def rules(ours: str, theirs: str) -> Rules:
    """The table of a CIFAR ResNet."""
    return torchvision.rules(ours, theirs, shortcut='shortcut', classifier='linear')


def network(shapes: Shapes) -> tuple[str, dict[str, Any]]:
    """The registered ResNet with as many blocks of the same widths and the same shortcuts."""
    return resnet.plain_network(shapes), {}


FAMILY = Family(
    'pytorch_resnet_cifar10',
    ResNet,
    rules,
    recognise=(r'conv1\.weight', r'layer1\.0\.conv1\.weight', r'linear\.weight'),
    network=network,
    classifier='linear',
    may_be_new=r'.*/context_.*',
)
