"""Which PyTorch tensor is which parameter here: one table of rules a family, for both directions.

A rule pairs a module path here with a module name there, and says of what kind the module is; the
kind pairs the leaves and changes their layout. Numbers stand in braces and may be shifted:
`stage{stage}_{block}/conv1` and `stages.{stage-1}.{block}.conv1_1x1`.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping

import flax.linen as nn
import numpy as np

from gcnet_jax.context.global_context import GlobalContext
from gcnet_jax.models.byobnet import ByobNet
from gcnet_jax.models.efficientnet import EfficientNet
from gcnet_jax.models.resnet import ResNet

Layout = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a module.

    Attributes:
      ours: Collection and name here, such as 'params/kernel'.
      theirs: Its name there, such as 'weight'.
      to_ours, to_theirs: The changes of layout, inverse to each other.
    """

    ours: str
    theirs: str
    to_ours: Layout = np.asarray
    to_theirs: Layout = np.asarray


_BIAS = Leaf('params/bias', 'bias')
_SCALE = Leaf('params/scale', 'weight')
_KINDS: dict[str, tuple[Leaf, ...]] = {
    # [out, in, height, width] there, [height, width, in, out] here.
    'convolution': (
        Leaf(
            'params/kernel',
            'weight',
            lambda array: array.transpose(2, 3, 1, 0),
            lambda array: array.transpose(3, 2, 0, 1),
        ),
        _BIAS,
    ),
    'linear': (Leaf('params/kernel', 'weight', np.transpose, np.transpose), _BIAS),
    # A 1x1 convolution there, a dense layer here.
    'pointwise': (
        Leaf(
            'params/kernel',
            'weight',
            lambda array: _drop_last_ones(array).T,
            lambda array: array.T[:, :, None, None],
        ),
        _BIAS,
    ),
    'batch_norm': (
        _SCALE,
        _BIAS,
        Leaf('batch_stats/mean', 'running_mean'),
        Leaf('batch_stats/var', 'running_var'),
    ),
    'layer_norm': (_SCALE, _BIAS),
    # Normalised over [planes, 1, 1] there.
    'layer_norm_of_map': tuple(
        Leaf(
            leaf.ours, leaf.theirs, lambda array: _drop_last_ones(array), lambda a: a[:, None, None]
        )
        for leaf in (_SCALE, _BIAS)
    ),
}


def _drop_last_ones(array: np.ndarray) -> np.ndarray:
    # squeeze raises where the sizes are not 1, so a wrong shape is never reshaped into a right one
    return array.squeeze((-2, -1))


@dataclasses.dataclass(frozen=True)
class Rule:
    """A module here and there.

    Attributes:
      ours, theirs: The module's path here ('/' between the parts) and its name there.
      kind: One of the kinds of module above.
      beside: A module that must be in the same block here for the rule to hold.
    """

    ours: str
    theirs: str
    kind: str
    beside: str = ''


@dataclasses.dataclass(frozen=True)
class Family:
    """The names that one library gives to the networks of one kind.

    Attributes:
      library: What the user calls it.
      module: The networks here that it can name.
      rules: The table.
      recognise: A file is of this family if each of these patterns matches one of its names.
      prefix: What stands before the network's names where it is a part of something larger.
      left: Patterns of names that are no part of the network, and what they are.
      may_be_new: Pattern of the paths here that are newly initialised where the file lacks them.
      may_be_lost: Pattern of the paths here that the library has no place for.
    """

    library: str
    module: type[nn.Module]
    rules: tuple[Rule, ...]
    recognise: tuple[str, ...]
    prefix: str = ''
    left: Mapping[str, str] = dataclasses.field(default_factory=dict)
    may_be_new: str = '(?!)'
    may_be_lost: str = '(?!)'


@dataclasses.dataclass(frozen=True)
class Pairing:
    """A leaf here, the tensor that it is there, and how one becomes the other."""

    ours: str
    theirs: str
    leaf: Leaf


def pair_names(family: Family, ours: Collection[str]) -> tuple[list[Pairing], list[str]]:
    """Names every leaf of a network as `family` does.

    Args:
      family: Whose names.
      ours: Paths of leaves, such as 'params/stage1_0/conv1/kernel'.

    Returns:
      The pairings, and the paths that the family has no name for.
    """
    compiled = [(re.compile(_pattern(rule.ours)), rule) for rule in family.rules]
    modules = {path.split('/', 1)[1].rpartition('/')[0] for path in ours}
    pairings, nameless = [], []
    for path in ours:
        pairing = next(
            filter(None, (_apply(rule, pattern, path, modules) for pattern, rule in compiled)), None
        )
        if pairing is None:
            nameless.append(path)
        else:
            pairings.append(pairing)
    return pairings, nameless


def _apply(rule: Rule, pattern: re.Pattern, path: str, modules: set[str]) -> Pairing | None:
    collection, rest = path.split('/', 1)
    module, _, name = rest.rpartition('/')
    match = pattern.fullmatch(module)
    if match is None:
        return None
    if rule.beside and f'{module.rpartition("/")[0]}/{rule.beside}' not in modules:
        return None
    numbers = {key: int(value) for key, value in match.groupdict().items()}
    theirs = re.sub(
        r'\{(\w+?)([+-]\d+)?\}', lambda m: str(numbers[m[1]] + int(m[2] or 0)), rule.theirs
    )
    for leaf in _KINDS[rule.kind]:
        if leaf.ours == f'{collection}/{name}':
            return Pairing(path, f'{theirs}.{leaf.theirs}', leaf)
    return None


def _pattern(template: str) -> str:
    return re.sub(r'\{(\w+)\}', r'(?P<\1>\\d+)', template)


def _inside(ours: str, theirs: str, parts: tuple[tuple[str, str, str], ...]) -> tuple[Rule, ...]:
    """Rules for the parts (path here, name there, kind) of one module."""
    return tuple(Rule(f'{ours}/{a}'.lstrip('/'), f'{theirs}{b}', kind) for a, b, kind in parts)


# mmcv's and the official repository's ContextBlock; index 2 of a branch is its ReLU.
_MMCV_CONTEXT = (
    ('pool/logits', 'conv_mask', 'pointwise'),
    ('add/reduce', 'channel_add_conv.0', 'pointwise'),
    ('add/norm', 'channel_add_conv.1', 'layer_norm_of_map'),
    ('add/expand', 'channel_add_conv.3', 'pointwise'),
    ('scale/reduce', 'channel_mul_conv.0', 'pointwise'),
    ('scale/norm', 'channel_mul_conv.1', 'layer_norm_of_map'),
    ('scale/expand', 'channel_mul_conv.3', 'pointwise'),
)
_TIMM_CONTEXT = (
    ('pool/logits', 'conv_attn', 'pointwise'),
    ('add/reduce', 'mlp_add.fc1', 'pointwise'),
    ('add/norm', 'mlp_add.norm', 'layer_norm'),
    ('add/expand', 'mlp_add.fc2', 'pointwise'),
    ('scale/reduce', 'mlp_scale.fc1', 'pointwise'),
    ('scale/norm', 'mlp_scale.norm', 'layer_norm'),
    ('scale/expand', 'mlp_scale.fc2', 'pointwise'),
)
_SEED_CONTEXT = (
    ('context_after_conv2_0/pool/logits', 'attn.conv', 'pointwise'),
    ('context_after_conv2_0/add/reduce', 'gc_transform.conv1', 'pointwise'),
    ('context_after_conv2_0/add/norm', 'gc_transform.ln', 'layer_norm_of_map'),
    ('context_after_conv2_0/add/expand', 'gc_transform.conv2', 'pointwise'),
    ('context_after_conv2_1/reduce', 'se_fc1', 'pointwise'),
    ('context_after_conv2_1/expand', 'se_fc2', 'pointwise'),
)


def _resnet(shortcut: str, classifier: str) -> tuple[Rule, ...]:
    """Rules for a ResNet, by the two names in which its libraries differ."""
    return (
        Rule('stem_conv', 'conv1', 'convolution'),
        Rule('stem_norm', 'bn1', 'batch_norm'),
        *_inside(
            'stage{stage}_{block}',
            'layer{stage}.{block}.',
            (
                ('conv{i}', 'conv{i}', 'convolution'),
                ('norm{i}', 'bn{i}', 'batch_norm'),
                ('shortcut_conv', f'{shortcut}.0', 'convolution'),
                ('shortcut_norm', f'{shortcut}.1', 'batch_norm'),
            ),
        ),
        Rule('classifier', classifier, 'linear'),
    )


_RESNET = _resnet('downsample', 'fc')
_SEED = (
    *_inside(
        'stage{stage}_0',
        'layer{stage}.',
        (
            ('conv{i}', 'conv{i}.conv', 'convolution'),
            ('norm{i}', 'bn{i}', 'batch_norm'),
            ('shortcut_conv', 'downsample.0.conv', 'convolution'),
            ('shortcut_norm', 'downsample.1', 'batch_norm'),
            *_SEED_CONTEXT,
        ),
    ),
    Rule('classifier', 'fc', 'linear'),
)
_BYOBNET = (
    Rule('stem_conv_{i}', 'stem.conv{i+1}.conv', 'convolution'),
    Rule('stem_norm_{i}', 'stem.conv{i+1}.bn', 'batch_norm'),
    *_inside(
        'stage{stage}_{block}',
        'stages.{stage-1}.{block}.',
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
    *_inside(
        'stage{stage}_{block}/context_after_conv2_0',
        'stages.{stage-1}.{block}.attn.',
        _TIMM_CONTEXT,
    ),
    Rule('head_conv', 'final_conv.conv', 'convolution'),
    Rule('head_norm', 'final_conv.bn', 'batch_norm'),
    Rule('classifier', 'head.fc', 'linear'),
)
_EFFICIENTNET = (
    Rule('stem_conv', 'conv_stem', 'convolution'),
    Rule('stem_norm', 'bn1', 'batch_norm'),
    *(
        Rule(
            f'stage{{stage}}_{{block}}/{ours}',
            f'blocks.{{stage-1}}.{{block}}.{theirs}',
            kind,
            beside,
        )
        for ours, theirs, kind, beside in (
            # an inverted residual
            ('expand_conv', 'conv_pw', 'convolution', 'depthwise_conv'),
            ('expand_norm', 'bn1', 'batch_norm', 'depthwise_conv'),
            ('depthwise_conv', 'conv_dw', 'convolution', ''),
            ('depthwise_norm', 'bn2', 'batch_norm', ''),
            ('project_conv', 'conv_pwl', 'convolution', 'depthwise_conv'),
            ('project_norm', 'bn3', 'batch_norm', 'depthwise_conv'),
            # an edge residual
            ('expand_conv', 'conv_exp', 'convolution', 'project_conv'),
            ('expand_norm', 'bn1', 'batch_norm', 'project_conv'),
            ('project_conv', 'conv_pwl', 'convolution', ''),
            ('project_norm', 'bn2', 'batch_norm', ''),
            # one convolution
            ('expand_conv', 'conv', 'convolution', ''),
            ('expand_norm', 'bn1', 'batch_norm', ''),
        )
    ),
    *_inside('stage{stage}_{block}/context', 'blocks.{stage-1}.{block}.se.', _TIMM_CONTEXT),
    Rule('head_conv', 'conv_head', 'convolution'),
    Rule('head_norm', 'bn2', 'batch_norm'),
    Rule('classifier', 'classifier', 'linear'),
)

_EVERYWHERE_LEFT = {
    r'(.*\.)?num_batches_tracked': 'counters that BatchNorm does not need at a fixed momentum',
    r'n_averaged': 'the length of an average of weights',
}

# In the order in which a file's names are compared with them.
FAMILIES = (
    Family(
        'gccnn',
        ResNet,
        _SEED,
        recognise=(r'layer1\.gc_transform\.conv1\.weight', r'layer1\.se_fc1\.weight'),
        left=_EVERYWHERE_LEFT,
    ),
    Family(
        'mmsegmentation',
        GlobalContext,
        _inside('', '', _MMCV_CONTEXT),
        recognise=(r'(decode_head\.gc_block\.)?channel_(add|mul)_conv\.0\.weight',),
        prefix='decode_head.gc_block.',
        left=_EVERYWHERE_LEFT
        | {
            r'backbone\..*': "the segmenter's backbone",
            r'decode_head\.(?!gc_block\.).*': 'the rest of its head',
            r'(auxiliary_head|neck|data_preprocessor)\..*': 'other parts of the segmenter',
        },
    ),
    Family(
        'mmdetection',
        ResNet,
        (
            *_RESNET,
            *_inside(
                'stage{stage}_{block}/context_after_conv{i}_0',
                'layer{stage}.{block}.context_block.',
                _MMCV_CONTEXT,
            ),
        ),
        recognise=(
            r'backbone\.layer1\.0\.conv1\.weight|.*\.context_block\.channel_.*_conv\.0\.weight',
        ),
        prefix='backbone.',
        left=_EVERYWHERE_LEFT
        | {
            r'(neck|rpn_head|roi_head|bbox_head|mask_head|semantic_head|data_preprocessor)\..*': (
                "the detector's neck and heads"
            )
        },
        may_be_new=r'params/classifier/.*',
        may_be_lost=r'params/classifier/.*',
    ),
    Family(
        'timm',
        ByobNet,
        _BYOBNET,
        recognise=(r'stages\.0\.0\.conv1_1x1\.conv\.weight',),
        left=_EVERYWHERE_LEFT,
    ),
    Family(
        'timm',
        EfficientNet,
        _EFFICIENTNET,
        recognise=(r'conv_stem\.weight', r'blocks\.0\.0\.conv\.weight'),
        left=_EVERYWHERE_LEFT,
    ),
    # akamaster's, which has both kinds of shortcuts; only its projections have names.
    Family(
        'pytorch_resnet_cifar10',
        ResNet,
        _resnet('shortcut', 'linear'),
        recognise=(r'conv1\.weight', r'layer1\.0\.conv1\.weight', r'linear\.weight'),
        left=_EVERYWHERE_LEFT,
        may_be_new=r'.*/context_.*',
    ),
    Family(
        'torchvision',
        ResNet,
        _RESNET,
        recognise=(r'conv1\.weight', r'layer1\.0\.conv1\.weight'),
        left=_EVERYWHERE_LEFT,
        may_be_new=r'.*/context_.*',
    ),
)
LIBRARIES = tuple(sorted({family.library for family in FAMILIES}))
