"""The detectors of the registry: mmdetection's GCNet configurations. A variant is a row.

In rows named `gc_*` the backbone has global context behind conv3 in every block of stages 2 to 4
(c3 to c5), r16 unless the name says otherwise. The backbone's norms are frozen in training
("fixBN"), or in rows named `*_syncbn` use the statistics of the batch on all devices.
"""

from functools import partial

from gcnet_jax.data.preprocessing import KeepRatio
from gcnet_jax.models.classifiers import gc_bottleneck, gc_bottleneck_r4
from gcnet_jax.models.entry import ModelEntry
from gcnet_jax.models.mask_rcnn import MaskRCNN

COCO = KeepRatio()
FROZEN = {'kind': 'frozen'}

mask_rcnn = partial(MaskRCNN, num_classes=80)
mask_50 = partial(mask_rcnn, backbone='resnet50')
mask_101 = partial(mask_rcnn, backbone='resnet101')
mask_x101 = partial(mask_rcnn, backbone='resnext101_32x4d')
cascade = partial(mask_x101, cascade=True)
cascade_dcn = partial(cascade, deformable_stages=(2, 3, 4))
r16, r4 = {'context': gc_bottleneck}, {'context': gc_bottleneck_r4}


def _entry(name: str, module: partial, description: str, **options) -> ModelEntry:
    return ModelEntry(name, partial(module, **options), COCO, description, 'detection')


def _frozen(name: str, module: partial, description: str, **options) -> ModelEntry:
    return _entry(name, module, description, norm=FROZEN, **options)


DETECTORS = (
    _frozen('mask_rcnn_resnet50_fpn', mask_50, 'Mask R-CNN R50-FPN'),
    _frozen('gc_mask_rcnn_resnet50_fpn', mask_50, 'GC r16 in c3-c5', **r16),
    _frozen('gc_mask_rcnn_resnet50_r4_fpn', mask_50, 'GC r4 in c3-c5', **r4),
    _frozen('mask_rcnn_resnet101_fpn', mask_101, 'Mask R-CNN R101-FPN'),
    _frozen('gc_mask_rcnn_resnet101_fpn', mask_101, 'GC r16 in c3-c5', **r16),
    _frozen('gc_mask_rcnn_resnet101_r4_fpn', mask_101, 'GC r4 in c3-c5', **r4),
    _entry('mask_rcnn_resnet50_fpn_syncbn', mask_50, 'Mask R-CNN R50-FPN'),
    _entry('gc_mask_rcnn_resnet50_fpn_syncbn', mask_50, 'GC r16 in c3-c5', **r16),
    _entry('gc_mask_rcnn_resnet50_r4_fpn_syncbn', mask_50, 'GC r4 in c3-c5', **r4),
    _entry('mask_rcnn_resnet101_fpn_syncbn', mask_101, 'Mask R-CNN R101-FPN'),
    _entry('gc_mask_rcnn_resnet101_fpn_syncbn', mask_101, 'GC r16 in c3-c5', **r16),
    _entry('gc_mask_rcnn_resnet101_r4_fpn_syncbn', mask_101, 'GC r4 in c3-c5', **r4),
    _entry('mask_rcnn_resnext101_fpn_syncbn', mask_x101, 'Mask R-CNN X101-32x4d-FPN'),
    _entry('gc_mask_rcnn_resnext101_fpn_syncbn', mask_x101, 'GC r16 in c3-c5', **r16),
    _entry('gc_mask_rcnn_resnext101_r4_fpn_syncbn', mask_x101, 'GC r4 in c3-c5', **r4),
    _entry('cascade_mask_rcnn_resnext101_fpn_syncbn', cascade, 'Cascade Mask R-CNN X101-FPN'),
    _entry('gc_cascade_mask_rcnn_resnext101_fpn_syncbn', cascade, 'GC r16 in c3-c5', **r16),
    _entry('gc_cascade_mask_rcnn_resnext101_r4_fpn_syncbn', cascade, 'GC r4 in c3-c5', **r4),
    _entry('cascade_mask_rcnn_resnext101_dcn_fpn_syncbn', cascade_dcn, 'with DCN in c3-c5'),
    _entry(
        'gc_cascade_mask_rcnn_resnext101_dcn_fpn_syncbn', cascade_dcn, 'DCN, GC r16 in c3-c5', **r16
    ),
    _entry(
        'gc_cascade_mask_rcnn_resnext101_dcn_r4_fpn_syncbn',
        cascade_dcn,
        'DCN, GC r4 in c3-c5',
        **r4,
    ),
)
