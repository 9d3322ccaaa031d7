"""Every setting of every config does something, or is refused."""

import ast
import copy
from pathlib import Path

import jax
import numpy as np
import pytest

from gcnet_jax.commands.config_files import load_config
from gcnet_jax.data import detection_sources, segmentation_sources, sources
from gcnet_jax.data.prepared import check_set_name
from gcnet_jax.data.preprocessing import KeepRatio, Preprocessing
from gcnet_jax.errors import UserError
from gcnet_jax.stored import ModelDescription
from gcnet_jax.training import experiment, initial
from gcnet_jax.training.config import leaves, plain

CONFIGS = Path(__file__).parents[2] / 'configs'
NAMES = [
    'digits',
    'cifar10',
    'folder',
    'imagenet',
    'imagenet:resnet50',
    'finetune',
    'finetune:imagenet',
    'multilabel',
    'segmentation',
    'segmentation:fcn',
    'cityscapes',
    'cityscapes:fcn',
    'detection',
    'coco_mask_rcnn',
    'coco_mask_rcnn:gc_r4',
    'coco_mask_rcnn:plain',
]
CLASSES = {'imagenet2012': 1000, 'voc/2007': 20, 'my_cityscapes': 19, 'my_coco': 80}


OWN_SIZES = Preprocessing(train_size=160, test_size=192, crop_fraction=0.9)
STORED = {
    'DIR': ModelDescription('gcresnet50t', {'num_classes': 1000}, preprocessing=OWN_SIZES),
    '/elsewhere': ModelDescription('gc_resnet18', {'num_classes': 5}, preprocessing=OWN_SIZES),
    'DETECTOR': ModelDescription(
        'gc_mask_rcnn_resnet50_fpn',
        {'num_classes': 80},
        preprocessing=KeepRatio(short_side=600, long_side=1000),
        task='detection',
    ),
    'ANOTHER': ModelDescription(
        *('mask_rcnn_resnet50_fpn', {'num_classes': 80}),
        preprocessing=KeepRatio(),
        task='detection',
    ),
}


class FakeSource:
    """Tells how it was opened; has as many examples and labels as the real one."""

    def __init__(self, name, split, data_dir, purpose):
        split = split or f'the one for {purpose}'
        self.name, self.split, self.data_dir = name, split, data_dir
        self.num_classes = CLASSES.get(name, 10)
        self.label_names = tuple(map(str, range(self.num_classes)))
        self.is_multilabel = name == 'voc/2007'
        self.has_masks = True

    def __len__(self):
        return 50000

    def __getitem__(self, index):
        return {'label': index * index % self.num_classes}

    def __repr__(self):
        return f'{self.name} {self.split} {self.data_dir}'


@pytest.fixture(autouse=True)
def fake_data(monkeypatch):
    monkeypatch.setattr(sources, 'load_source', FakeSource)
    monkeypatch.setattr(segmentation_sources, 'load_segmentation', FakeSource)
    monkeypatch.setattr(detection_sources, 'load_detection', FakeSource)
    monkeypatch.setattr(initial, 'read_model_description', lambda place, choose: STORED[place])
    # Shapes of large networks take seconds, and nothing here depends on them.
    monkeypatch.setattr(experiment, 'check_shapes', lambda built: None)


def fingerprint(built):
    """What a config built, without the config itself."""
    rng = np.random.default_rng(0)
    params = {'kernel': rng.normal(size=(3, 2)), 'bias': rng.normal(size=2)}
    if built.step_options.frozen:  # The patterns of the configs that have any.
        names = ('stem', 'stage1_0', 'stage2_0')
        params['backbone'] = {name: {'kernel': rng.normal(size=(2, 2))} for name in names}
    params = jax.tree.map(lambda leaf: leaf.astype(np.float32), params)
    gradient = jax.tree.map(lambda leaf: 3 * leaf + 1, params)
    state, updates = built.optimizer.init(params), []
    for _ in range(3):
        update, state = built.optimizer.update(gradient, state, params)
        updates.append(jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), update))
    points = np.linspace(0, built.durations.total, 7).astype(int)
    return repr(
        {
            'model': built.model,
            'description': built.description,
            'sources': (built.train_source, built.evaluation_source),
            'loaders': (built.train_batches.keywords, built.evaluation_batches.keywords),
            'schedule': [float(built.schedule(int(point))) for point in points],
            'updates': updates,
            'steps': built.step_options,
            'task': built.task,
            'mesh': dict(built.mesh.shape),
            'durations': built.durations,
            'init_from': built.init_from,
        }
    )


def read_while_running():
    """The settings that the package reads where it uses them, as `config.GROUP.KEY`."""
    package = CONFIGS.parent / 'gcnet_jax'
    found = set()
    for path in (*package.glob('training/*.py'), *package.glob('commands/*.py')):
        if path.name in ('config.py', 'rules.py', 'experiment.py'):
            continue  # They check settings, and build what the fingerprint shows.
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Attribute):
                continue
            group = node.value
            if isinstance(group, ast.Name):  # runtime = config.runtime
                found.add(f'{group.id}.{node.attr}')
            elif isinstance(group, ast.Attribute):
                owner = getattr(group.value, 'id', getattr(group.value, 'attr', None))
                if owner == 'config':
                    found.add(f'{group.attr}.{node.attr}')
    return found


def other(key, value):
    """A different value for a setting, one that its neighbours allow where there is one."""
    special = {
        'model.name': 'resnet18',
        'model.dtype': 'bfloat16' if value == 'float32' else 'float32',
        'model.num_classes': 7,
        'model.norm.kind': 'group',
        'model.norm.group_size': 2,
        'model.norm.channel_groups': 4,
        'data.name': 'another',
        'data.evaluation_split': 'another',
        'data.mean': (0.1, 0.2, 0.3),
        'data.std': (0.1, 0.2, 0.3),
        'data.data_dir': '/elsewhere',
        'data.crop_scale': (0.5, 1.0),
        'data.scale_range': (0.5, 1.5),
        'data.scales': ((320, 640), (400, 640)),
        'data.canvases': ((1344, 1344),),
        'data.crop_fraction': 0.5,
        'data.interpolation': 'nearest',
        'data.augmentation': 'none' if value != 'none' else 'pad_crop',
        'data.randaugment_magnitude': 7,
        'optimizer.name': 'lars',
        'schedule.decay_epochs': (1.5, 2.5),
        'optimizer.frozen': ('bias',),
        'optimizer.clip_norm': 0.7,
        'task.class_weights': 'balanced',
        'task.name': 'classification' if value == 'multilabel' else 'multilabel',
        'optimizer.nesterov': value is False,
        'training.new_classifier': True,
        'training.init_from': 'ANOTHER' if value == 'DETECTOR' else '/elsewhere',
        'training.batch_size': value * 2 if isinstance(value, int) else value,
        'training.total_steps': 10**6,
        'training.accumulation_steps': 2,
        'mesh.data': 4,
        'mesh.fsdp': 2,
        'mesh.spatial': 2,
        'runtime.progress': 'none',
        'runtime.compilation_cache': 'off',
        'runtime.coordinator_address': 'first:1234',
        'runtime.num_processes': 4,
        'runtime.process_id': 1,
    }
    if key in special:
        return special[key]
    if key.endswith('image_size') and isinstance(value, tuple):
        return tuple(2 * side for side in value)
    if value is None and key.endswith('image_size'):
        return 96
    if value is None:
        return 3 if key.endswith(('_steps', 'size', 'threads')) else 0.7
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 + 0.0123
    return value[:-1] if isinstance(value, (tuple, str)) else None


# Settings that are refused unless another one has a certain value.
NEEDS = {
    'data.randaugment_magnitude': ('data.randaugment_ops', 2),
    'schedule.decay_factor': ('schedule.decay_epochs', (1.5, 2.5)),
    'model.norm.channel_groups': ('model.norm.kind', 'group'),
    'runtime.coordinator_address': ('runtime.distributed', True),
    'runtime.num_processes': ('runtime.distributed', True),
    'runtime.process_id': ('runtime.distributed', True),
    'training.new_classifier': ('training.init_from', 'DIR'),
}


def change(config, key, value, strict=True):
    """Sets one leaf, by its path on the command line, in a copy."""
    tree = copy.deepcopy(config.to_dict())
    *parents, last = key.replace('[', '.').replace(']', '').split('.')
    place = tree
    for name in parents:
        place = place[int(name) if name.isdigit() else name]
    assert place[last] != value or not strict
    place[last] = value
    return type(config)(tree)


def load(name):
    file, _, variant = name.partition(':')
    config = load_config(str(CONFIGS / f'{file}.py'), variant)
    if file == 'finetune':
        config.training.init_from = 'DIR'
    if file == 'detection':
        config.training.init_from = 'DETECTOR'
        config.training.batch_size = 2 * jax.device_count()  # It is for one.
    return config


def instead_of(key, config):
    """Whether a setting is unread because the config has another one in its place."""
    group, _, name = key.partition('.')
    if name.endswith('_epochs'):
        return config[group].get(name.replace('_epochs', '_steps')) is not None
    return key == 'schedule.decay_factor' and config.schedule.poly_power is not None


@pytest.mark.parametrize('name', NAMES)
def test_every_setting_changes_what_is_built_or_is_refused(name):
    original = load(name)
    unchanged = fingerprint(experiment.assemble(original))
    dead, refused, running = [], [], read_while_running()
    for key, value in leaves(original.to_dict()):
        config, before = original, unchanged
        if instead_of(key, original):
            continue
        if (
            key in NEEDS
            and (key != 'training.new_classifier' or original.training.init_from is None)
            and original.to_dict() != change(original, *NEEDS[key], strict=False).to_dict()
        ):
            config = change(original, *NEEDS[key])
            before = fingerprint(experiment.assemble(config))
        try:
            built = experiment.assemble(change(config, key, other(key, value)))
        except UserError:
            refused.append(key)
            continue
        if fingerprint(built) == before and key not in running:
            dead.append(key)
    assert not set(refused) & NEEDS.keys()
    assert dead == []
    # Only what the other settings exclude: options of other optimizers, and the like.
    # Each task has settings of its own, and reads data of its own.
    allowed = ('optimizer.', 'model.', 'mesh.', 'data.crop_scale', 'task.name')
    if original.task.name == 'multilabel' or original.model.num_classes is not None:
        allowed += ('data.name',)
    if original.schedule.poly_power is not None:
        allowed += ('schedule.decay_epochs',)
    if original.schedule.decay_epochs is not None:
        allowed += ('schedule.end_factor', 'schedule.poly_power')
    if original.training.batch_size < 2 * jax.device_count():
        allowed += ('training.accumulation_steps',)
    if original.data.get('crop_scale') is not None:
        allowed += ('data.augmentation',)
    assert [key for key in refused if not key.startswith(allowed)] == []


@pytest.mark.parametrize('name', NAMES)
def test_a_config_is_plain_data_and_opens_with_its_command(name):
    config = load(name)
    assert plain(config)['model']['name'] == config.model.name
    text = (CONFIGS / f'{name.partition(":")[0]}.py').read_text()
    assert 'python train.py' in text.split('"""')[1]


@pytest.mark.parametrize(
    ('name', 'twin', 'networks'),
    [
        ('imagenet', 'resnet50', ('gc_resnet50', 'resnet50')),
        ('segmentation', 'fcn', ('gc_resnet18_d16', 'fcn_resnet18_d16')),
        ('cityscapes', 'fcn', ('gc_resnet50_d8_cityscapes', 'fcn_resnet50_d8_cityscapes')),
        (
            *('coco_mask_rcnn', 'gc_r4'),
            ('gc_mask_rcnn_resnet50_fpn', 'gc_mask_rcnn_resnet50_r4_fpn'),
        ),
        ('coco_mask_rcnn', 'plain', ('gc_mask_rcnn_resnet50_fpn', 'mask_rcnn_resnet50_fpn')),
    ],
)
def test_the_twins_differ_in_nothing_but_the_context(name, twin, networks):
    first, second = plain(load(name)), plain(load(f'{name}:{twin}'))
    assert (first['model'].pop('name'), second['model'].pop('name')) == networks
    assert first == second


@pytest.mark.parametrize('name', ['segmentation', 'cityscapes', 'detection', 'coco_mask_rcnn'])
def test_the_set_of_a_config_can_be_prepared_under_its_name(name, tmp_path):
    check_set_name(load(name).data.name, str(tmp_path), overwrite=False)


def test_every_config_is_tested():
    assert {name.partition(':')[0] for name in NAMES} == {
        path.stem for path in CONFIGS.glob('*.py')
    }


def test_a_run_is_as_long_as_its_config_says():
    built = experiment.assemble(load('imagenet'))
    assert built.durations.total == round(120 * 50000 / 1024)
    assert built.durations.evaluation == 50000 / 1024
    assert built.config.training.log_steps == 100
