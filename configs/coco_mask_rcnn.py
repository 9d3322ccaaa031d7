"""Mask R-CNN on COCO as in the paper: ResNet-50, the 1x schedule, with and without context.

    python train.py --config configs/coco_mask_rcnn.py --config.training.init_from=DIR
    python train.py --config configs/coco_mask_rcnn.py:gc_r4 --config.training.init_from=DIR
    python train.py --config configs/coco_mask_rcnn.py:plain --config.training.init_from=DIR

The first network has global context of ratio 1/16 behind conv3 in c3 to c5, the second of 1/4, the
third none (Cao et al., arXiv 1904.11492, table 1). DIR is a ResNet-50 of torchvision, ported
(`gcnet_jax port resnet50-0676ba61.pth --out DIR`): it fills the backbone, whose context blocks
start as the identity. COCO must have been prepared from its folder:
`gcnet_jax prepare --task detection DIRECTORY --name my_coco`.

The recipe is mmdetection's `mask_rcnn_r50_fpn_1x_coco` (12 epochs in batches of 16, the rate 0.02
falls to a tenth after epochs 8 and 11, stem and stage 1 frozen, norms frozen). What differs: the
type of the computation is bfloat16, weight decay spares norms and biases, and all images lie on one
of two canvases. The run has not been made here.
"""

from ml_collections import ConfigDict

from gcnet_jax.errors import ConfigError, unknown_name
from gcnet_jax.training.config import default_config, name_task

NETWORKS = {
    'gc_r16': 'gc_mask_rcnn_resnet50_fpn',
    'gc_r4': 'gc_mask_rcnn_resnet50_r4_fpn',
    'plain': 'mask_rcnn_resnet50_fpn',
}


def get_config(variant: str = 'gc_r16') -> ConfigDict:
    """Returns the recipe's settings, with context of either ratio or without ('plain')."""
    if variant not in NETWORKS:
        raise ConfigError(unknown_name('variant of configs/coco_mask_rcnn.py', variant, NETWORKS))
    config = default_config()
    name_task(config, 'detection')
    config.model.name = NETWORKS[variant]
    config.model.num_classes = 80
    config.model.dtype = 'bfloat16'
    config.model.norm.kind = 'frozen'
    config.data.name = 'my_coco'
    config.optimizer.frozen = ('backbone/stem*', 'backbone/stage1*')
    config.optimizer.nesterov = False
    config.optimizer.weight_decay = 1e-4
    config.schedule.peak_learning_rate = 0.02
    config.schedule.warmup_steps = 500
    config.schedule.decay_epochs = (8, 11)
    config.training.total_epochs = 12.0
    config.training.batch_size = 16
    config.training.log_steps = 50
    return config
