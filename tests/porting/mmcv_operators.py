"""Stand-ins for mmcv's compiled operators, which mmcv-lite lacks; needs torchvision.

The detectors of GCNet call three of them, for which the kernels of torchvision, the same code,
stand in here, gradients included; its segmenters call none. mmdetection and mmsegmentation import
all of them.
"""

import importlib.machinery
import sys
import types

import torch
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


# The gradients, by torchvision's kernels for them.


def _roi_align_backward(
    gradient, rois, argmax_y, argmax_x, of_features, *, aligned_height, aligned_width,
    spatial_scale, sampling_ratio, pool_mode, aligned,
):  # fmt: skip
    assert pool_mode == 1
    of_features.copy_(
        torch.ops.torchvision._roi_align_backward(
            gradient.contiguous(), rois, spatial_scale, aligned_height, aligned_width,
            *of_features.shape, sampling_ratio, aligned,
        )
    )  # fmt: skip


def _deform_conv_gradients(features, offset, weight, gradient, options):
    """Returns the gradients of the features, the weight and the offset."""
    batch, groups, empty = len(features), options['deformable_group'], gradient.new_zeros
    found = torch.ops.torchvision._deform_conv2d_backward(
        gradient.contiguous(), features, weight, offset, empty((batch, 1)), empty(len(weight)),
        options['dH'], options['dW'], options['padH'], options['padW'],
        options['dilationH'], options['dilationW'], options['group'], groups, False,
    )  # fmt: skip
    return found[0], found[1], found[2]


def _deform_conv_backward_input(
    features, offset, gradient, of_features, of_offset, weight, columns, **options
):
    found = _deform_conv_gradients(features, offset, weight, gradient, options)
    of_features.copy_(found[0])
    of_offset.copy_(found[2])


def _deform_conv_backward_parameters(
    features, offset, gradient, of_weight, columns, ones, **options
):
    weight = torch.zeros_like(of_weight)  # The gradient of a linear function of it.
    of_weight.copy_(_deform_conv_gradients(features, offset, weight, gradient, options)[1])


class _Operators(types.ModuleType):
    """`mmcv._ext`: every other operator is there by name only."""

    roi_align_forward = staticmethod(_roi_align)
    nms = staticmethod(_nms)
    deform_conv_forward = staticmethod(_deform_conv)
    roi_align_backward = staticmethod(_roi_align_backward)
    deform_conv_backward_input = staticmethod(_deform_conv_backward_input)
    deform_conv_backward_parameters = staticmethod(_deform_conv_backward_parameters)

    def __getattr__(self, name):
        if name.startswith('__'):
            raise AttributeError(name)
        return lambda *_, **__: (_ for _ in ()).throw(NotImplementedError(f'mmcv._ext.{name}'))


def stand_in() -> None:
    """Makes the stand-ins what `import mmcv.ops` finds; call it before."""
    operators = _Operators('mmcv._ext')
    operators.__spec__ = importlib.machinery.ModuleSpec('mmcv._ext', None)
    sys.modules['mmcv._ext'] = operators
