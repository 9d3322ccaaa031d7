"""ImageNet from scratch: ResNet-50 with global context r16 in c3-c5, and its plain twin.

    python train.py --config configs/imagenet.py --workdir runs/gc_resnet50
    python train.py --config configs/imagenet.py:resnet50 --workdir runs/resnet50

The second command trains the same network without context. Written for eight accelerators or more;
ImageNet must have been prepared by TFDS as ArrayRecord (`imagenet2012`).
"""

from ml_collections import ConfigDict

from gcnet_jax.errors import ConfigError, unknown_name
from gcnet_jax.training.config import default_config

VARIANTS = ('gc_resnet50', 'resnet50')


def get_config(variant: str = 'gc_resnet50') -> ConfigDict:
    """Returns the settings of the run from scratch, with ('gc_resnet50') or without context."""
    if variant not in VARIANTS:
        raise ConfigError(unknown_name('variant of configs/imagenet.py', variant, VARIANTS))
    config = default_config()
    config.model.name = variant
    config.model.dtype = 'bfloat16'
    config.model.dropout_rate = 0.0
    config.model.stochastic_depth_rate = 0.0
    config.model.zero_init_residual = True
    config.data.name = 'imagenet2012'
    config.data.evaluation_split = 'validation'
    config.data.image_size = 224
    config.data.skip_damaged = True
    config.optimizer.weight_decay = 1e-4
    # 0.1 for every 256 images (Goyal et al., arXiv 1706.02677).
    config.schedule.peak_learning_rate = 0.4
    config.schedule.warmup_epochs = 5.0
    config.training.total_epochs = 120.0
    config.training.batch_size = 1024
    config.task.label_smoothing = 0.1
    config.training.log_steps = 100
    return config
