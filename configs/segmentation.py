"""Your own images and label maps: ResNet-18 at stride 16, with global context in the head.

    python -m gcnet_jax prepare --task segmentation DIRECTORY --name streets
    python train.py --config configs/segmentation.py --config.data.name=streets --workdir runs/gc

DIRECTORY has `images/train` and `images/val`, and in `labels/train` and `labels/val` PNG files of
the same names whose values are the labels. The settings are for some hundred images; with more,
choose `--config.model.backbone=resnet50` and `--config.model.output_stride=8`. Crops have
`data.image_size` (height, width); `data.evaluation_image_size` (short side, long side) is the size
of the images before a random scale. Set both for images of another size.

From a trained classifier, which fills the backbone, or from a segmenter:
`--config.training.init_from=DIR`. The twin without context is `configs/segmentation.py:fcn`.
"""

from ml_collections import ConfigDict

from gcnet_jax.errors import ConfigError, unknown_name
from gcnet_jax.training.config import default_config, name_task

VARIANTS = ('gc', 'fcn')


def get_config(variant: str = 'gc') -> ConfigDict:
    """Returns the settings for a prepared folder, with ('gc') or without context ('fcn')."""
    if variant not in VARIANTS:
        raise ConfigError(unknown_name('variant of configs/segmentation.py', variant, VARIANTS))
    config = default_config()
    name_task(config, 'segmentation')
    config.model.name = f'{variant}_resnet18_d16'
    config.data.name = 'my_images'
    config.data.image_size = (240, 320)
    config.data.evaluation_image_size = (360, 480)
    config.optimizer.weight_decay = 5e-4
    config.schedule.peak_learning_rate = 0.02
    config.schedule.warmup_epochs = 2.0
    config.schedule.poly_power = 0.9
    config.training.total_epochs = 60.0
    config.training.batch_size = 8
    config.training.evaluation_epochs = 5.0
    config.training.checkpoint_epochs = 5.0
    config.training.log_steps = 10
    return config
