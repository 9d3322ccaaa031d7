"""Stand-ins for mmcv's compiled operators, which mmcv-lite lacks; needs torchvision.

The detectors of GCNet call three of them, for which the kernels of torchvision, the same code,
stand in here; its segmenters call none. mmdetection and mmsegmentation import all of them.
"""

import importlib.machinery
import sys
import types

import torchvision.ops


def _roi_align(
    features, rois, output, argmax_y, argmax_x, *, aligned_height, aligned_width, spatial_scale,
    sampling_ratio, pool_mode, aligned,
):  # fmt: skip
    assert pool_mode == 1  # The average.
    size = aligned_height, aligned_width
    output.copy_(
        torchvision.ops.roi_align(features, rois, size, spatial_scale, sampling_ratio, aligned)
    )


def _nms(boxes, scores, *, iou_threshold, offset):
    assert offset == 0
    return torchvision.ops.nms(boxes, scores, iou_threshold)


def _deform_conv(
    features, weight, offset, output, columns, ones, *, kW, kH, dW, dH, padW, padH, dilationW,
    dilationH, group, deformable_group, im2col_step,
):  # fmt: skip
    output.copy_(
        torchvision.ops.deform_conv2d(
            features, offset, weight, None, (dH, dW), (padH, padW), (dilationH, dilationW)
        )
    )


class _Operators(types.ModuleType):
    """`mmcv._ext`: every other operator is there by name only."""

    roi_align_forward = staticmethod(_roi_align)
    nms = staticmethod(_nms)
    deform_conv_forward = staticmethod(_deform_conv)

    def __getattr__(self, name):
        if name.startswith('__'):
            raise AttributeError(name)
        return lambda *_, **__: (_ for _ in ()).throw(NotImplementedError(f'mmcv._ext.{name}'))


def stand_in() -> None:
    """Makes the stand-ins what `import mmcv.ops` finds; call it before."""
    operators = _Operators('mmcv._ext')
    operators.__spec__ = importlib.machinery.ModuleSpec('mmcv._ext', None)
    sys.modules['mmcv._ext'] = operators
