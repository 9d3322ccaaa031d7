"""The segmenters of the registry: mmsegmentation's GCNet configurations. A variant is a row.

Rows named `gc_*` have global context r4 in the head, all others are fully convolutional networks
with the same layers. mmsegmentation's backbones are dilated to output stride 8 ("D8") and have a
stem of three convolutions ("ResNetV1c"). `*_769` are the rows that slide a window of 769 pixels.
`*_resnet18_d16` are small networks for one's own scenes.
"""

from functools import partial

from gcnet_jax.data.preprocessing import KeepRatio
from gcnet_jax.models.encoder_decoder import EncoderDecoder
from gcnet_jax.models.entry import ModelEntry

CITYSCAPES = KeepRatio(short_side=1024, long_side=2048, multiple_of=1, train_size=(512, 1024))
CITYSCAPES_769 = KeepRatio(short_side=1025, long_side=2049, multiple_of=1, train_size=769)
# ADE20K and PASCAL VOC.
SCENES = KeepRatio(short_side=512, long_side=2048, multiple_of=1, train_size=512)
OWN = KeepRatio(short_side=360, long_side=480, multiple_of=1, train_size=(240, 320))

d8 = partial(EncoderDecoder, output_stride=8, stem='deep')
gc_50 = partial(d8, backbone='resnet50')
gc_101 = partial(d8, backbone='resnet101')
fcn_50 = partial(gc_50, context_ratio=None)
fcn_101 = partial(gc_101, context_ratio=None)
gc_18 = partial(
    EncoderDecoder, backbone='resnet18', output_stride=16, channels=128, auxiliary_channels=64
)
fcn_18 = partial(gc_18, context_ratio=None)
windows = {'align_corners': True, 'window': 769, 'window_stride': 513}


def _entry(
    name: str, module: partial, description: str, preprocessing: KeepRatio = CITYSCAPES, **options
) -> ModelEntry:
    return ModelEntry(name, partial(module, **options), preprocessing, description, 'segmentation')


def _rows(name: str, module: partial, description: str) -> tuple[ModelEntry, ...]:
    return (
        _entry(f'{name}_cityscapes', module, f'{description}, Cityscapes', num_classes=19),
        _entry(
            f'{name}_cityscapes_769',
            module,
            f'{description}, Cityscapes, windows of 769',
            CITYSCAPES_769,
            num_classes=19,
            **windows,
        ),
        _entry(f'{name}_ade20k', module, f'{description}, ADE20K', SCENES, num_classes=150),
        _entry(f'{name}_voc', module, f'{description}, PASCAL VOC', SCENES, num_classes=21),
    )


SEGMENTERS = (
    *_rows('gc_resnet50_d8', gc_50, 'GC r4 in the head'),
    *_rows('gc_resnet101_d8', gc_101, 'GC r4 in the head'),
    *_rows('fcn_resnet50_d8', fcn_50, 'FCN'),
    *_rows('fcn_resnet101_d8', fcn_101, 'FCN'),
    _entry('gc_resnet18_d16', gc_18, 'GC r4 in the head, small', OWN),
    _entry('fcn_resnet18_d16', fcn_18, 'FCN, small', OWN),
)
