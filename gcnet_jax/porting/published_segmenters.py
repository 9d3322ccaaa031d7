"""The published segmenters: what their names and training configs say beyond their tensors.

Source: `configs/gcnet/metafile.yaml` of mmsegmentation 1.2.2. The last eight digits of a name are
the first of the file's own SHA-256, so that a file is known under any name.
"""

import hashlib
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from gcnet_jax.errors import CheckpointError, one_line
from gcnet_jax.models.registry import list_models
from gcnet_jax.porting.families.mmsegmentation_segmenter import differing, row_settings
from gcnet_jax.porting.files import TorchFile
from gcnet_jax.porting.mmsegmentation_config import GEOMETRY
from gcnet_jax.porting.told import (
    config_texts,
    fraction,
    groups,
    listed,
    refuse_contradictions,
    setting,
    whole_numbers,
)

# By the digits: what is particular to a name, and its date.
_ROWS = {
    '4b0fd17b': ('r50-d8_512x1024_40k_cityscapes', '20200618_074436'),
    '5e62567f': ('r101-d8_512x1024_40k_cityscapes', '20200618_074436'),
    'a26f4471': ('r50-d8_769x769_40k_cityscapes', '20200618_182814'),
    'ca4f0a84': ('r101-d8_769x769_40k_cityscapes', '20200619_092550'),
    'ef8f069b': ('r50-d8_512x1024_80k_cityscapes', '20200618_074450'),
    '778ebf69': ('r101-d8_512x1024_80k_cityscapes', '20200618_074450'),
    '4839565b': ('r50-d8_769x769_80k_cityscapes', '20200619_092516'),
    '8e043423': ('r101-d8_769x769_80k_cityscapes', '20200619_092628'),
    '91a6da41': ('r50-d8_512x512_80k_ade20k', '20200614_185146'),
    'c3fcb6dd': ('r101-d8_512x512_80k_ade20k', '20200615_020811'),
    'd95f3e1f': ('r50-d8_512x512_160k_ade20k', '20200615_224122'),
    '615528d7': ('r101-d8_512x512_160k_ade20k', '20200615_225406'),
    '3cbfdab1': ('r50-d8_512x512_20k_voc12aug', '20200617_165701'),
    '6c720aa9': ('r101-d8_512x512_20k_voc12aug', '20200617_165713'),
    '9797336d': ('r50-d8_512x512_40k_voc12aug', '20200613_195105'),
    '1e38208d': ('r101-d8_512x512_40k_voc12aug', '20200613_185806'),
}
PUBLISHED = {digits: f'gcnet_{name}_{date}-{digits}.pth' for digits, (name, date) in _ROWS.items()}
# What the crop in a name means for the logits; all other crops are of training alone.
_SLIDING = {
    '769x769': {'window': 769, 'window_stride': 513, 'align_corners': True},
    '480x480': {'window': 480, 'window_stride': 320, 'align_corners': False},
}
_WHOLE = {'window': None, 'window_stride': None, 'align_corners': False}
_CLASSES = {
    'cityscapes': 19,
    'ade20k': 150,
    'voc12': 21,
    'voc12aug': 21,
    'pascal_context': 60,
    'pascal_context_59': 59,
    'coco_stuff10k': 171,
    'coco_stuff164k': 171,
}
_HEADS = {'gcnet': 'GCHead', 'fcn': 'FCNHead', 'fcn_d6': 'FCNHead'}
_BACKBONES = {'ResNetV1c': '', 'ResNet': 'b', 'ResNetV1d': 'd'}
_HEAD_DILATION = 'dilation of the head'
# What tensors do not tell, and how it is chosen.
_CHOSEN = (*_WHOLE, 'output_stride')


def choose_row(
    sources: Mapping[str, Mapping[str, Any]], name: str, options: Mapping[str, Any]
) -> tuple[str, dict[str, Any], tuple[str, ...]]:
    """Returns the row and the options that compute what the file's network did, and notes.

    Whether logits are those of windows, how they are enlarged and how far the backbone is dilated
    is not in its tensors. Where its digits, its name and its config do not tell either, `name`
    stays, and a note says so. Options that are given stay, too.

    Args:
      sources: Of `sources_of`.
      name, options: What the tensors tell.
    """
    told: dict[str, Any] = {}
    for source in reversed(sources.values()):
        told |= {key: source[key] for key in _CHOSEN if not isinstance(source.get(key, ''), str)}
    other = f'{name}_769'
    has_other = other in list_models()
    notes = ()
    if has_other and 'window' not in told | options:
        notes = (
            f'nothing in the file says whether its network slides windows: {name} computes whole '
            f'images, --model {other} slides windows of 769 pixels',
        )
    row = {key: row_settings(name)[key] for key in _WHOLE}
    if has_other and row | told | _SLIDING['769x769'] == row | told:
        name = other
    return name, differing(name, told)[1] | dict(options), notes


def check_told(
    path: Path,
    sources: Mapping[str, Mapping[str, Any]],
    name: str,
    options: Mapping[str, Any],
    asked: Collection[str] = (),
) -> None:
    """Compares what a file says with the network that is built.

    Args:
      path: Of a segmenter.
      sources: Of `sources_of`.
      name, options: The network.
      asked: Options that whoever loads the file gave, which count.

    Raises:
      CheckpointError: The file contradicts its tensors, or this network computes something else of
        them; says both.
    """
    settings = row_settings(name) | options
    found = _from_tensors(settings)
    if 'num_classes' in asked:
        del found['classes']
    refuse_contradictions(path, sources, found)
    computed = {key: value for key, value in _computed(settings).items() if key not in asked}
    for source, told in sources.items():
        wrong = [key for key, value in told.items() if key in computed and value != computed[key]]
        if wrong:
            raise CheckpointError(
                f'{one_line(path)}: its {source} says {listed(told, wrong)}, and {name} has '
                f'{listed(computed, wrong)}: the same tensors, another computation. Leave --model '
                'out to have the network chosen, if it is among those here; --ignore-architecture '
                'takes the weights as they are'
            )


def _from_tensors(settings: Mapping[str, Any]) -> dict[str, Any]:
    ratio = settings['context_ratio']
    depth = re.fullmatch(r'resnet(\d+)', settings['backbone'])
    found = {
        'head': 'GCHead' if ratio else 'FCNHead',
        'classes': settings['num_classes'],
    }
    if depth:
        found['backbone'] = f'r{depth[1]}{"" if settings.get("stem") == "deep" else "b"}'
    return found | ({'ratio': round(ratio, 6)} if ratio else {})


def _computed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a network that its tensors do not tell, by the names here and there."""
    stride = settings.get('output_stride') or 32
    # The first block of a dilated stage has the dilation before.
    contracted = {'contract_dilation': True} if stride < 32 else {}
    geometry = {'output_stride': stride, 'dilations': GEOMETRY[stride][1]}
    return {key: settings[key] for key in _WHOLE} | geometry | contracted | {_HEAD_DILATION: 1}


def sources_of(file: TorchFile) -> dict[str, dict[str, Any]]:
    """What a file's digits, its name and its config say, the most reliable first."""
    return {
        'SHA-256': _told_by_digits(file.path),
        'name': told_by_name(file.path.name),
        'config': _config(file.metadata),
    }


def _told_by_digits(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    with path.open('rb') as opened:
        digits = hashlib.file_digest(opened, 'sha256').hexdigest()[:8]
    return told_by_name(PUBLISHED.get(digits, ''))


_STYLE = re.compile(
    r'(?P<head>[a-z][a-z0-9_+-]*?)_(?P<backbone>r\d+[a-d]?)-d(?P<stride>8|16|32)'
    r'(_(fp16_)?(?P<crop>\d+x\d+)_\d+k_(?P<data>[a-z0-9_-]+?)'
    r'|_\d+xb\d+-(amp-)?\d+k_(?P<new_data>[a-z0-9_-]+?)-(?P<new_crop>\d+x\d+))'
    r'(_\d{8}_\d{6})?(-[0-9a-f]{8})?\.(pth|pt|safetensors)'
)


def told_by_name(name: str) -> dict[str, Any]:
    """Returns what the name of a file says, if it is in the style of mmsegmentation.

    Such as `gcnet_r50-d8_512x1024_40k_cityscapes_DATE-DIGITS.pth`, or the name of a config.
    """
    found = _STYLE.fullmatch(name)
    if not found:
        return {}
    head = found['head'].replace('-', '_')
    told = {
        'head': _HEADS.get(head, f'of {head}'),
        'backbone': found['backbone'],
        'output_stride': int(found['stride']),
        _HEAD_DILATION: 6 if head == 'fcn_d6' else 1,
    }
    data_set = (found['data'] or found['new_data']).replace('-', '_')
    if data_set in _CLASSES:
        told['classes'] = _CLASSES[data_set]
    return told | _SLIDING.get(found['crop'] or found['new_crop'], _WHOLE)


def _config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What the config that a file was trained with says, as `told_by_name`; empty without one."""
    for text in config_texts(metadata):
        backbone, head = (next(groups(n, text), '') for n in ('backbone', 'decode_head'))
        if backbone and head:
            return _backbone(backbone) | _head(head) | _inference(text)
    return {}


def _backbone(text: str) -> dict[str, Any]:
    told: dict[str, Any] = {}
    kind, depth = (
        re.search(setting(*pair), text) for pair in (('type', r'\w+'), ('depth', r'\d+'))
    )
    if kind and depth:
        told['backbone'] = f'r{depth[1]}{_BACKBONES.get(kind[1], f" of {kind[1]}")}'
    dilations = whole_numbers('dilations', text)
    if dilations is not None:
        told['dilations'] = dilations
        told['contract_dilation'] = _is_true('contract_dilation', text)
    strides = whole_numbers('strides', text)
    if strides:
        told['output_stride'] = 4 * math.prod(strides)
    return told


def _head(text: str) -> dict[str, Any]:
    told: dict[str, Any] = {'align_corners': _is_true('align_corners', text)}
    kind, classes, dilation = (
        re.search(setting(*pair), text)
        for pair in (('type', r'\w+'), ('num_classes', r'\d{1,9}'), ('dilation', r'\d{1,9}'))
    )
    if kind:
        told['head'] = kind[1]
    if classes:
        told['classes'] = int(classes[1])
    told[_HEAD_DILATION] = int(dilation[1]) if dilation else 1
    ratio = fraction('ratio', text)
    if ratio is not None and told.get('head') == 'GCHead':
        told['ratio'] = round(ratio, 6)
    return told


def _inference(text: str) -> dict[str, Any]:
    for group in groups('test_cfg', text):
        mode = re.search(setting('mode', 'whole|slide'), group)
        crop, stride = (whole_numbers(name, group) for name in ('crop_size', 'stride'))
        if mode and mode[1] == 'whole':
            return {'window': None, 'window_stride': None}
        if mode and crop and stride:
            return {'window': _side(crop), 'window_stride': _side(stride)}
    return {}


def _side(sides: tuple[int, ...]) -> int | str:
    """One number where all are the same; else a text, which no network here can have."""
    return sides[0] if len({*sides}) == 1 else 'x'.join(map(str, sides))


def _is_true(name: str, text: str) -> bool:
    return re.search(setting(name, '[Tt]rue'), text) is not None
