"""Your own images with objects, in COCO's format: fine-tune a ported detector.

    python -m gcnet_jax prepare --task detection DIRECTORY --name boats
    python train.py --config configs/detection.py --config.training.init_from=DIR \
        --config.data.name=boats --workdir runs/boats

DIRECTORY has `annotations/instances_train.json` and `annotations/instances_val.json`, and the
images in `train/` and `val/`. DIR is a ported detector: the network, its options and the size of
its images are the checkpoint's, and classes that it knows by name keep their weights. The settings
are for some hundred images and one chip; the learning rate is mmdetection's 0.02 for a batch of 16
by the linear rule, so double it with `training.batch_size`. Smaller images are faster:
`--config.data.image_size='(512,864)'`.

From a trained classifier, which fills the backbone, name the detector too:
`--config.model.name=gc_mask_rcnn_resnet50_fpn`. That takes more images and longer.
"""

from ml_collections import ConfigDict

from gcnet_jax.training.config import default_config, name_task


def get_config() -> ConfigDict:
    """Returns the settings for a prepared folder."""
    config = default_config()
    name_task(config, 'detection')
    config.model.name = None  # That of training.init_from.
    config.model.norm.kind = 'frozen'
    config.data.name = 'my_objects'
    config.optimizer.frozen = ('backbone/stem*', 'backbone/stage1*')
    config.optimizer.nesterov = False
    config.optimizer.clip_norm = 35.0
    config.schedule.peak_learning_rate = 0.0025
    config.schedule.warmup_steps = 500
    config.schedule.decay_epochs = (8, 11)
    config.training.total_epochs = 12.0
    config.training.batch_size = 2
    config.training.log_steps = 20
    return config
