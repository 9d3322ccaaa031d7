"""mmdetection's configurations of GCNet's detectors, `configs/gcnet`, and the networks here."""

CONFIGS = {
    'mask-rcnn_r50-gcb-r16-c3-c5_fpn_1x_coco': 'gc_mask_rcnn_resnet50_fpn',
    'mask-rcnn_r50-gcb-r4-c3-c5_fpn_1x_coco': 'gc_mask_rcnn_resnet50_r4_fpn',
    'mask-rcnn_r101-gcb-r16-c3-c5_fpn_1x_coco': 'gc_mask_rcnn_resnet101_fpn',
    'mask-rcnn_r101-gcb-r4-c3-c5_fpn_1x_coco': 'gc_mask_rcnn_resnet101_r4_fpn',
    'mask-rcnn_r50-syncbn_fpn_1x_coco': 'mask_rcnn_resnet50_fpn_syncbn',
    'mask-rcnn_r50-syncbn-gcb-r16-c3-c5_fpn_1x_coco': 'gc_mask_rcnn_resnet50_fpn_syncbn',
    'mask-rcnn_r50-syncbn-gcb-r4-c3-c5_fpn_1x_coco': 'gc_mask_rcnn_resnet50_r4_fpn_syncbn',
    'mask-rcnn_r101-syncbn_fpn_1x_coco': 'mask_rcnn_resnet101_fpn_syncbn',
    'mask-rcnn_r101-syncbn-gcb-r16-c3-c5_fpn_1x_coco': 'gc_mask_rcnn_resnet101_fpn_syncbn',
    'mask-rcnn_r101-syncbn-gcb-r4-c3-c5_fpn_1x_coco': 'gc_mask_rcnn_resnet101_r4_fpn_syncbn',
    'mask-rcnn_x101-32x4d-syncbn_fpn_1x_coco': 'mask_rcnn_resnext101_fpn_syncbn',
    'mask-rcnn_x101-32x4d-syncbn-gcb-r16-c3-c5_fpn_1x_coco': 'gc_mask_rcnn_resnext101_fpn_syncbn',
    'mask-rcnn_x101-32x4d-syncbn-gcb-r4-c3-c5_fpn_1x_coco': 'gc_mask_rcnn_resnext101_r4_fpn_syncbn',
    **{
        f'cascade-mask-rcnn_x101-32x4d-syncbn{blocks}_fpn_1x_coco': f'{name}_fpn_syncbn'
        for blocks, name in (
            ('', 'cascade_mask_rcnn_resnext101'),
            ('-r16-gcb-c3-c5', 'gc_cascade_mask_rcnn_resnext101'),
            ('-r4-gcb-c3-c5', 'gc_cascade_mask_rcnn_resnext101_r4'),
            ('-dconv-c3-c5', 'cascade_mask_rcnn_resnext101_dcn'),
            ('-dconv-c3-c5-r16-gcb-c3-c5', 'gc_cascade_mask_rcnn_resnext101_dcn'),
            ('-dconv-c3-c5-r4-gcb-c3-c5', 'gc_cascade_mask_rcnn_resnext101_dcn_r4'),
        )
    },
}
