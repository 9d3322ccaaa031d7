import pytest

from gcnet_jax.errors import ConfigError
from gcnet_jax.training.checks import check_config
from gcnet_jax.training.config import (
    changed_keys,
    default_config,
    is_due,
    leaves,
    name_task,
    plain,
    steps,
)


def test_the_defaults_are_allowed():
    check_config(default_config())


def test_the_defaults_are_those_that_stored_runs_were_started_with():
    """A stored run that lacks a setting is continued with its default: no default may change."""
    defaults = plain(default_config())
    assert {key: value for key, value in leaves(defaults) if value is not None} == {
        'model.name': 'gccnn',
        'model.dtype': 'float32',
        'model.norm.kind': 'batch',
        'data.name': 'digits',
        'data.train_split': 'train',
        'data.augmentation': 'resized_crop',
        'data.flip': True,
        'task.mixup_alpha': 0.0,
        'task.cutmix_alpha': 0.0,
        'task.erasing_probability': 0.0,
        'task.name': 'classification',
        'data.randaugment_ops': 0,
        'data.color_jitter': 0.0,
        'data.hue_jitter': 0.0,
        'data.skip_damaged': False,
        'data.num_workers': 0,
        'optimizer.name': 'sgd',
        'optimizer.weight_decay': 1e-4,
        'schedule.peak_learning_rate': 0.1,
        'schedule.warmup_epochs': 0.0,
        'schedule.end_factor': 0.0,
        'training.total_epochs': 10.0,
        'training.batch_size': 128,
        'training.accumulation_steps': 1,
        'task.label_smoothing': 0.0,
        'training.ema_decay': 0.0,
        'training.seed': 0,
        'training.evaluation_epochs': 1.0,
        'training.checkpoint_epochs': 1.0,
        'training.keep_checkpoints': 2,
        'training.log_steps': 50,
        'training.max_bad_steps': 1,
        'training.extend': False,
        'mesh.data': -1,
        'mesh.fsdp': 1,
        'mesh.spatial': 1,
        'runtime.progress': 'auto',
        'runtime.tensorboard': True,
        'runtime.prefetch_batches': 2,
        'runtime.distributed': False,
        'runtime.heartbeat_timeout_seconds': 100,
    }


@pytest.mark.parametrize(
    ('key', 'value', 'message'),
    [
        (
            'training.total_epochs',
            0.0,
            r'config.training.total_epochs is 0.0; it must be a number in',
        ),
        ('training.batch_size', -1, 'whole number from 1'),
        ('training.accumulation_steps', 3, 'accumulation_steps=3 does not divide'),
        ('task.label_smoothing', 1.0, r'a number in \[0, 1\)'),
        ('training.ema_decay', -0.1, r'a number in \[0, 1\)'),
        ('training.seed', 2**32, '0 to'),
        ('training.keep_checkpoints', 0, 'whole number from 1'),
        ('training.new_classifier', True, 'init_from is not set'),
        ('data.image_size', 0, 'whole number from 1'),
        ('data.crop_fraction', 1.5, r'a number in \(0, 1\]'),
        ('data.crop_scale', (0.5, 0.2), 'smallest <= largest'),
        ('data.augmentation', 'pad', "'pad_crop'"),
        ('data.interpolation', 'cubic', "'bicubic'"),
        ('task.erasing_probability', 2.0, r'\[0, 1\]'),
        ('data.randaugment_ops', -1, 'whole number from 0'),
        ('data.randaugment_magnitude', 31, '0 to 30'),
        ('data.randaugment_magnitude', 9, 'randaugment_ops is 0; set it'),
        ('data.color_jitter', -0.1, r'\[0, inf\)'),
        ('data.hue_jitter', 0.6, r'\[0, 0.5\]'),
        ('optimizer.frozen', 3, 'patterns such as'),
        ('optimizer.frozen', ('stem', ''), 'patterns such as'),
        ('optimizer.layer_decay', 0.0, r'\(0, 1\]'),
        ('task.class_weights', 'equal', "'balanced'"),
        ('task.class_weights', (1.0, -1.0), 'one number from 0 per class'),
        ('task.class_weights', (1.0, float('inf')), 'one number from 0 per class'),
        ('task.class_weights', (0.0, 0.0), 'not all 0'),
        ('training.early_stopping_steps', 0, 'whole number from 1'),
        ('training.early_stopping_epochs', 0.0, r'\(0, inf\)'),
        ('model.dtype', 'float64', "'bfloat16'"),
        ('model.num_classes', 1, 'whole number from 2'),
        ('optimizer.name', 'adam', "did you mean 'adamw'"),
        ('optimizer.momentum', 1.0, r'\[0, 1\)'),
        ('optimizer.beta1', 0.9, 'sgd does not have it'),
        ('optimizer.clip_norm', 0.0, r'\(0, inf\)'),
        ('schedule.peak_learning_rate', float('nan'), r'\(0, inf\)'),
        ('schedule.end_factor', 2.0, r'\[0, 1\]'),
        ('schedule.poly_power', 0.0, r'\(0, inf\)'),
        ('mesh.fsdp', 0, 'or -1'),
        ('runtime.progress', 'loud', "'lines'"),
        ('runtime.compilation_cache', '', "a directory, 'off', or None"),
        ('runtime.heartbeat_timeout_seconds', 0, 'whole number from 1'),
        ('runtime.num_processes', 2, 'distributed is False'),
        ('runtime.coordinator_address', 'first', 'must be HOST:PORT'),
        ('runtime.process_id', -1, 'whole number from 0'),
    ],
)
def test_a_value_out_of_range_is_refused(key, value, message):
    config = default_config()
    group, name = key.split('.')
    config[group][name] = value
    with pytest.raises(ConfigError, match=message) as caught:
        check_config(config)
    assert name in str(caught.value)
    assert '\n' not in str(caught.value)


def test_unknown_settings_are_refused_with_the_nearest_name():
    for group in sorted(set(default_config()) - {'model'}):
        config = default_config().unlock()
        known = sorted(config[group])[0]
        config[group][known + 'x'] = 3
        with pytest.raises(ConfigError, match=rf"did you mean 'config.{group}.{known}'"):
            check_config(config)
    config = default_config().unlock()
    config.optimiser = {'name': 'sgd'}
    with pytest.raises(ConfigError, match=r"unknown setting 'config.optimiser'; did you mean"):
        check_config(config)
    config = default_config().unlock()
    del config.data.flip
    with pytest.raises(ConfigError, match=r'config.data.flip is missing'):
        check_config(config)


def test_a_config_is_locked_but_for_the_options_of_the_network():
    config = default_config()
    with pytest.raises(AttributeError):
        config.training.total_epoch = 3
    config.model.width = 3
    check_config(config)


def test_settings_that_would_do_nothing_are_refused():
    config = default_config()
    config.data.augmentation = 'none'
    config.data.crop_scale = (0.2, 1.0)
    with pytest.raises(ConfigError, match='choose resized_crop'):
        check_config(config)


def test_a_rate_falls_by_one_rule():
    config = default_config()
    config.schedule.poly_power = 0.9
    check_config(config)
    config.schedule.decay_epochs = (8, 11)
    with pytest.raises(ConfigError, match=r'poly_power is 0\.9 and config\.schedule\.decay_epochs'):
        check_config(config)


def test_a_process_is_one_of_those_there_are():
    config = default_config()
    config.runtime.distributed = True
    config.runtime.num_processes = 4
    config.runtime.process_id = 3
    check_config(config)
    for index in (4, 5):
        config.runtime.process_id = index
        with pytest.raises(
            ConfigError, match=rf'process_id is {index}; .*num_processes=4 it is 0 to 3'
        ):
            check_config(config)


def test_durations_are_converted_in_one_place():
    group = {'total_epochs': 2.5, 'total_steps': None}
    assert steps(group, 'total', 10.0) == 25
    assert steps(group | {'total_steps': 7}, 'total', 10.0) == 7


@pytest.mark.parametrize('interval', [1, 0.4, 0.99, 1.5, 3, 22.46875, 7.5])
def test_an_interval_that_is_no_whole_number_is_met_on_average(interval):
    due = [step for step in range(1, 1000) if is_due(step, interval)]
    if interval <= 1:
        assert due == list(range(1, 1000))
    else:
        expected = [round(count * interval) for count in range(1, 1000)]
        assert due == [step for step in expected if step < 1000]


def test_leaves_have_the_paths_of_the_command_line():
    tree = {'a': {'b': 1, 'c': ({'d': 2}, {'d': 3})}, 'e': (4, 5)}
    assert dict(leaves(tree)) == {'a.b': 1, 'a.c[0].d': 2, 'a.c[1].d': 3, 'e': (4, 5)}


def test_what_may_change_when_a_run_is_continued():
    first, second = default_config(), default_config()
    second.mesh.fsdp = 2
    second.data.data_dir = '/elsewhere'
    second.runtime.progress = 'bar'
    assert changed_keys(plain(first), plain(second)) == []
    second.training.seed = 1
    second.model.width = 4
    assert changed_keys(plain(first), plain(second)) == ['model.width', 'training.seed']


def test_a_run_of_an_earlier_version_had_some_settings_elsewhere():
    now = plain(default_config())
    before = plain(default_config())
    task = before.pop('task')
    before['training'] |= {name: task[name] for name in ('label_smoothing', 'class_weights')}
    before['data'] |= {
        name: task[name] for name in ('mixup_alpha', 'cutmix_alpha', 'erasing_probability')
    }
    assert changed_keys(before, now) == []
    before['training']['label_smoothing'] = 0.1
    assert changed_keys(before, now) == ['task.label_smoothing']


def test_a_task_has_its_own_settings():
    config = default_config()
    name_task(config, 'multilabel')
    check_config(config)
    with pytest.raises(AttributeError, match='label_smoothing'):
        config.task.label_smoothing = 0.1
    config = default_config()
    config.task.name = 'multilabel'  # Without name_task: the settings are still the other's.
    with pytest.raises(ConfigError, match='class_weights is for classification, and no other'):
        check_config(config)
    config.task.name = 'tracking'
    with pytest.raises(ConfigError, match="unknown task 'tracking'"):
        check_config(config)


def test_data_settings_that_a_task_does_not_read_are_refused_by_name():
    config = default_config()
    config.data.image_size = 64
    name_task(config, 'segmentation')
    check_config(config)
    assert config.data.image_size == 64
    assert config.data.scale_range == (0.5, 2.0)
    with pytest.raises(AttributeError, match='crop_scale'):
        config.data.crop_scale = (0.5, 1.0)
    config.data.unlock().crop_scale = (0.5, 1.0)
    with pytest.raises(ConfigError, match=r'data\.crop_scale is for classification and multilabel'):
        check_config(config)
    config = default_config()
    config.data.unlock().scale_range = (0.5, 1.0)
    with pytest.raises(ConfigError, match=r'config\.data\.scale_range is for segmentation, and no'):
        check_config(config)


@pytest.mark.parametrize(
    ('key', 'value'),
    [
        ('data.scale_range', (2.0, 0.5)),
        ('data.scale_range', 0.5),
        ('data.category_max_ratio', 0.0),
        ('data.photometric', 1),
        ('task.auxiliary_weight', -0.1),
        ('task.count_ignored', 'no'),
    ],
)
def test_settings_of_segmentation_have_ranges(key, value):
    config = default_config()
    name_task(config, 'segmentation')
    group, name = key.split('.')
    del config[group].unlock()[name]
    config[group][name] = value
    with pytest.raises(ConfigError, match=rf'config\.{group}\.{name} is .*it must be'):
        check_config(config)


def test_a_setting_that_a_stored_run_lacks_had_its_default():
    stored, now = plain(default_config()), plain(default_config())
    del stored['task']['label_smoothing']
    assert changed_keys(stored, now) == []
    now['task']['label_smoothing'] = 0.1
    assert changed_keys(stored, now) == ['task.label_smoothing']
