"""The config of a segmenter in the form of mmsegmentation, which its file needs beside its tensors.

Dilation, windows and the rule by which logits are enlarged are in no tensor. mmsegmentation takes
them from a config, and so does whoever ports the file again.
"""

import pprint
import re
from typing import Any

from gcnet_jax.data.preprocessing import KeepRatio
from gcnet_jax.models.encoder_decoder import EncoderDecoder
from gcnet_jax.models.options import module_options
from gcnet_jax.porting.families.mmsegmentation_segmenter import row_settings
from gcnet_jax.stored import ModelDescription

# Strides and dilations of the stages, by the image's size over that of the last map.
GEOMETRY = {
    4: ((1, 1, 1, 1), (1, 2, 4, 8)),
    8: ((1, 2, 1, 1), (1, 1, 2, 4)),
    16: ((1, 2, 2, 1), (1, 1, 1, 2)),
    32: ((1, 2, 2, 2), (1, 1, 1, 1)),
}
_NORM = {'type': 'SyncBN', 'requires_grad': True}


def config_of(description: ModelDescription) -> str:
    """Returns the config of a segmenter as Python; '' for one that mmsegmentation does not have.

    Args:
      description: Of the network.
    """
    settings = row_settings(description.name) | dict(description.options)
    depth = re.fullmatch(r'resnet(18|34|50|101|152)', settings['backbone'])
    known = {*module_options(EncoderDecoder), 'stem', 'output_stride'}
    norm = settings.get('norm')
    kind = norm.get('kind', 'batch') if hasattr(norm, 'get') else 'batch'
    if not depth or settings.keys() - known or kind == 'group':
        return ''
    model = {
        'type': 'EncoderDecoder',
        'data_preprocessor': _preprocessor(description.preprocessing),
        'backbone': _backbone(int(depth[1]), settings),
        'decode_head': _head(int(depth[1]), settings),
    }
    if settings['auxiliary_channels']:
        model['auxiliary_head'] = _auxiliary_head(int(depth[1]), settings)
    test = {'mode': 'whole'}
    if settings['window'] is not None:
        sides = [(settings[key],) * 2 for key in ('window', 'window_stride')]
        test = {'mode': 'slide', 'crop_size': sides[0], 'stride': sides[1]}
    model |= {'train_cfg': {}, 'test_cfg': test}
    return f'model = {pprint.pformat(model, sort_dicts=False)}\n'


def _preprocessor(preprocessing: KeepRatio) -> dict[str, Any]:
    statistics = {
        name: [round(255 * value, 4) for value in getattr(preprocessing, name)]
        for name in ('mean', 'std')
    }
    padding = {'pad_val': 0, 'seg_pad_val': 255}
    return {'type': 'SegDataPreProcessor', **statistics, 'bgr_to_rgb': True, **padding}


def _backbone(depth: int, settings: dict[str, Any]) -> dict[str, Any]:
    strides, dilations = GEOMETRY[settings.get('output_stride') or 32]
    return {
        'type': 'ResNetV1c' if settings.get('stem') == 'deep' else 'ResNet',
        'depth': depth,
        'num_stages': 4,
        'out_indices': (0, 1, 2, 3),
        'dilations': dilations,
        'strides': strides,
        'norm_cfg': _NORM,
        'norm_eval': False,
        'style': 'pytorch',
        'contract_dilation': True,
    }


def _head(depth: int, settings: dict[str, Any]) -> dict[str, Any]:
    ratio = settings['context_ratio']
    kind: dict[str, Any] = {'type': 'FCNHead', 'num_convs': 2}
    if ratio is not None:
        kind = {'type': 'GCHead', 'ratio': ratio, 'pooling_type': 'att'}
        kind['fusion_types'] = ('channel_add',)
    return {
        **kind,
        'in_channels': 512 if depth < 50 else 2048,
        'in_index': 3,
        'channels': settings['channels'],
        'concat_input': True,
        **_common(settings, 1.0),
    }


def _auxiliary_head(depth: int, settings: dict[str, Any]) -> dict[str, Any]:
    return {
        'type': 'FCNHead',
        'in_channels': 256 if depth < 50 else 1024,
        'in_index': 2,
        'channels': settings['auxiliary_channels'],
        'num_convs': 1,
        'concat_input': False,
        **_common(settings, 0.4),
    }


def _common(settings: dict[str, Any], loss_weight: float) -> dict[str, Any]:
    loss = {'type': 'CrossEntropyLoss', 'use_sigmoid': False, 'loss_weight': loss_weight}
    return {
        'dropout_ratio': settings['dropout_rate'],
        'num_classes': settings['num_classes'],
        'norm_cfg': _NORM,
        'align_corners': settings['align_corners'],
        'loss_decode': loss,
    }
