"""The PyTorch replication's GC-CNN: no stem, and one residual block in each stage.

Its convolutions are wrapped, hence the `.conv`. A block has global context (`attn` and
`gc_transform`) and then squeeze-excitation (`se_fc1` and `se_fc2`).
"""

from typing import Any

from gcnet_jax.models.resnet import ResNet
from gcnet_jax.porting.families.rules import Family, Rules, Shapes, under


def rules(ours: str, theirs: str) -> Rules:
    """The table of the network."""
    return (
        *under(
            f'{ours}stage{{stage}}_0/',
            f'{theirs}layer{{stage}}.',
            (
                ('conv{i}', 'conv{i}.conv', 'convolution'),
                ('norm{i}', 'bn{i}', 'batch_norm'),
                ('shortcut_conv', 'downsample.0.conv', 'convolution'),
                ('shortcut_norm', 'downsample.1', 'batch_norm'),
                ('context_after_conv2_0/pool/logits', 'attn.conv', 'pointwise'),
                ('context_after_conv2_0/add/reduce', 'gc_transform.conv1', 'pointwise'),
                ('context_after_conv2_0/add/norm', 'gc_transform.ln', 'layer_norm_of_map'),
                ('context_after_conv2_0/add/expand', 'gc_transform.conv2', 'pointwise'),
                ('context_after_conv2_1/reduce', 'se_fc1', 'pointwise'),
                ('context_after_conv2_1/expand', 'se_fc2', 'pointwise'),
            ),
        ),
        *under(ours, theirs, (('classifier', 'fc', 'linear'),)),
    )


def network(shapes: Shapes) -> tuple[str, dict[str, Any]]:
    """The only one; a file of another is refused for its shapes."""
    del shapes
    return 'gccnn', {}


FAMILY = Family(
    'gccnn',
    ResNet,
    rules,
    recognise=(r'layer1\.gc_transform\.conv1\.weight', r'layer1\.se_fc1\.weight'),
    network=network,
    classifier=r'(.*\.)?fc',
    context='attn|gc_transform',
)
