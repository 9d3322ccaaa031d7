"""Your own images: ResNet-18 with global context, on a folder with one folder a class.

    python -m gcnet_jax prepare DIRECTORY --name flowers
    python train.py --config configs/folder.py --config.data.name=flowers --workdir runs/flowers

From scratch at 128 pixels. For a larger set choose a larger network (`python -m gcnet_jax models`)
and 224 pixels; for a small one fine-tune a trained network, see configs/finetune.py.
"""

from ml_collections import ConfigDict

from gcnet_jax.training.config import default_config


def get_config() -> ConfigDict:
    """Returns the settings for a prepared folder; `data.name` says which."""
    config = default_config()
    config.model.name = 'gc_resnet18'
    config.data.name = 'my_images'
    config.data.image_size = 128
    config.data.crop_scale = (0.35, 1.0)
    config.schedule.peak_learning_rate = 0.05
    config.schedule.warmup_epochs = 2.0
    config.optimizer.weight_decay = 5e-4
    config.training.total_epochs = 30.0
    config.training.batch_size = 64
    config.task.label_smoothing = 0.1
    config.training.log_steps = 10
    return config
