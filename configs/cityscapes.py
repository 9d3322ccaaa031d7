"""Cityscapes by the recipe of mmsegmentation's gcnet_r50-d8_4xb2-40k_cityscapes-512x1024.

    python train.py --config configs/cityscapes.py --config.training.init_from=DIR --workdir runs/gc
    python train.py --config configs/cityscapes.py:fcn --config.training.init_from=DIR

The second command trains the same network without context. DIR is a classifier with the backbone's
stem of three convolutions, or a segmenter; from a ported ResNet-50 of torchvision or timm give
`--config.model.stem=imagenet` too. Without it the run starts at random, and far from the published
77.7% mIoU. Cityscapes must have been prepared from images and `labelTrainIds` maps:
`gcnet_jax prepare --task segmentation DIRECTORY --name my_cityscapes --labels cityscapes`.

What differs: the type of the computation is bfloat16, weight decay spares norms and biases, and the
learning rate reaches its end one step later. The run has not been made here.
"""

from ml_collections import ConfigDict

from gcnet_jax.errors import ConfigError, unknown_name
from gcnet_jax.training.config import default_config, name_task

VARIANTS = ('gc', 'fcn')


def get_config(variant: str = 'gc') -> ConfigDict:
    """Returns the recipe's settings, with ('gc') or without context ('fcn')."""
    if variant not in VARIANTS:
        raise ConfigError(unknown_name('variant of configs/cityscapes.py', variant, VARIANTS))
    config = default_config()
    name_task(config, 'segmentation')
    config.model.name = f'{variant}_resnet50_d8_cityscapes'
    config.model.num_classes = 19
    config.model.dtype = 'bfloat16'
    config.data.name = 'my_cityscapes'
    config.data.image_size = (512, 1024)
    config.data.evaluation_image_size = (1024, 2048)
    config.task.count_ignored = True
    config.optimizer.nesterov = False
    config.optimizer.weight_decay = 5e-4
    config.schedule.peak_learning_rate = 0.01
    config.schedule.end_factor = 0.01
    config.schedule.poly_power = 0.9
    config.training.total_steps = 40_000
    config.training.batch_size = 8
    config.training.evaluation_steps = 4000
    config.training.checkpoint_steps = 4000
    config.training.log_steps = 50
    return config
