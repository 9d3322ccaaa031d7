"""Every setting of a training run with its default, and the checks before anything is compiled.

A setting is read in one place. None means that something else decides, as the comment says.
Durations end in `_epochs` or `_steps`; `steps` converts, and where a setting has both forms,
`_steps` wins if it is set.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from gcnet_jax.errors import ConfigError, unknown_name
from gcnet_jax.training.optimizers import optimizer_options
from gcnet_jax.training.rules import RULES

# What may differ when a run is continued: how it runs and reports, not what it computes.
RESUMABLE = (
    'data.data_dir',
    'data.num_threads',
    'data.num_workers',
    'mesh.',
    'runtime.',
    'training.extend',
    'training.keep_checkpoints',
)
# What else may differ with training.extend.
EXTENDABLE = ('training.total_epochs', 'training.total_steps')


def default_config() -> ConfigDict:
    """Returns every setting with its default.

    The group `model` is open: it also takes every option of the network that it names.
    """
    config = ConfigDict(
        {
            'model': _model(),
            'data': _data(),
            'optimizer': _optimizer(),
            'schedule': _schedule(),
            'training': _training(),
            'mesh': _mesh(),
            'runtime': _runtime(),
        }
    )
    config.lock()
    config.model.unlock()
    return config


def name_network(config: ConfigDict, name: str | None) -> None:
    """Names another network, without the options that were set for the one before.

    Args:
      config: Changed in place; the size of the classifier and the type of the computation stay.
      name: A name of `list_models()`; None for the network of `training.init_from`.
    """
    kept = {'num_classes': config.model.num_classes, 'dtype': config.model.dtype}
    config.model = ConfigDict(_model())
    config.model.update({'name': name, **kept})


def _model() -> dict:
    return {
        # A name of `list_models()`; None: the network of training.init_from with its options.
        # Further keys of this group are options of that network, such as `dropout_rate` or
        # `context`: where the context blocks go (see gcnet_jax.models.placement.parse_context).
        # What is not set here is as in the network's entry of gcnet_jax.models.registry.
        'name': 'gccnn',
        # Size of the classifier; None: as many as the data set has labels.
        'num_classes': placeholder(int),
        # Type of the computation, 'float32' or 'bfloat16'. Parameters and statistics are float32.
        'dtype': 'float32',
        # 'batch' (BatchNorm), 'group' (GroupNorm), or 'frozen' (BatchNorm whose running statistics
        # are used in training too and never change: to continue from a checkpoint).
        'norm': {
            'kind': 'batch',
            # Of 'batch': images whose statistics are taken together; None: the whole batch, over
            # all devices (with accumulation: the whole micro-batch).
            'group_size': placeholder(int),
            # Of 'group': number of groups of channels; None: 32.
            'channel_groups': placeholder(int),
        },
    }


def _data() -> dict:
    return {
        # 'digits', any TFDS image classification set, or a folder data set that was prepared.
        'name': 'digits',
        # Where prepared data sets are; None: TFDS's own directory.
        'data_dir': placeholder(str),
        # Splits, with TFDS's slices: 'train[:90%]'. The one to evaluate on during training, None:
        # 'validation' where the data set has one, else 'test'.
        'train_split': 'train',
        'evaluation_split': placeholder(str),
        # What is None among the next six is as in the checkpoint of training.init_from, or without
        # one as in the network's entry.
        # Size of the images in pixels: one number for a square, or (height, width); at evaluation
        # None: image_size where it is set.
        'image_size': placeholder(object),
        'evaluation_image_size': placeholder(object),
        # Evaluation's central crop, as a part of the resized shorter side, and its resize
        # ('bilinear', 'bicubic').
        'crop_fraction': placeholder(float),
        'interpolation': placeholder(str),
        # Mean and standard deviation of each channel, on the scale where 255 is 1.
        'mean': placeholder(tuple),
        'std': placeholder(tuple),
        # 'none' (resize), 'pad_crop' (4 pixels, CIFAR) or 'resized_crop' (ImageNet).
        'augmentation': 'resized_crop',
        # Smallest and largest area of 'resized_crop', as parts of the image; None: (0.08,
        # 1.0).
        'crop_scale': placeholder(tuple),
        # Mirror left and right half of the time. Not for digits.
        'flip': True,
        # Beta parameters of mixup and cutmix (0: off; both: one or the other, at random), share of
        # images with an erased box.
        'mixup_alpha': 0.0,
        'cutmix_alpha': 0.0,
        'erasing_probability': 0.0,
        # RandAugment: number of operations for each image (0: off) and their strength, 0 to 30;
        # None: 9.
        'randaugment_ops': 0,
        'randaugment_magnitude': placeholder(int),
        # Largest relative change of brightness, contrast and saturation, and of the hue in turns
        # of the colour wheel (at most 0.5).
        'color_jitter': 0.0,
        'hue_jitter': 0.0,
        # Leave damaged records out, counted in the log, instead of stopping at the first.
        'skip_damaged': False,
        # Reading and decoding: threads (None: one a processor, at most 16), and worker processes
        # (0: none, the threads do it).
        'num_threads': placeholder(int),
        'num_workers': 0,
    }


def _optimizer() -> dict:
    return {
        # 'sgd', 'adamw', 'lamb' or 'lars'.
        'name': 'sgd',
        # Kernels only; norms and biases are spared.
        'weight_decay': 1e-4,
        # Largest norm of the gradient; None: not clipped.
        'clip_norm': placeholder(float),
        # Patterns of parameters that are not trained, such as ('stem*', 'stage1*') or, to train the
        # classifier alone, ('*', '!classifier'); see gcnet_jax.training.freezing.frozen_paths.
        'frozen': placeholder(object),
        # Factor on the learning rate for each layer below the classifier; None: the same for all.
        'layer_decay': placeholder(float),
        # Options that not every optimizer has; None: the default in
        # gcnet_jax.training.optimizers.OPTIMIZERS.
        'momentum': placeholder(float),
        'nesterov': placeholder(bool),
        'beta1': placeholder(float),
        'beta2': placeholder(float),
        'epsilon': placeholder(float),
        'trust_coefficient': placeholder(float),
    }


def _schedule() -> dict:
    return {
        # Highest learning rate, for the whole batch: not scaled by its size.
        'peak_learning_rate': 0.1,
        # Linear warm-up, then half a cosine down to `end_factor` times the peak.
        'warmup_epochs': 0.0,
        'warmup_steps': placeholder(int),
        'end_factor': 0.0,
    }


def _training() -> dict:
    return {
        'total_epochs': 10.0,
        'total_steps': placeholder(int),
        # Images of one optimizer step over all devices and hosts; evaluation reads as many at a
        # time.
        'batch_size': 128,
        # Micro-batches that a batch is computed in: less memory, the same gradient.
        'accumulation_steps': 1,
        'label_smoothing': 0.0,
        # What an example of each class counts in the training loss: 'balanced' (inversely to the
        # number of its examples; reads the labels of all training images at the start), or one
        # number per class. None: 1 for all.
        'class_weights': placeholder(object),
        # Decay of the moving average of the weights, which evaluation then uses; 0: none.
        'ema_decay': 0.0,
        # Everything random follows from it: weights, order of the data, augmentation, dropout.
        'seed': 0,
        # How often to evaluate (and save, so that the best can be kept), and to save besides. The
        # end always does both.
        'evaluation_epochs': 1.0,
        'evaluation_steps': placeholder(int),
        # End the run at an evaluation when eval/accuracy has not improved for so long; None: never.
        'early_stopping_epochs': placeholder(float),
        'early_stopping_steps': placeholder(int),
        'checkpoint_epochs': 1.0,
        'checkpoint_steps': placeholder(int),
        # How many of the newest checkpoints to keep, beside the best by eval/accuracy.
        'keep_checkpoints': 2,
        # How often to write train/* metrics, averaged over these steps.
        'log_steps': 50,
        # Stop at so many steps in a row whose loss or gradient is not finite; such a step changes
        # no weight.
        'max_bad_steps': 1,
        # A checkpoint (a workdir, a checkpoint or a ported directory) to start the weights from;
        # None: at random.
        'init_from': placeholder(str),
        # With init_from: start the classifier at random (True), or keep all of it by position
        # (False). None: classes whose label names the checkpoint knows keep their weights.
        'new_classifier': placeholder(bool),
        # Continue a run to another total_epochs or total_steps, also one that has finished. From
        # the step where it stands, the learning rate follows the schedule of the new total.
        'extend': False,
    }


def _mesh() -> dict:
    # Devices along each axis; -1 takes the rest. See gcnet_jax.training.mesh.
    return {'data': -1, 'fsdp': 1, 'spatial': 1}


def _runtime() -> dict:
    return {
        # 'auto' (a bar on a terminal, lines elsewhere), 'bar', 'lines' or 'none'.
        'progress': 'auto',
        # Write TensorBoard events beside metrics.jsonl.
        'tensorboard': True,
        # Where compiled programs are kept, so that the next start need not compile them again: a
        # directory, which runs may share, or 'off'. None: JAX_COMPILATION_CACHE_DIR if it is set,
        # else `compilation_cache` in the workdir.
        'compilation_cache': placeholder(str),
        # Batches that are sent to the devices ahead of their step.
        'prefetch_batches': 2,
        # Several processes, one a host or one a GPU, all started with this same command. A TPU pod
        # slice, SLURM and Open MPI tell the rest by themselves.
        'distributed': False,
        # Elsewhere: HOST:PORT of the first process, how many there are, and which this one is, from
        # 0.
        'coordinator_address': placeholder(str),
        'num_processes': placeholder(int),
        'process_id': placeholder(int),
        # Silence after which a process counts as gone, and the others stop with an error.
        'heartbeat_timeout_seconds': 100,
    }


def plain(config: ConfigDict) -> dict:
    """Returns a config as JSON reads it back: plain dicts and lists."""
    return json.loads(json.dumps(config.to_dict()))


def leaves(tree: Any, path: str = '') -> Iterator[tuple[str, Any]]:
    """Yields the path, such as 'model.context[0].ratio', and the value of every setting."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from leaves(value, f'{path}.{key}' if path else str(key))
    elif isinstance(tree, (list, tuple)) and any(isinstance(item, Mapping) for item in tree):
        for index, item in enumerate(tree):
            yield from leaves(item, f'{path}[{index}]')
    else:
        yield path, tree


def steps(group: Mapping[str, Any], name: str, steps_per_epoch: float) -> float:
    """Converts a duration of a group, `<name>_steps` or else `<name>_epochs`, to steps.

    An epoch need not be a whole number of them, so the caller rounds what it counts from it.
    """
    if group[f'{name}_steps'] is not None:
        return group[f'{name}_steps']
    return group[f'{name}_epochs'] * steps_per_epoch


def is_due(step: int, interval: float) -> bool:
    """Whether `step` is the one nearest to a multiple of `interval`, which is in steps, above 0."""
    return round(max(1, round(step / interval)) * interval) == step or interval <= 1


def changed_keys(config: Mapping, other: Mapping) -> list[str]:
    """Returns where two plain configs differ, but for what may change when a run is continued."""
    first, second = dict(leaves(config)), dict(leaves(other))
    missing = object()
    # A run of an earlier version lacks the settings that were added since.
    defaults = {key: value for key, value in leaves(plain(default_config())) if '.' in key}
    for key in defaults.keys() - first.keys():
        if key in second and key.partition('.')[0] in config:
            first[key] = defaults[key]
    return [
        key
        for key in sorted(first.keys() | second.keys())
        if first.get(key, missing) != second.get(key, missing) and not key.startswith(RESUMABLE)
    ]


def check_config(config: ConfigDict) -> None:
    """Refuses unknown keys, values out of range, and settings that contradict each other.

    What depends on the network, the data set or the devices is checked where those are built, also
    before anything is
    compiled: see `gcnet_jax.training.experiment.assemble`.

    Raises:
      ConfigError: Names the setting, its value, what is allowed and what to do.
    """
    known = default_config().to_dict()
    given = config.to_dict()
    _check_keys(given, known)
    defaults = dict(leaves(known))
    for key, value in leaves(given):
        if value is None and key in defaults and defaults[key] is None:
            continue
        if key in RULES and not RULES[key][0](value):
            raise ConfigError(f'config.{key} is {value!r}; it must be {RULES[key][1]}')
    options = {
        key: value
        for key, value in given['optimizer'].items()
        if key not in ('name', 'weight_decay', 'clip_norm', 'frozen', 'layer_decay')
    }
    optimizer_options(given['optimizer']['name'], options)
    _check_together(given)


def _check_keys(given: Mapping, known: Mapping) -> None:
    for group in given:
        if group not in known:
            raise ConfigError(unknown_name('setting', f'config.{group}', _paths(known)))
    for group, settings in known.items():
        values = given.get(group)
        if not isinstance(values, Mapping):
            raise ConfigError(f'config.{group} must be a group with {", ".join(settings)}')
        extra = [] if group == 'model' else sorted(values.keys() - settings.keys())
        if extra:
            raise ConfigError(unknown_name('setting', f'config.{group}.{extra[0]}', _paths(known)))
        missing = sorted(settings.keys() - values.keys())
        if missing:
            raise ConfigError(
                f'config.{group}.{missing[0]} is missing; start the config from '
                'gcnet_jax.training.config.default_config()'
            )


def _paths(tree: Mapping) -> list[str]:
    return [f'config.{path}' for path, _ in leaves(tree)]


def _check_together(given: Mapping) -> None:
    """Refuses settings that would have no effect beside the others."""
    data, training, runtime = given['data'], given['training'], given['runtime']
    if data['crop_scale'] is not None and data['augmentation'] != 'resized_crop':
        raise ConfigError(
            f'config.data.crop_scale is {data["crop_scale"]} but config.data.augmentation is '
            f'{data["augmentation"]!r}; leave it unset, or choose resized_crop'
        )
    if data['randaugment_magnitude'] is not None and not data['randaugment_ops']:
        raise ConfigError(
            f'config.data.randaugment_magnitude is {data["randaugment_magnitude"]} but '
            'config.data.randaugment_ops is 0; set it to the number of operations, such as 2'
        )
    if training['new_classifier'] is not None and training['init_from'] is None:
        raise ConfigError(
            f'config.training.new_classifier is {training["new_classifier"]} but '
            'config.training.init_from is not set; name the checkpoint to start from, or leave '
            'new_classifier unset'
        )
    if given['model']['name'] is None and training['init_from'] is None:
        raise ConfigError(
            'config.model.name is not set, and neither is config.training.init_from; name the '
            'checkpoint to start from (--config.training.init_from=DIR), or a network'
        )
    if training['batch_size'] % training['accumulation_steps']:
        raise ConfigError(
            f'config.training.batch_size is {training["batch_size"]}, which '
            f'config.training.accumulation_steps={training["accumulation_steps"]} does not divide; '
            'change one of them'
        )
    processes = {
        key: runtime[key] for key in ('coordinator_address', 'num_processes', 'process_id')
    }
    for key, value in processes.items():
        if value is not None and not runtime['distributed']:
            raise ConfigError(
                f'config.runtime.{key} is {value!r} but config.runtime.distributed is False; '
                'set it to True, or leave the other unset'
            )
    count, index = runtime['num_processes'], runtime['process_id']
    if count is not None and index is not None and index >= count:
        raise ConfigError(
            f'config.runtime.process_id is {index}; with config.runtime.num_processes={count} it '
            f'is 0 to {count - 1}'
        )
