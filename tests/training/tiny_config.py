"""A run of seconds on real images, for the tests that start train.py in processes of their own."""

from ml_collections import ConfigDict

from gcnet_jax.training.config import default_config


def get_config() -> ConfigDict:
    """Returns settings with context, BatchNorm, mixup, accumulation and moving average on."""
    config = default_config()
    config.model.stage_sizes = (1,)
    config.model.widths = (48,)  # So wide that a kernel is split over `fsdp`.
    config.model.context = {'stages': (1,), 'position': 'after_conv2', 'ratio': 0.25}
    config.model.dropout_rate = 0.1
    config.data.image_size = 8
    config.data.train_split = 'train[:300]'
    config.data.evaluation_split = 'test[:37]'
    config.data.augmentation = 'none'
    config.data.flip = False
    config.task.mixup_alpha = 0.2
    config.data.num_threads = 1
    config.training.batch_size = 16
    config.training.accumulation_steps = 2
    config.training.ema_decay = 0.9
    config.training.total_steps = 48
    config.training.log_steps = 1
    config.training.evaluation_steps = 24
    config.training.checkpoint_steps = 15
    config.runtime.progress = 'lines'
    config.runtime.tensorboard = False
    return config
