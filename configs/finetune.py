"""Fine-tune a trained network on your own images, or on ImageNet as the paper does.

    gcnet_jax train finetune --config.training.init_from=DIR --config.data.name=flowers

From a checkout: `python train.py --config configs/finetune.py` with the same settings. DIR is a
ported directory or the workdir of a run. The network, its options and its preprocessing are the
checkpoint's; `flowers` is a folder prepared by `gcnet_jax prepare DIRECTORY --name flowers`.
Outputs of the classifier are kept where the checkpoint knows the label by name, all others start
at random. A few hundred images do with these settings; for more, raise `training.batch_size`.

The paper puts context blocks into a trained ResNet-50 and fine-tunes it on ImageNet for 40 epochs
(Cao et al., arXiv 1904.11492, section 4.3). The blocks start as the exact identity, so before the
first step the network has the accuracy of the one it came from:

    python train.py --config configs/finetune.py:imagenet --config.training.init_from=DIR \
        --config.model.name=gc_resnet50
"""

from ml_collections import ConfigDict

from gcnet_jax.errors import ConfigError, unknown_name
from gcnet_jax.training.config import default_config

VARIANTS = ('folder', 'imagenet')


def get_config(variant: str = 'folder') -> ConfigDict:
    """Returns the settings for a prepared folder ('folder') or for the paper's ('imagenet')."""
    if variant not in VARIANTS:
        raise ConfigError(unknown_name('variant of configs/finetune.py', variant, VARIANTS))
    config = default_config()
    config.model.name = None  # That of training.init_from.
    if variant == 'imagenet':
        config.model.dtype = 'bfloat16'
        config.data.name = 'imagenet2012'
        config.data.skip_damaged = True
        config.optimizer.weight_decay = 1e-4
        config.schedule.peak_learning_rate = 0.02
        config.training.total_epochs = 40.0
        config.training.batch_size = 256
        config.training.log_steps = 100
        return config
    config.data.name = 'my_images'
    config.data.crop_scale = (0.35, 1.0)
    config.optimizer.weight_decay = 1e-4
    config.optimizer.clip_norm = 1.0
    config.schedule.peak_learning_rate = 0.01
    config.schedule.warmup_epochs = 2.0
    config.training.total_epochs = 20.0
    config.training.batch_size = 16
    config.task.label_smoothing = 0.1
    config.training.evaluation_epochs = 2.0
    config.training.checkpoint_epochs = 2.0
    config.training.log_steps = 10
    return config
