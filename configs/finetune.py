"""The paper's protocol: put global context into a trained ResNet-50 and fine-tune it on ImageNet.

    python train.py --config configs/finetune.py --config.training.init_from=DIR

DIR is a run of `configs/imagenet.py:resnet50` or a ported ResNet-50. The blocks start as the exact
identity: before the first step the network has the accuracy of the one it came from. This follows
the ImageNet experiments of Cao et al. (arXiv 1904.11492, section 4.3).
"""

from ml_collections import ConfigDict

from gcnet_jax.training.config import default_config


def get_config() -> ConfigDict:
    """Returns the settings of the fine-tuning."""
    config = default_config()
    config.model.name = 'gc_resnet50'
    config.model.dtype = 'bfloat16'
    config.model.context = {
        'block': 'global_context',
        'stages': (2, 3, 4),
        'position': 'after_conv3',
        'ratio': 1 / 16,
        'pooling': 'attention',
        'fusion': 'add',
    }
    config.data.name = 'imagenet2012'
    config.data.evaluation_split = 'validation'
    config.data.image_size = 224
    config.data.skip_damaged = True
    config.optimizer.weight_decay = 1e-4
    config.schedule.peak_learning_rate = 0.02
    config.training.total_epochs = 40.0
    config.training.batch_size = 256
    config.training.init_from = 'runs/resnet50'
    config.training.log_steps = 100
    return config
