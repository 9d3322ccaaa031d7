"""The published detectors: what their names and training configs say, and which were replaced.

Sources: `configs/gcnet/metafile.yml` of mmdetection 3.3.0 for the files of version 2 and later, and
the README of the official repository for those of 2019. The last eight digits of a name are the
first of the file's own SHA-256, so that a file is known under any name.

The version of mmdetection in a file is not read: the files of February and March 2020 come from a
branch that followed the rules of version 2 before its release.
"""

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gcnet_jax.errors import CheckpointError, one_line
from gcnet_jax.models.detectors import FROZEN
from gcnet_jax.models.mask_rcnn import MaskRCNN
from gcnet_jax.models.registry import list_models, model_entry
from gcnet_jax.porting.families.rules import Family
from gcnet_jax.porting.files import TorchFile
from gcnet_jax.porting.told import config_texts, fraction, refuse_contradictions, setting

SYNCBN = '_syncbn'


@dataclasses.dataclass(frozen=True)
class Published:
    """A file of mmdetection's model zoo.

    Attributes:
      file: Its name.
      model: The network here.
      of_2019: The digits in the name of the same network's file of 2019.
      withdrawn: Those of an earlier file of this name that held other weights; '' if none.
    """

    file: str
    model: str
    of_2019: str
    withdrawn: str = ''


_DCN = 'cascade_mask_rcnn_x101_32x4d_fpn_syncbn-backbone_dconv_c3-c5'
_CASCADE = 'cascade_mask_rcnn_x101_32x4d_fpn_syncbn-backbone'
_R50, _R101, _X101 = (
    f'mask_rcnn_{depth}_fpn_syncbn-backbone' for depth in ('r50', 'r101', 'x101_32x4d')
)
_R16, _R4 = 'r16_gcb_c3-c5', 'r4_gcb_c3-c5'
_ROWS = (
    ('mask_rcnn_r50_fpn', _R16, '20200515_211915-187da160', 'gc_mask_rcnn_resnet50', 'c550c707'),
    ('mask_rcnn_r50_fpn', _R4, '20200204-17235656', 'gc_mask_rcnn_resnet50_r4', '18ae2dfd'),
    ('mask_rcnn_r101_fpn', _R16, '20200205-e58ae947', 'gc_mask_rcnn_resnet101', 'f4456442'),
    ('mask_rcnn_r101_fpn', _R4, '20200206-af22dc9d', 'gc_mask_rcnn_resnet101_r4', '1ee20d5f'),
    (_R50, '', '20200202-bb3eb55c', 'mask_rcnn_resnet50', 'bccc62fa'),
    (_R50, _R16, '20200202-587b99aa', 'gc_mask_rcnn_resnet50', 'a0169c20'),
    (_R50, _R4, '20200202-50b90e5c', 'gc_mask_rcnn_resnet50_r4', 'ace08792'),
    (_R101, '', '20200210-81658c8a', 'mask_rcnn_resnet101', 'b2a0e2b7'),
    (_R101, _R16, '20200207-945e77ca', 'gc_mask_rcnn_resnet101', '717e6dbd'),
    (_R101, _R4, '20200206-8407a3f0', 'gc_mask_rcnn_resnet101_r4', 'a893c718'),
    (_X101, '', '20200211-7584841c', 'mask_rcnn_resnext101', 'bb8ae7e5'),
    (_X101, _R16, '20200211-cbed3d2c', 'gc_mask_rcnn_resnext101', 'c28edb53'),
    (_X101, _R4, '20200212-68164964', 'gc_mask_rcnn_resnext101_r4', '930b3d51'),
    (_CASCADE, '', '20200310-d5ad2a5e', 'cascade_mask_rcnn_resnext101', '63a800fb'),
    (_CASCADE, _R16, '20200211-10bf2463', 'gc_cascade_mask_rcnn_resnext101', '3e168d88'),
    (_CASCADE, _R4, '20200703_180653-ed035291', 'gc_cascade_mask_rcnn_resnext101_r4', 'b579157f'),
    (
        *(_DCN, '', '20210615_211019-abbc39ea', 'cascade_mask_rcnn_resnext101_dcn', '9aa8c394'),
        '680fc3f2',
    ),
    (
        *(_DCN, _R16, '20210615_215648-44aa598a', 'gc_cascade_mask_rcnn_resnext101_dcn'),
        *('b86027a6', '08f56b56'),
    ),
    (
        *(_DCN, _R4, '20210615_161851-720338ec', 'gc_cascade_mask_rcnn_resnext101_dcn_r4'),
        *('b4164f6b', '24cabcfd'),
    ),
)


def _published(layers: str, blocks: str, date: str, model: str, *digits: str) -> Published:
    file = '_'.join(part for part in (layers, blocks, '1x_coco', f'{date}.pth') if part)
    norm = SYNCBN if 'syncbn' in layers else ''
    return Published(file, f'{model}_fpn{norm}', *digits)


PUBLISHED = tuple(_published(*row) for row in _ROWS)
WITHDRAWN = {row.withdrawn: row for row in PUBLISHED if row.withdrawn}
OF_2019 = {row.of_2019: row for row in PUBLISHED}


def refuse_withdrawn_name(path: Path) -> None:
    """Refuses a file that has the name of a withdrawn one, before it is read.

    Raises:
      CheckpointError: Says why it was withdrawn, and which file to take instead.
    """
    found = re.search(r'-([0-9a-f]{8})\.(pth|pt)$', path.name)
    if found:
        _refuse_withdrawn(path, found[1])


def refuse_superseded(file: TorchFile, family: Family) -> None:
    """Refuses a detector of mmdetection that another file of the same network replaced.

    Raises:
      CheckpointError: The file was withdrawn, or it is read as a whole detector and follows the
        rules of 2019. Names the file to take instead.
    """
    if family.library != 'mmdetection':
        return
    with file.path.open('rb') as opened:
        digits = hashlib.file_digest(opened, 'sha256').hexdigest()[:8]
    _refuse_withdrawn(file.path, digits)
    if digits in OF_2019 and family.module is MaskRCNN:
        raise CheckpointError(
            f'{one_line(file.path)} is a detector of the official repository of 2019 '
            '(mmdetection 1), which computes other boxes from the same layers: take '
            f'{OF_2019[digits].file}, which replaced it, or name its backbone alone, such as '
            '--model gc_resnet50'
        )


def _refuse_withdrawn(path: Path, digits: str) -> None:
    if digits in WITHDRAWN:
        raise CheckpointError(
            f'{one_line(path)} was withdrawn by its authors: it should hold a ResNeXt-101 and '
            f'holds a ResNet-50; take {WITHDRAWN[digits].file}, which replaced it'
        )


def check_told(file: TorchFile, name: str, options: Mapping[str, Any]) -> None:
    """Compares what a file's name and training config say with the network its tensors are of.

    Args:
      file: Of a detector.
      name, options: The network that is built of it.

    Raises:
      CheckpointError: They contradict each other; says both.
    """
    settings = dict(model_entry(name).module.keywords) | dict(options)
    row = dict(model_entry(settings['backbone']).module.keywords)
    context = settings.get('context', row.get('context')) or {'ratio': 0}
    found = {
        'backbone': _short(settings['backbone']),
        'heads': 'Cascade Mask R-CNN' if settings.get('cascade') else 'Mask R-CNN',
        'convolutions': 'deformable' if settings.get('deformable_stages') else 'ordinary',
    }
    if isinstance(context, Mapping) and 'ratio' in context:
        found['context'] = _ratio(context['ratio'])
    sources = {'name': told_by_name(file.path), 'config': _config(file.metadata)}
    refuse_contradictions(file.path, sources, found)


def choose_norm(
    file: TorchFile, name: str, options: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Returns the row, or the options, whose norms do in training what they did in the file's.

    The layers are the same. Where neither its name nor its config tells, `name` stays.
    """
    told = _config(file.metadata) | told_by_name(file.path)
    is_synced = told.get('norm')
    if 'norm' in options or is_synced in (None, name.endswith(SYNCBN)):
        return name, dict(options)
    other = f'{name}{SYNCBN}' if is_synced else name.removesuffix(SYNCBN)
    if other in list_models():
        return other, dict(options)
    return name, dict(options) | ({} if is_synced else {'norm': FROZEN})


def _short(backbone: str) -> str:
    """mmdetection's name of a backbone: 'r50' of 'resnet50', 'x101_32x4d' of 'resnext101_32x4d'."""
    return re.sub('^resnet', 'r', re.sub('^resnext', 'x', backbone.removeprefix('gc_')))


_STYLE = re.compile(
    r'(?P<cascade>cascade[-_])?mask[-_]rcnn_(.*[-_])?(?P<backbone>[rx](18|34|50|101|152))'
    r'([-_](?P<groups>\d+x\d+d))?[-_].*fpn.*_\dx(_coco)?([_.-]|$)'
)


def told_by_name(path: Path) -> dict[str, Any]:
    """Returns what the name of a file says, if it is in the style of mmdetection.

    Such as `mask_rcnn_r50_fpn_r16_gcb_c3-c5_1x_coco_DATE-DIGITS.pth`, or the name of a config. In
    these names what is not mentioned is not there.

    Returns:
      'backbone', 'heads', 'convolutions', 'context' and 'norm' (True for SyncBN); empty for a name
      in another style.
    """
    found = _STYLE.match(path.name)
    if not found:
        return {}
    words = re.split(r'[-_.]', path.name)
    groups = f'_{found["groups"]}' if found['groups'] else ''
    caffe = '_caffe' if 'caffe' in words else ''
    ratios = [word for word in words if re.fullmatch(r'r(4|16)', word)]
    told = {
        'backbone': f'{found["backbone"]}{groups}{caffe}',
        'heads': 'Cascade Mask R-CNN' if found['cascade'] else 'Mask R-CNN',
        'convolutions': 'deformable' if {'dconv', 'dcn', 'mdconv'} & {*words} else 'ordinary',
        'norm': 'syncbn' in words,
    }
    if 'gcb' not in words:
        told['context'] = 'none'
    elif ratios:
        told['context'] = ratios[0]
    return told


def _config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What the config that a file was trained with says, as `told_by_name`; empty without one."""
    for text in config_texts(metadata):
        heads = re.search(setting('type', '|'.join(_HEADS)), text)
        depth = re.search(setting('depth', r'\d+'), text)
        if not heads or not depth:
            continue
        told: dict[str, Any] = {'heads': _HEADS[heads[1]], 'norm': 'SyncBN' in text}
        if re.search(setting('type', 'ResNet'), text):
            told['backbone'] = f'r{depth[1]}'
        groups, width = (re.search(setting(x, r'\d+'), text) for x in ('groups', 'base_width'))
        if groups and width and re.search(setting('type', 'ResNeXt'), text):
            told['backbone'] = f'x{depth[1]}_{groups[1]}x{width[1]}d'
        is_deformable = re.search(setting('type', 'DCN(?:v2)?'), text)
        told['convolutions'] = 'deformable' if is_deformable else 'ordinary'
        block = re.search(r'[^()]*ContextBlock[^()]*', text)
        ratio = block and fraction('ratio', block[0])
        if not block:
            told['context'] = 'none'
        elif ratio is not None:
            told['context'] = _ratio(ratio)
        return told
    return {}


_HEADS = {
    'MaskRCNN': 'Mask R-CNN',
    'CascadeRCNN': 'Cascade Mask R-CNN',
    'FasterRCNN': 'Faster R-CNN',
    'HybridTaskCascade': 'HybridTaskCascade',
}


def _ratio(ratio: float) -> str:
    return f'r{round(1 / ratio)}' if ratio > 1e-6 else 'none'
