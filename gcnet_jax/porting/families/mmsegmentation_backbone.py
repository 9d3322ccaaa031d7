"""mmsegmentation's backbones: mmdetection's names, but for a stem of three convolutions.

A ResNetV1c, alone (`open-mmlab://resnet50_v1c`) or in a segmenter whose heads are left. Dilation
has no tensors: name the network with its `output_stride` where the file's is dilated.
"""

from typing import Any

from gcnet_jax.models.resnet import ResNet
from gcnet_jax.porting.families import mmdetection, resnet
from gcnet_jax.porting.families.rules import BOOKKEEPING, Family, Rules, Shapes, under


def rules(ours: str, theirs: str) -> Rules:
    """The table of a backbone: a convolution, a norm and a ReLU, three times."""
    stem = (
        row
        for number in range(3)
        for row in (
            (f'stem_conv_{number}', f'stem.{3 * number}', 'convolution'),
            (f'stem_norm_{number}', f'stem.{3 * number + 1}', 'batch_norm'),
        )
    )
    return (*under(ours, theirs, stem), *mmdetection.rules(ours, theirs))


def network(shapes: Shapes) -> tuple[str, dict[str, Any]]:
    """The registered ResNet with the file's stem, and its context or deformable blocks."""
    name, options = mmdetection.network(shapes)
    return name, options | told(shapes)


def told(shapes: Shapes) -> dict[str, Any]:
    """The options that a file tells of any network that is named for it."""
    return {'stem': 'deep'} if 'stem.0.weight' in shapes else {}


FAMILY = Family(
    'mmsegmentation',
    ResNet,
    rules,
    recognise=(
        r'(backbone\.)?layer1\.0\.conv1\.weight',
        r'(backbone\.)?stem\.0\.weight|decode_head\..*',
    ),
    network=network,
    told=told,
    classifier=r'(.*\.)?fc',
    context='context_block',
    prefix='backbone.',
    left=BOOKKEEPING
    | {
        r'(decode_head|auxiliary_head|neck|data_preprocessor)\..*': (
            "the segmenter's heads and what is beside them"
        )
    },
    may_be_new=r'params/classifier/.*|.*/context_.*',
    may_be_lost=r'params/classifier/.*',
    unsupported=resnet.AVERAGED_SHORTCUTS | resnet.SE_RESNET,
)
