"""The tables of families, and how they add up to the table of a larger network."""

from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcnet_jax.errors import CheckpointError
from gcnet_jax.models import create_model
from gcnet_jax.models.mask_rcnn import MaskRCNN
from gcnet_jax.porting import families
from gcnet_jax.porting.convert import variable_shapes
from gcnet_jax.porting.families import (
    FAMILIES,
    cifar,
    mmcv_context,
    mmdetection,
    mmsegmentation_backbone,
    mmsegmentation_segmenter,
    timm_byobnet,
    timm_efficientnet,
    torchvision,
)
from gcnet_jax.porting.families.resnet import plain_network
from gcnet_jax.porting.families.rules import under
from gcnet_jax.porting.names import KINDS, pair_by_rules, pair_names


def backbone(name):
    return create_model(name, num_classes=0)


def detector_leaves(model):
    """The paths of every leaf of a detector."""
    detector = MaskRCNN(model, num_classes=2, channels=8, box_channels=8)
    images, sizes = jnp.zeros((1, 64, 64, 3)), jnp.full((1, 2), 64.0)
    variables = jax.eval_shape(lambda: detector.init(jax.random.key(0), images, sizes, train=False))
    return list(flax.traverse_util.flatten_dict(variables, sep='/'))


@pytest.mark.parametrize(
    ('name', 'family'),
    [('resnet18', torchvision), ('resnet50', torchvision), ('gc_resnet50', mmdetection)],
)
def test_a_table_under_two_prefixes_names_the_backbone_of_a_detector(name, family):
    model = backbone(name)
    leaves = detector_leaves(model)
    alone, nameless = pair_names(family.FAMILY, variable_shapes(model))
    assert not nameless
    inside, rest = pair_by_rules(family.rules('backbone/', 'backbone.'), leaves)
    expected = {
        path.replace('/', '/backbone/', 1): f'backbone.{pairing.theirs}'
        for pairing in alone
        for path in [pairing.ours]
    }
    assert {pairing.ours: pairing.theirs for pairing in inside} == expected
    assert {path.split('/')[1] for path in rest} == {
        *('neck', 'rpn_head', 'box_head_0', 'mask_head_0')
    }


def test_tables_add_up():
    neck = under(
        'neck/',
        'neck.',
        (
            ('lateral{level}', 'lateral_convs.{level-1}.conv', 'convolution'),
            ('output{level}', 'fpn_convs.{level-1}.conv', 'convolution'),
        ),
    )
    table = (*mmdetection.rules('backbone/', 'backbone.'), *neck)
    pairings, rest = pair_by_rules(table, detector_leaves(backbone('gc_resnet50')))
    names = {pairing.ours: pairing.theirs for pairing in pairings}
    assert len({*names.values()}) == len(names)
    assert names['params/neck/lateral4/bias'] == 'neck.lateral_convs.3.conv.bias'
    assert names['params/neck/output1/kernel'] == 'neck.fpn_convs.0.conv.weight'
    assert not any(path.startswith(('params/backbone/', 'params/neck/')) for path in rest)


@pytest.mark.parametrize(
    ('family', 'ours', 'theirs'),
    [
        (torchvision, 'params/a/stem_conv/kernel', 'b.conv1.weight'),
        (torchvision, 'params/a/stage2_0/shortcut_conv/kernel', 'b.layer2.0.downsample.0.weight'),
        (cifar, 'params/a/stage2_0/shortcut_conv/kernel', 'b.layer2.0.shortcut.0.weight'),
        (cifar, 'params/a/classifier/bias', 'b.linear.bias'),
        (
            mmdetection,
            'params/a/stage3_1/context_after_conv3_0/add/norm/scale',
            'b.layer3.1.context_block.channel_add_conv.1.weight',
        ),
        (mmsegmentation_backbone, 'params/a/stem_conv_0/kernel', 'b.stem.0.weight'),
        (mmsegmentation_backbone, 'params/a/stem_norm_2/scale', 'b.stem.7.weight'),
        (mmsegmentation_backbone, 'params/a/stage1_0/conv3/kernel', 'b.layer1.0.conv3.weight'),
        (
            mmsegmentation_segmenter,
            'batch_stats/a/backbone/stem_norm_1/var',
            'b.backbone.stem.4.running_var',
        ),
        (
            mmsegmentation_segmenter,
            'params/a/head/conv2/norm/scale',
            'b.decode_head.convs.1.bn.weight',
        ),
        (
            mmsegmentation_segmenter,
            'params/a/head/context/add/norm/bias',
            'b.decode_head.gc_block.channel_add_conv.1.bias',
        ),
        (
            mmsegmentation_segmenter,
            'params/a/auxiliary_head/logits/kernel',
            'b.auxiliary_head.conv_seg.weight',
        ),
        (mmcv_context, 'params/a/pool/logits/kernel', 'b.conv_mask.weight'),
        (timm_byobnet, 'params/a/stem_conv_0/kernel', 'b.stem.conv1.conv.weight'),
        (
            timm_byobnet,
            'params/a/stage1_0/context_after_conv2_0/add/expand/bias',
            'b.stages.0.0.attn.mlp_add.fc2.bias',
        ),
        (timm_efficientnet, 'batch_stats/a/head_norm/mean', 'b.bn2.running_mean'),
    ],
)
def test_both_prefixes_precede_every_name(family, ours, theirs):
    ((pairing,), nameless) = pair_by_rules(family.rules('a/', 'b.'), [ours])
    assert (pairing.theirs, nameless) == (theirs, [])
    assert pair_by_rules(family.rules('', 'b.'), [ours]) == ([], [ours])


@pytest.mark.parametrize('kind', [0, 1, 2])
def test_a_module_beside_is_sought_under_the_prefix(kind):
    block = (
        ('expand_norm', 'depthwise_norm', 'project_norm'),
        ('expand_norm', 'project_norm'),
        ('expand_norm',),
    )[kind]
    modules = [
        *block,
        *(name.replace('norm', 'conv') for name in block),
    ]
    leaves = [f'params/a/stage1_0/{name}/scale' for name in modules if name.endswith('norm')]
    leaves += [f'params/a/stage1_0/{name}/kernel' for name in modules if name.endswith('conv')]
    pairings, nameless = pair_by_rules(timm_efficientnet.rules('a/', ''), leaves)
    names = {pairing.ours.split('/')[3]: pairing.theirs.split('.')[3] for pairing in pairings}
    assert not nameless
    assert [names[name] for name in block] == ['bn1', 'bn2', 'bn3'][: len(block)]
    assert names['expand_conv'] == ('conv_pw', 'conv_exp', 'conv')[kind]


def test_every_file_that_defines_a_family_is_in_the_list():
    directory = Path(families.__file__).parent
    files = [path.stem for path in directory.glob('*.py') if 'FAMILY = ' in path.read_text()]
    assert sorted(map(id, FAMILIES)) == sorted(id(getattr(families, name).FAMILY) for name in files)
    assert len(files) == 10


@pytest.mark.parametrize('family', FAMILIES, ids=lambda family: family.library)
def test_every_rule_is_of_a_known_kind(family):
    assert {rule.kind for rule in family.rules('', '')} <= {*KINDS}


def test_cardinalities_of_a_resnext_are_told_apart():
    """32x4d and 64x4d have as many inputs per group; only the width of the 3x3 differs."""
    model = create_model('resnext101_32x4d', num_classes=0)
    targets = variable_shapes(model)
    pairings, _ = pair_names(torchvision.FAMILY, targets)
    shapes = {
        pairing.theirs: pairing.leaf.to_theirs(np.empty(targets[pairing.ours].shape)).shape
        for pairing in pairings
    }
    assert plain_network(shapes) == 'resnext101_32x4d'
    shapes['layer1.0.conv2.weight'] = (256, 4, 3, 3)
    with pytest.raises(CheckpointError, match='no registered network'):
        plain_network(shapes)
