"""Several labels per image: ResNet-18 with global context on Pascal VOC 2007, judged by mAP.

    python train.py --config configs/multilabel.py --workdir runs/voc

`data.name` may be any set that stores a sequence of labels per image. The set must have been
prepared by TFDS as ArrayRecord (`voc/2007`). From a trained network, as everywhere:
`--config.training.init_from=DIR`.
"""

from ml_collections import ConfigDict

from gcnet_jax.training.config import default_config, name_task


def get_config() -> ConfigDict:
    """Returns the settings for Pascal VOC 2007."""
    config = default_config()
    name_task(config, 'multilabel')
    config.model.name = 'gc_resnet18'
    config.data.name = 'voc/2007'
    config.data.crop_scale = (0.35, 1.0)
    config.schedule.peak_learning_rate = 0.05
    config.schedule.warmup_epochs = 2.0
    config.optimizer.weight_decay = 5e-4
    config.training.total_epochs = 60.0
    config.training.batch_size = 64
    config.training.evaluation_epochs = 5.0
    config.training.log_steps = 20
    return config
