"""Every setting of a training run with its default; `checks.py` and `rules.py` say what it may be.

A setting is read in one place. None means that something else decides, as the comment says.
Durations end in `_epochs` or `_steps`; `steps` converts, and where a setting has both forms,
`_steps` wins if it is set.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from gcnet_jax.tasks import TASKS, find_task

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
# Where settings are now that earlier versions had elsewhere.
MOVED = {
    'training.label_smoothing': 'task.label_smoothing',
    'training.class_weights': 'task.class_weights',
    'data.mixup_alpha': 'task.mixup_alpha',
    'data.cutmix_alpha': 'task.cutmix_alpha',
    'data.erasing_probability': 'task.erasing_probability',
}
# What else may differ with training.extend.
EXTENDABLE = ('training.total_epochs', 'training.total_steps')


def default_config() -> ConfigDict:
    """Returns every setting with its default.

    The group `model` is open: it also takes every option of the network that it names. The group
    `task`, and part of the group `data`, has the settings of the task that it names, see
    `name_task`.
    """
    config = ConfigDict(
        {
            'model': _model(),
            'task': task_settings('classification'),
            'data': _data('classification'),
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


def task_settings(name: str) -> dict:
    """Returns the group `task` for a task: its name, and its settings with their defaults."""
    return {
        # What the network learns: 'classification', 'multilabel', 'segmentation', 'detection'; the
        # file of that name in gcnet_jax/tasks explains the other settings.
        'name': name,
        **_with_placeholders(find_task(name).settings),
    }


def _with_placeholders(settings: Mapping[str, Any]) -> dict:
    """Makes placeholders where a task has None or a type for what may be set."""
    kinds = {
        key: object if value is None else value
        for key, value in settings.items()
        if value is None or isinstance(value, type)
    }
    return {**settings, **{key: placeholder(value) for key, value in kinds.items()}}


def name_task(config: ConfigDict, name: str) -> None:
    """Chooses another task, with the default of each of its settings; changes config in place.

    Settings of the group `data` that all tasks read keep their values.
    """
    config.task = ConfigDict(task_settings(name))
    config.task.lock()
    data, before = ConfigDict(_data(name)), config.data.to_dict()
    data.update({key: value for key, value in before.items() if key in _common_data()})
    config.data = data
    config.data.lock()


def default_config_of(task: object) -> ConfigDict:
    """Returns every setting of a task with its default.

    Raises:
      ConfigError: There is no such task.
    """
    config = default_config()
    name_task(config, task)
    return config


def all_paths() -> list[str]:
    """Returns the path, such as 'data.name', of every setting of any task."""
    return sorted({path for task in TASKS for path, _ in leaves(default_config_of(task).to_dict())})


def explain_unread(path: str) -> str | None:
    """Explains a setting, such as 'data.crop_scale', that is not every task's; None for others."""
    group, _, key = path.partition('.')
    own = {'data': 'data_settings', 'task': 'settings'}.get(group)
    readers = [name for name, task in TASKS.items() if own and key in getattr(task, own)]
    if not readers or len(readers) == len(TASKS):
        return None
    return (
        f'config.{path} is for {" and ".join(readers)}, and no other task reads it; leave it out, '
        f'or choose such a task: --config.task.name={readers[0]}, in a config file '
        f'name_task(config, {readers[0]!r})'
    )


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
            # For 'batch': images whose statistics are taken together; None: the whole batch, over
            # all devices (with accumulation: the whole micro-batch).
            'group_size': placeholder(int),
            # For 'group': number of groups of channels; None: 32.
            'channel_groups': placeholder(int),
        },
    }


def _data(task: str) -> dict:
    return {**_common_data(), **_with_placeholders(find_task(task).data_settings)}


def _common_data() -> dict:
    """Returns what every task reads; `Task.data_settings` of a task explains its own."""
    return {
        # 'digits', any TFDS set of the task, or a folder data set that was prepared.
        'name': 'digits',
        # Where prepared data sets are; None: TFDS's own directory.
        'data_dir': placeholder(str),
        # Splits, with TFDS's slices: 'train[:90%]'. The one to evaluate on during training, None:
        # 'validation' where the data set has one, else 'test'.
        'train_split': 'train',
        'evaluation_split': placeholder(str),
        # What is None among the next four is as in the checkpoint of training.init_from, or without
        # one as in the network's entry.
        # Size of the images in pixels: one number for a square, or (height, width); at evaluation
        # None: image_size where it is set. For segmentation `image_size` is the training crop, and
        # `evaluation_image_size` the limits (short, long) that images are resized to, see
        # gcnet_jax.tasks.segmentation. For detection both are such limits; None: the other one.
        'image_size': placeholder(object),
        'evaluation_image_size': placeholder(object),
        # Mean and standard deviation of each channel, on the scale where 255 is 1.
        'mean': placeholder(tuple),
        'std': placeholder(tuple),
        # Mirror left and right half of the time. Not for digits.
        'flip': True,
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
        # Linear warm-up, then half a cosine down to `end_factor` times the peak; or, where
        # `decay_epochs` is set, such as (8, 11), a drop by `decay_factor` (None: 0.1) after each;
        # or, where `poly_power` is set, such as 0.9, that power of what is left of the run, down to
        # `end_factor` times the peak.
        'warmup_epochs': 0.0,
        'warmup_steps': placeholder(int),
        'end_factor': 0.0,
        'poly_power': placeholder(float),
        'decay_epochs': placeholder(tuple),
        'decay_factor': placeholder(float),
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
        # Decay of the moving average of the weights, which evaluation then uses; 0: none.
        'ema_decay': 0.0,
        # Everything random follows from it: weights, order of the data, augmentation, dropout.
        'seed': 0,
        # How often to evaluate (and save, so that the best can be kept), and to save besides. The
        # end always does both.
        'evaluation_epochs': 1.0,
        'evaluation_steps': placeholder(int),
        # End the run at an evaluation when the metric that decides which checkpoint is the best,
        # such as eval/accuracy, has not improved for so long; None: never.
        'early_stopping_epochs': placeholder(float),
        'early_stopping_steps': placeholder(int),
        'checkpoint_epochs': 1.0,
        'checkpoint_steps': placeholder(int),
        # How many of the newest checkpoints to keep, beside the best by the task's metric.
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
        # the step it has reached, the learning rate follows the schedule of the new total.
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
        # Several processes, one per host or per GPU, all started with this same command. A TPU pod
        # slice, SLURM and Open MPI provide the rest.
        'distributed': False,
        # Elsewhere: HOST:PORT of the first process, how many there are, and which this one is, from
        # 0.
        'coordinator_address': placeholder(str),
        'num_processes': placeholder(int),
        'process_id': placeholder(int),
        # Silence after which a process counts as lost, and the others stop with an error.
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

    The result need not be an integer; the caller rounds it where it needs one.
    """
    if group[f'{name}_steps'] is not None:
        return group[f'{name}_steps']
    return group[f'{name}_epochs'] * steps_per_epoch


def is_due(step: int, interval: float) -> bool:
    """Whether `step` is the one nearest to a multiple of `interval`, which is in steps, above 0.

    Where the interval is a step or less, every step is.
    """
    return round(max(1, round(step / interval)) * interval) == step


def changed_keys(config: Mapping, other: Mapping) -> list[str]:
    """Returns where two plain configs differ, but for what may change when a run is continued."""
    first, second = (
        {MOVED.get(key, key): value for key, value in leaves(tree)} for tree in (config, other)
    )
    missing = object()
    # A run of an earlier version lacks the settings that were added since.
    groups = {key.partition('.')[0] for key in first}
    defaults = plain(default_config_of(second.get('task.name', 'classification')))
    for key, default in leaves(defaults):
        if key not in first and key in second and key.partition('.')[0] in groups:
            first[key] = default
    return [
        key
        for key in sorted(first.keys() | second.keys())
        if first.get(key, missing) != second.get(key, missing) and not key.startswith(RESUMABLE)
    ]
