"""CIFAR-10, ResNet-20 with global context in every block.

    python train.py --config configs/cifar10.py

CIFAR-10 must have been prepared as ArrayRecord once; if it is not, the error names the command.
`--config.data.data_dir=DIR` reads it from another place. Six epochs over 20,000 of the training
images gave 73.0% of 5,000 test images; the 100 epochs here have not been run.
"""

from ml_collections import ConfigDict

from gcnet_jax.training.config import default_config


def get_config() -> ConfigDict:
    """Returns the settings of the CIFAR-10 run."""
    config = default_config()
    config.model.name = 'gc_resnet20'
    config.data.name = 'cifar10'
    config.data.image_size = 32
    config.data.augmentation = 'pad_crop'
    config.optimizer.weight_decay = 5e-4
    config.schedule.peak_learning_rate = 0.1
    config.schedule.warmup_epochs = 1.0
    config.training.total_epochs = 100.0
    config.training.batch_size = 128
    config.training.log_steps = 100
    return config
