"""What each setting may be: a test, and the words for it."""

import itertools
import re
from typing import Any

from gcnet_jax.ranges import Range, choice, kind, number, whole


def _is_size(value: Any) -> bool:
    sides = value if isinstance(value, (tuple, list)) else (value, value)
    return len(sides) == 2 and all(map(whole(1).allows, sides))


def _is_rising(value: Any) -> bool:
    return (
        isinstance(value, (tuple, list))
        and len(value) > 0
        and all(_ABOVE_0.allows(item) for item in value)
        and all(first < second for first, second in itertools.pairwise(value))
    )


def _is_triple(value: Any) -> bool:
    return (
        isinstance(value, (tuple, list))
        and len(value) == 3
        and all(number(-10, 10).allows(item) for item in value)
    )


def _is_address(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r'.+:\d{1,5}', value) is not None


def _is_patterns(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(isinstance(item, str) and item.strip() for item in value)
    return isinstance(value, str)


_FLAG = kind(bool, 'True or False')
_NAME = kind(str, 'a string')
_COUNT = whole(1)
_SIZE = Range(_is_size, 'a whole number from 1, or two of them: (height, width)')
_RATE = number(0, 1, open_high=True)
_FROM_0 = number(0)
_ABOVE_0 = number(0, open_low=True)
_SEED = Range(
    lambda value: whole(0).allows(value) and value < 2**32, 'a whole number from 0 to 2**32 - 1'
)
_AXIS = Range(
    lambda value: _COUNT.allows(value) or value == -1, 'a whole number from 1, or -1 for the rest'
)
# A task's own settings are in `Task.ranges` and `Task.data_ranges`, which win over these.
RULES: dict[str, Range] = {
    'model.name': Range(lambda value: value is None or isinstance(value, str), 'a string or None'),
    'model.dtype': choice('float32', 'bfloat16'),
    'data.name': _NAME,
    'data.data_dir': _NAME,
    'data.train_split': _NAME,
    'data.evaluation_split': _NAME,
    'data.image_size': _SIZE,
    'data.evaluation_image_size': _SIZE,
    'data.mean': Range(_is_triple, 'three numbers on the scale where 255 is 1'),
    'data.std': Range(
        lambda value: _is_triple(value) and all(item > 0 for item in value),
        'three positive numbers on the scale where 255 is 1',
    ),
    'data.flip': _FLAG,
    'data.skip_damaged': _FLAG,
    'data.num_threads': whole(0),
    'data.num_workers': whole(0),
    'optimizer.weight_decay': _FROM_0,
    'optimizer.clip_norm': _ABOVE_0,
    'optimizer.frozen': Range(_is_patterns, "patterns such as ('stem*', 'stage1*')"),
    'optimizer.layer_decay': number(0, 1, open_low=True),
    'optimizer.momentum': _RATE,
    'optimizer.nesterov': _FLAG,
    'optimizer.beta1': _RATE,
    'optimizer.beta2': _RATE,
    'optimizer.epsilon': _ABOVE_0,
    'optimizer.trust_coefficient': _ABOVE_0,
    'schedule.peak_learning_rate': _ABOVE_0,
    'schedule.warmup_epochs': _FROM_0,
    'schedule.warmup_steps': whole(0),
    'schedule.end_factor': number(0, 1),
    'schedule.poly_power': _ABOVE_0,
    'schedule.decay_epochs': Range(_is_rising, 'rising numbers above 0, such as (8, 11)'),
    'schedule.decay_factor': number(0, 1, open_low=True, open_high=True),
    'training.total_epochs': _ABOVE_0,
    'training.total_steps': _COUNT,
    'training.batch_size': _COUNT,
    'training.accumulation_steps': _COUNT,
    'training.early_stopping_epochs': _ABOVE_0,
    'training.early_stopping_steps': _COUNT,
    'training.ema_decay': _RATE,
    'training.seed': _SEED,
    'training.evaluation_epochs': _ABOVE_0,
    'training.evaluation_steps': _COUNT,
    'training.checkpoint_epochs': _ABOVE_0,
    'training.checkpoint_steps': _COUNT,
    'training.keep_checkpoints': _COUNT,
    'training.log_steps': _COUNT,
    'training.max_bad_steps': _COUNT,
    'training.init_from': _NAME,
    'training.new_classifier': _FLAG,
    'training.extend': _FLAG,
    'mesh.data': _AXIS,
    'mesh.fsdp': _AXIS,
    'mesh.spatial': _AXIS,
    'runtime.progress': choice('auto', 'bar', 'lines', 'none'),
    'runtime.tensorboard': _FLAG,
    'runtime.compilation_cache': Range(
        lambda value: isinstance(value, str) and value != '',
        "a directory, 'off', or None",
    ),
    'runtime.prefetch_batches': _COUNT,
    'runtime.distributed': _FLAG,
    'runtime.coordinator_address': Range(_is_address, 'HOST:PORT'),
    'runtime.num_processes': _COUNT,
    'runtime.process_id': whole(0),
    'runtime.heartbeat_timeout_seconds': _COUNT,
}
