"""Settings on the command line, above all the network and its options."""

from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from gcnet_jax.commands import config_files
from gcnet_jax.errors import ConfigError
from gcnet_jax.models.registry import create_model, list_models
from gcnet_jax.stored import ModelDescription, write_ported
from gcnet_jax.training.checks import check_config
from gcnet_jax.training.config import default_config, plain
from gcnet_jax.training.overrides import override

CONFIGS = Path(__file__).parents[2] / 'configs'
FILES = ['digits', 'cifar10', 'folder', 'imagenet', 'finetune']
# A config of one's own that says much about its network.
OWN = """
from gcnet_jax.training.config import default_config
def get_config():
    config = default_config()
    config.model.name = 'gc_resnet18'
    config.model.num_classes = 7
    config.model.dtype = 'bfloat16'
    config.model.context = {'stages': (4,), 'position': 'after_add', 'ratio': 0.5}
    config.model.widths = (8, 16, 24, 32)
    config.model.dropout_rate = 0.5
    config.model.norm.kind = 'group'
    config.model.norm.channel_groups = 4
    return config
"""


def read(file, *overrides):
    path = file if str(file).endswith('.py') else CONFIGS / f'{file}.py'
    arguments = ['train.py', f'--config={path}', *(f'--config.{text}' for text in overrides)]
    return config_files.read_flags(arguments, path)[0]


def options(config):
    model = plain(config)['model']
    return {key: value for key, value in model.items() if key not in ('name', 'norm')}


def network(config, **others):
    given = options(config) | {'num_classes': 4, 'dtype': 'float32'} | others
    return repr(create_model(config.model.name, **given))


def registered(name, **others):
    return repr(create_model(name, num_classes=4, dtype='float32', **others))


@pytest.fixture
def own(tmp_path):
    path = tmp_path / 'own.py'
    path.write_text(OWN)
    return path


@pytest.mark.parametrize('file', FILES)
def test_a_name_alone_gives_the_registered_network(file):
    for name in set(list_models()) - {read(file).model.name}:
        config = read(file, f'model.name={name}')
        assert network(config) == registered(name)


def test_another_name_leaves_the_options_of_the_file_behind(own):
    config = read(own, 'model.name=resnet18')
    assert config.model.to_dict() == {
        'name': 'resnet18',
        'num_classes': 7,
        'dtype': 'bfloat16',
        'norm': {'kind': 'batch', 'group_size': None, 'channel_groups': None},
    }
    same = read(own, 'model.name=gc_resnet18')
    assert same.model.context.stages == (4,)
    assert same.model.dropout_rate == 0.5


def test_the_parameters_are_those_of_the_registered_network():
    config = read('folder', 'model.name=gc_resnet50')
    model = create_model(config.model.name, **options(config) | {'num_classes': 1000})
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    registered = create_model('gc_resnet50', num_classes=1000)
    expected = jax.eval_shape(lambda x: registered.init(jax.random.key(0), x, train=False), images)
    assert jax.tree.map(lambda leaf: leaf.shape, shapes) == jax.tree.map(
        lambda leaf: leaf.shape, expected
    )


@pytest.mark.parametrize(
    ('file', 'overrides', 'context'),
    [
        ('folder', ['context.ratio=0.125'], {'stages': (2, 3, 4), 'position': 'after_conv2'}),
        (
            'folder',
            ['name=gc_resnet50', 'context.ratio=0.125'],
            {'stages': (2, 3, 4), 'position': 'after_conv3'},
        ),
        (
            'cifar10',
            ['context.ratio=0.125', 'name=gcresnet50t'],
            {'stages': (1, 2, 3, 4), 'position': 'after_conv2', 'norm_epsilon': 1e-6},
        ),
    ],
)
def test_one_number_of_a_context_is_that_of_the_named_network(file, overrides, context):
    config = read(file, *(f'model.{text}' for text in overrides))
    found = config.model.context.to_dict()
    assert found['ratio'] == 0.125
    assert {key: found[key] for key in context} == context


def test_an_entry_of_several_is_named_by_its_index():
    config = read('folder', 'model.name=gccnn', 'model.context[1].ratio=0.5')
    assert [entry['ratio'] for entry in config.model.context] == [1 / 16, 0.5]


@pytest.mark.parametrize('text', ['None', '()'])
def test_context_is_taken_out(text):
    config = read('folder', f'model.context={text}')
    assert network(config) == registered('gc_resnet18', context=None)


def test_context_is_given_whole():
    entry = {'block': 'squeeze_excite', 'stages': (4,), 'position': 'after_conv2', 'ratio': 0.5}
    config = read('folder', 'model.name=resnet18', f'model.context={entry}')
    assert network(config) == registered('resnet18', context=entry)


def test_options_of_the_network_have_their_own_types():
    config = read(
        'folder', 'model.dropout_rate=0.2', 'model.norm.kind=frozen', 'model.zero_init_residual',
        'model.widths=8,16,24,32', 'model.context.fusion=scale',
    )  # fmt: skip
    model = config.model
    assert (model.dropout_rate, model.norm.kind, model.zero_init_residual) == (0.2, 'frozen', True)
    assert model.widths == (8, 16, 24, 32)
    assert model.context.fusion == 'scale'
    network(config)
    refused = read(
        'imagenet', 'model.zero_init_residual=false', 'model.stem=small', 'model.num_classes=3'
    )
    assert (refused.model.zero_init_residual, refused.model.stem) == (False, 'small')


@pytest.mark.parametrize(
    ('override', 'message'),
    [
        ('model.drop_rate=0.2', r"did you mean 'config.model.dropout_rate'"),
        ('model.dropout_rate=much', r'dropout_rate must be a finite number'),
        ('model.dropout_rate=1.5', r'dropout_rate must be in \[0, 1\)'),
        ('model.dropout_rate', 'finite number'),
        ('model.widths=8', 'list of whole numbers'),
        ('model.zero_init_residual=3', 'True or False'),
        ('model.context.raito=0.5', "did you mean 'ratio'"),
        ('model.context.block=attention', 'unknown context block'),
        ('model.context.stages=all', 'whole numbers'),
        ('model.context=gc', 'context must be a mapping'),
        ('model.context[1].ratio=0.5', 'unknown setting'),
        ('model.context.ratio.x=0.5', 'unknown setting'),
        ('model.norm.kin=group', "did you mean 'config.model.norm.kind'"),
        ('model.norm.kind.x=group', 'unknown setting'),
        ('model.dropout_rate.x=1', 'unknown setting'),
        ('model.nam=resnet18', "did you mean 'config.model.name'"),
        ('data.evaluation_spilt=test', "did you mean 'config.data.evaluation_split'"),
    ],
)
def test_a_wrong_option_is_one_line(override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read('folder', override)
    assert override.partition('=')[0].rpartition('.')[0] in str(caught.value)
    assert len(str(caught.value)) < 700
    assert '\n' not in str(caught.value)


def test_a_network_without_context_says_how_to_give_one():
    with pytest.raises(ConfigError, match=r"resnet18 has no context; .*'stages'"):
        read('folder', 'model.name=resnet18', 'model.context.ratio=0.5')


def test_a_network_that_is_nowhere_named_is_asked_for():
    with pytest.raises(ConfigError, match=r'model.name is not set.*init_from'):
        read('finetune', 'model.dropout_rate=0.2')


@pytest.fixture
def ported(tmp_path):
    """A stored network whose context is not its entry's."""
    context = {'stages': (3,), 'position': 'after_conv3', 'ratio': 0.5}
    description = ModelDescription('gc_resnet50', {'num_classes': 9, 'context': context})
    place = tmp_path / 'ported'
    write_ported(place, description, {'params': {'kernel': np.ones(3, np.float32)}})
    return place


@pytest.mark.parametrize('file', FILES)
def test_a_checkpoint_says_which_network_and_preprocessing(file, ported):
    config = read(file, f'training.init_from={ported}')
    assert config.model.name is None
    assert config.data.image_size is None
    config = read(file, f'training.init_from={ported}', 'data.image_size=96')
    assert config.data.image_size == 96
    config = read(file, 'model.name=gc_resnet18', f'training.init_from={ported}')
    assert config.model.name == 'gc_resnet18'
    assert 'context' not in config.model
    config = read(file, f'training.init_from={ported}', 'model.context.ratio=0.25')
    assert config.model.context.to_dict() == {
        'stages': [3], 'position': 'after_conv3', 'ratio': 0.25
    }  # fmt: skip


def test_an_unknown_key_in_a_file_is_one_line(tmp_path):
    path = tmp_path / 'mine.py'
    path.write_text(OWN.replace('config.model.dropout_rate', 'config.training.total_epoch'))
    with pytest.raises(
        ConfigError, match=r"line 10 of mine.py: .*mean 'config.training.total_epochs'"
    ) as one:
        config_files.load_config(str(path))
    assert len(str(one.value)) < 300
    path.write_text(OWN.replace('config.model.dropout_rate', 'config.optimizer.batch_size'))
    with pytest.raises(ConfigError, match=r"did you mean 'config.training.batch_size'"):
        config_files.load_config(str(path))
    text = OWN.replace(
        'default_config()\n    config.model.name',
        'default_config()\n    name_task(config, "segmentation")\n    config.model.name',
    )
    text = text.replace('import default_config', 'import default_config, name_task')
    path.write_text(text.replace('config.model.dropout_rate', 'config.data.crop_scale'))
    with pytest.raises(
        ConfigError, match=r'data\.crop_scale is for classification and multi'
    ) as one:
        config_files.load_config(str(path))
    assert '\n' not in str(one.value)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('def get_config(:\n', r'line 1 of mine.py: def get_config\(:'),
        ('def get_config():\n    return 1 / 0\n', r'failed, line 2 of mine.py: ZeroDivisionError'),
        ('import nothing_of_this_name\n', r'failed, line 1 of mine.py: ModuleNotFoundError'),
    ],
)
def test_a_broken_file_names_its_line(tmp_path, text, message):
    path = tmp_path / 'mine.py'
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        config_files.load_config(str(path))


def test_another_task_comes_with_its_own_settings():
    config = read('folder', 'task.name=multilabel', 'task.erasing_probability=0.3')
    assert config.task.to_dict() == {'name': 'multilabel', 'erasing_probability': 0.3}
    assert read('folder', 'task.name=classification').task.label_smoothing == 0.1
    with pytest.raises(ConfigError, match="did you mean 'multilabel'"):
        read('folder', 'task.name=multi_label')
    with pytest.raises(ConfigError, match=r"did you mean 'config\.task\.label_smoothing'"):
        read('folder', 'training.label_smoothing=0.2')


def test_what_a_file_has_set_is_unset_by_none():
    assert read('folder').data.crop_scale == (0.35, 1.0)
    config = read('folder', 'data.crop_scale=None', 'data.augmentation=none')
    assert config.data.crop_scale is None
    check_config(config)
    assert read('finetune', 'optimizer.clip_norm=None').optimizer.clip_norm is None
    assert read('folder', 'model.norm.group_size=None').model.norm.group_size is None
    with pytest.raises(ConfigError, match=r'training\.seed'):
        check_config(read('folder', 'training.seed=None'))


def test_a_config_of_an_earlier_version_is_refused_in_one_line():
    earlier = plain(default_config())
    del earlier['task']
    config = override(ConfigDict(earlier), ['--config.training.seed=3'])
    with pytest.raises(ConfigError, match=r'config\.task must be a group'):
        check_config(config)


def test_options_of_a_backbone_are_set_as_those_of_the_network():
    config = read('segmentation', 'model.widths=(8,8,8,8)', 'model.backbone=gc_resnet18')
    assert (config.model.backbone, config.model.widths) == ('gc_resnet18', (8, 8, 8, 8))
    config = read('segmentation', 'model.context.ratio=0.5', 'model.backbone=gc_resnet18')
    assert config.model.context['ratio'] == 0.5
    assert config.model.context['stages'] == (2, 3, 4)


@pytest.mark.parametrize(
    ('setting', 'message'),
    [
        ('model.backbone=resnet19', "unknown backbone of gc_resnet18_d16 'resnet19'"),
        ('model.output_strid=8', "did you mean 'config.model.output_stride'"),
        ('model.output_stride=7', 'output_stride must be 4, 8, 16, 32 or None'),
        ('model.context.ratio=0.5', 'gc_resnet18_d16 has no context'),
        ('data.crop_scale=(0.5,1.0)', r'data\.crop_scale is for classification and multilabel'),
        ('data.scale_rang=(0.5,1.0)', "did you mean 'config.data.scale_range'"),
    ],
)
def test_a_setting_that_no_part_of_a_segmenter_reads_is_one_line(setting, message):
    with pytest.raises(ConfigError, match=message) as raised:
        read('segmentation', setting)
    assert '\n' not in str(raised.value)
