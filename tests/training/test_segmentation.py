"""Whole runs of a small segmenter on pictures made here, and what they can start from."""

import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from gcnet_jax.errors import CheckpointError, ConfigError
from gcnet_jax.models.registry import create_model
from gcnet_jax.stored import ModelDescription, load_variables, read_model_description, write_ported
from gcnet_jax.training.config import default_config, name_task
from gcnet_jax.training.experiment import assemble
from gcnet_jax.training.loop import train
from gcnet_jax.training.metrics import read_metrics
from gcnet_jax.training.overrides import override
from gcnet_jax.training.start import read_initial
from tests.training.compare_runs import assert_the_same, one_step

LABELS = ('grass', 'sea', 'sky')
COLORS = ((40, 160, 50), (30, 60, 150), (190, 220, 240))
BACKBONE = {'stage_sizes': (1, 1), 'widths': (8, 8), 'stem': 'small'}

pytestmark = pytest.mark.usefixtures('compile_once')


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """A folder of landscapes, whose horizon and shore lie anywhere, and a strip that is unclear."""
    folder = tmp_path_factory.mktemp('landscapes')
    rng = np.random.default_rng(0)
    for split, count in (('train', 20), ('val', 6)):
        for kind in ('images', 'labels'):
            (folder / kind / split).mkdir(parents=True)
        for index in range(count):
            shape = (24, 32) if index % 3 else (40, 28)
            labels = np.zeros(shape, np.uint8)
            labels[:, : rng.integers(8, 20)] = 1
            labels[: rng.integers(6, 14)] = 2
            pixels = np.array(COLORS)[labels] + rng.integers(-30, 31, (*shape, 3))
            labels[-3:] = 255
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f'images/{split}/{index}.png')
            Image.fromarray(labels).save(folder / f'labels/{split}/{index}.png')
    (folder / 'classes.txt').write_text('\n'.join(LABELS))
    return folder


@pytest.fixture
def config(pictures):
    return tiny_config(pictures)


def tiny_config(pictures, **training):
    config = default_config()
    name_task(config, 'segmentation')
    config.model.name = 'gc_resnet18_d16'
    options = {'backbone': 'resnet20', 'output_stride': None, **BACKBONE}
    options |= {'channels': 8, 'context_ratio': 0.5, 'auxiliary_channels': 4}
    config.model.update(options)
    config.data.name = str(pictures)
    config.data.image_size = (16, 24)
    config.data.evaluation_image_size = (24, 32)
    config.data.num_threads = 0
    config.data.photometric = False
    config.schedule.peak_learning_rate = 0.1
    config.schedule.poly_power = 0.9
    config.training.batch_size = 8
    config.training.total_steps = 40
    config.training.log_steps = 10
    config.training.evaluation_steps = 20
    config.training.checkpoint_steps = 20
    config.training.keep_checkpoints = 9
    config.runtime.progress = 'lines'
    config.runtime.tensorboard = False
    config.training.update(training)
    return config


@pytest.fixture(scope='module')
def finished(pictures, tmp_path_factory, compile_once):
    workdir = tmp_path_factory.mktemp('finished')
    return workdir, train(tiny_config(pictures), workdir)


def test_it_learns(finished):
    workdir, final = finished
    evaluations = [line for line in read_metrics(workdir) if 'eval/miou' in line]
    assert [line['step'] for line in evaluations] == [20, 40]
    assert evaluations[0]['eval/miou'] < evaluations[1]['eval/miou']
    assert final['eval/miou'] > 0.8
    assert final['eval/examples'] == 6
    assert {'eval/loss', 'eval/pixel_accuracy', 'eval/mean_accuracy'} <= final.keys()
    assert final['train/pixel_accuracy'] > 0.8
    description = read_model_description(workdir)
    assert (description.task, description.label_names) == ('segmentation', LABELS)
    images = description.preprocessing
    assert (images.train_size, images.short_side, images.long_side) == ((16, 24), 24, 32)


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_in_the_same_weights(finished, pictures, tmp_path):
    whole, _ = finished
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / 'checkpoints' / '40')
    train(tiny_config(pictures), tmp_path)
    assert_the_same(tmp_path, whole)


@pytest.fixture(scope='module')
def classifier(tmp_path_factory, random_variables):
    """A checkpoint of a classifier with the backbone's shapes; returns it and its variables."""
    options = {**BACKBONE, 'num_classes': 5}
    model = create_model('resnet20', **options)
    variables = random_variables(model, np.zeros((1, 16, 16, 3), np.float32), train=False)
    description = ModelDescription('resnet20', options, tuple('abcde'))
    place = tmp_path_factory.mktemp('classifier') / 'ported'
    write_ported(place, description, variables)
    return place, variables


@pytest.mark.slow
def test_a_classifier_fills_the_backbone(classifier, config, tmp_path, capsys):
    place, variables = classifier
    train(one_step(config, place), tmp_path)
    told = capsys.readouterr().out
    assert told.count('the backbone is that of resnet20; the heads start at random') == 1
    params = load_variables(tmp_path)[1]['params']
    expected = {name: leaf for name, leaf in variables['params'].items() if name != 'classifier'}
    jax.tree.map(np.testing.assert_array_equal, params['backbone'], expected)
    assert np.abs(params['head']['logits']['kernel']).max() < 0.1
    # Values are normalised as the checkpoint's were.
    assert read_model_description(tmp_path).preprocessing.mean == (0.485, 0.456, 0.406)


def test_a_classifier_whose_last_layer_is_to_be_kept_is_refused(classifier, config, tmp_path):
    config = one_step(config, classifier[0])
    config.training.new_classifier = False
    with pytest.raises(ConfigError, match='has no head for segmentation'):
        train(config, tmp_path)


@pytest.mark.slow
def test_a_segmenter_keeps_the_classes_it_knows_by_name(
    finished, pictures, tmp_path, monkeypatch, capsys
):
    workdir, _ = finished
    (tmp_path / 'folder').mkdir()
    for kind in ('images', 'labels'):
        (tmp_path / 'folder' / kind).symlink_to(pictures / kind)
    (tmp_path / 'folder' / 'classes.txt').write_text('sky\nroad\ngrass')
    train(one_step(tiny_config(tmp_path / 'folder'), workdir), tmp_path / 'run')
    assert "2 of 3 outputs of the classifier are the checkpoint's" in capsys.readouterr().out
    before, after = (load_variables(place)[1]['params'] for place in (workdir, tmp_path / 'run'))
    for head in ('head', 'auxiliary_head'):
        old, new = (params[head]['logits']['kernel'] for params in (before, after))
        np.testing.assert_array_equal(new[:, [0, 2]], old[:, [2, 0]])
        assert np.abs(new[:, 1] - old[:, 1]).max() > 1e-3
    jax.tree.map(np.testing.assert_array_equal, after['backbone'], before['backbone'])


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'stem': 'none'}, r'stem is small there and none here.*--config\.model\.stem=small'),
        ({'widths': (8, 16)}, r'widths is .*give --config\.model\.widths='),
        ({'backbone': 'resnet20_a', 'stem': 'small'}, r'is resnet20_a.*model\.backbone=resnet20'),
        (
            {'backbone': 'resnet18', 'stem': 'imagenet'},
            r'--config\.model\.backbone=resnet20 --config\.model\.stem=small',
        ),
    ],
)
def test_a_backbone_of_another_kind_says_what_to_set(classifier, config, tmp_path, change, message):
    config.model.update(change)
    built = assemble(one_step(config, classifier[0]))
    with pytest.raises(ConfigError, match=message) as raised:
        read_initial(built, tmp_path)
    assert '\n' not in str(raised.value)


def test_a_network_of_another_task_is_refused_by_name(config, finished, classifier):
    for name, message in [
        ('resnet18', r'resnet18 is a network for classification, .*such as gc_resnet50_d8'),
        ('mask_rcnn_resnet50_fpn', 'is a network for detection'),
    ]:
        config.model.name = name
        with pytest.raises(ConfigError, match=message):
            assemble(config)
    config.model.name = None
    config.training.init_from = str(classifier[0])
    with pytest.raises(
        ConfigError, match=r'fills no more than the backbone.*--config\.model\.name'
    ):
        assemble(config)
    config = default_config()
    config.model.name = 'gc_resnet50_d8_voc'
    with pytest.raises(ConfigError, match=r'or --config\.task\.name=segmentation'):
        assemble(config)
    config.model.name = 'gccnn'
    config.training.init_from = str(finished[0])
    with pytest.raises(ConfigError, match=r'gc_resnet18_d16 is a network for segmentation'):
        assemble(config)


def test_a_run_does_not_go_on_with_other_classes(finished, config, pictures):
    workdir, _ = finished
    (pictures / 'classes.txt').write_text('grass\nsky\nsea')
    try:
        with pytest.raises(CheckpointError, match="label 1 was 'sea'"):
            train(config, workdir)
    finally:
        (pictures / 'classes.txt').write_text('\n'.join(LABELS))


def test_images_that_a_mesh_cannot_split_are_refused(config):
    config.mesh.data, config.mesh.spatial = 2, 4
    config.data.image_size = (18, 24)
    with pytest.raises(ConfigError, match=r'image_size is \(18, 24\); the height must divide'):
        assemble(config)
    config.data.image_size, config.data.evaluation_image_size = 16, (30, 32)
    with pytest.raises(ConfigError, match=r'evaluation_image_size is \(30, 32\); the height'):
        assemble(config)


def test_a_checkpoint_on_the_command_line_replaces_what_it_knows(pictures, classifier, finished):
    """A classifier knows the values of images; a segmenter the network and their sizes too."""
    config = tiny_config(pictures)
    config.data.mean = (0.1, 0.2, 0.3)
    changed = override(config, [f'--config.training.init_from={classifier[0]}'])
    assert changed.model.name == 'gc_resnet18_d16'
    assert changed.model.backbone == 'resnet20'
    assert changed.data.image_size == (16, 24)
    assert changed.data.mean is None
    changed = override(tiny_config(pictures), [f'--config.training.init_from={finished[0]}'])
    assert changed.model.name is None
    assert changed.data.image_size is None
    built = assemble(changed)
    assert built.description.name == 'gc_resnet18_d16'
    assert built.description.preprocessing.train_size == (16, 24)
