"""Scikit-learn's handwritten digits, with the network that has GC and SE in every block.

    python train.py

Real images, 8x8 pixels, nothing to download. Expect 99% of the test split after about a minute on
two CPU cores.
"""

from ml_collections import ConfigDict

from gcnet_jax.training.config import default_config


def get_config() -> ConfigDict:
    """Returns the settings that `python train.py` runs."""
    config = default_config()
    config.model.name = 'gccnn'
    config.data.name = 'digits'
    config.data.image_size = 8
    config.data.augmentation = 'none'
    config.data.flip = False
    config.task.mixup_alpha = 0.2
    config.schedule.peak_learning_rate = 0.1
    config.schedule.warmup_epochs = 1.0
    config.optimizer.weight_decay = 5e-4
    config.training.total_epochs = 6.0
    config.training.batch_size = 64
    config.task.label_smoothing = 0.1
    config.training.evaluation_epochs = 2.0
    config.training.checkpoint_epochs = 2.0
    config.training.log_steps = 20
    return config
