"""Whole runs of a tiny detector on pictures made here, and what they can start from."""

import shutil
from functools import partial

import jax
import numpy as np
import pytest

from gcnet_jax.data.detection_sources import load_detection
from gcnet_jax.errors import ConfigError, DataError
from gcnet_jax.models.registry import create_model
from gcnet_jax.planning import plan
from gcnet_jax.stored import ModelDescription, load_variables, read_model_description, write_ported
from gcnet_jax.training.experiment import assemble
from gcnet_jax.training.initial import merge_initial
from gcnet_jax.training.loop import train
from gcnet_jax.training.metrics import read_metrics
from gcnet_jax.training.start import read_initial
from gcnet_jax.training.steps import make_train_step
from tests.training.compare_runs import assert_the_same, one_step
from tests.training.tiny_detection import BACKBONE, COLORS, prepare, tiny_config

pytestmark = pytest.mark.usefixtures('compile_once')
LABELS = tuple(COLORS)


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    """Where the set 'shapes' is."""
    return prepare(tmp_path_factory.mktemp('folder'))


@pytest.fixture
def config(shapes):
    return tiny_config(shapes)


def frozen_config(shapes, **training):
    config = tiny_config(shapes, **training)
    config.optimizer.frozen = ('backbone/stem*', 'backbone/stage1*')
    return config


@pytest.fixture(scope='module')
def finished(shapes, tmp_path_factory, compile_once):
    workdir = tmp_path_factory.mktemp('finished')
    return workdir, train(frozen_config(shapes), workdir)


@pytest.mark.slow
def test_it_learns(finished):
    workdir, final = finished
    lines = read_metrics(workdir)
    losses = [line['train/loss'] for line in lines if 'train/loss' in line]
    assert losses[-1] < 0.8 * losses[0]
    assert [line['step'] for line in lines if 'eval/ap' in line] == [4, 8]
    assert final['eval/examples'] == 4
    assert {'eval/ap', 'eval/box_ap50', 'eval/mask_ap', 'train/mask_loss'} <= final.keys()
    description = read_model_description(workdir)
    assert (description.task, description.label_names) == ('detection', LABELS)
    assert description.preprocessing.train_shape == (64, 64)


@pytest.mark.slow
def test_what_is_frozen_stays(finished):
    workdir, _ = finished
    first, last = (
        load_variables(workdir / 'checkpoints' / step)[1]['params'] for step in ('4', '8')
    )
    for name, leaf in first['backbone'].items():
        pairs = zip(jax.tree.leaves(leaf), jax.tree.leaves(last['backbone'][name]), strict=True)
        same = [np.array_equal(one, two) for one, two in pairs]
        assert all(same) == name.startswith(('stem', 'stage1')), name


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_in_the_same_weights(finished, shapes, tmp_path):
    whole, _ = finished
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / 'checkpoints' / '8')
    train(frozen_config(shapes), tmp_path)
    assert_the_same(tmp_path, whole)


@pytest.mark.slow
def test_norms_of_the_batch_and_two_canvases(shapes, tmp_path, capsys):
    """Several scales, moving statistics that are computed afresh, objects beyond the places."""
    config = tiny_config(shapes, total_steps=3, evaluation_steps=3, checkpoint_steps=3)
    config.model.norm.kind = 'batch'
    config.model.norm.channel_groups = None
    config.task.max_boxes = 1
    config.data.image_size = None
    config.data.evaluation_image_size = (48, 64)
    config.data.scales = ((32, 64), (48, 64))
    final = train(config, tmp_path)
    assert np.isfinite(final['train/loss'])
    assert ' objects of ' in capsys.readouterr().out
    statistics = load_variables(tmp_path)[1]['batch_stats']['backbone']['stem_norm']
    assert np.abs(statistics['mean']).max() > 1e-3


@pytest.fixture(scope='module')
def classifier(tmp_path_factory, random_variables):
    """A checkpoint of a classifier with the backbone's shapes; returns it and its variables."""
    options = {**BACKBONE, 'num_classes': 5, 'norm': {'kind': 'group', 'channel_groups': 2}}
    model = create_model('gc_resnet18', **options)
    variables = random_variables(model, np.zeros((1, 64, 64, 3), np.float32), train=False)
    description = ModelDescription('gc_resnet18', options, tuple('abcde'))
    place = tmp_path_factory.mktemp('classifier') / 'ported'
    write_ported(place, description, variables)
    return place, variables


@pytest.mark.slow
def test_a_classifier_fills_the_backbone(classifier, config, tmp_path, capsys):
    place, variables = classifier
    train(one_step(config, place), tmp_path)
    assert 'the backbone is that of gc_resnet18; all that follows' in capsys.readouterr().out
    params = load_variables(tmp_path)[1]['params']
    expected = {name: leaf for name, leaf in variables['params'].items() if name != 'classifier'}
    jax.tree.map(np.testing.assert_array_equal, params['backbone'], expected)


def test_a_backbone_of_another_kind_says_what_to_set(classifier, config, tmp_path):
    config.model.widths = (4, 4, 8, 16)
    built = assemble(one_step(config, classifier[0]))
    with pytest.raises(ConfigError, match=r'widths is .*give --config\.model\.widths='):
        read_initial(built, tmp_path)


@pytest.fixture
def stored(config, tmp_path, random_variables):
    """A detector of the labels 'tent' and 'tree'; returns where it is and its variables."""
    built = assemble(config)
    description = built.description
    variables = random_variables(built.model, np.zeros((1, 64, 64, 3), np.float32), train=False)
    other = ModelDescription(
        *(description.name, description.options, ('tent', 'tree'), description.preprocessing),
        task='detection',
    )
    write_ported(tmp_path / 'stored', other, variables)
    return tmp_path / 'stored', variables


def test_a_detector_keeps_all_but_the_classes_it_does_not_know(
    stored, config, tmp_path, random_variables
):
    place, there = stored
    config.model.name = None
    built = assemble(one_step(config, place))
    initial = read_initial(built, tmp_path / 'run')
    assert "1 of 2 outputs of the classifier are the checkpoint's" in initial.outputs.text
    images = np.zeros((1, 64, 64, 3), np.float32)
    fresh = random_variables(built.model, images, seed=1, train=False)
    merged, context = merge_initial(
        {'batch_stats': {}, **fresh},
        initial.variables,
        kept=initial.outputs.kept,
        kept_of=initial.outputs.kept_of,
        place=str(place),
        **initial.modules,
    )
    assert not context
    merged, there, fresh = (tree['params'] for tree in (merged, there, fresh))
    for name in ('backbone', 'neck', 'rpn_head'):
        jax.tree.map(np.testing.assert_array_equal, merged[name], there[name])
    box, old, new = (tree['box_head_0'] for tree in (merged, there, fresh))
    np.testing.assert_array_equal(box['shared1']['kernel'], old['shared1']['kernel'])
    # Here 'box', 'tent' and the background; there 'tent', 'tree' and the background.
    np.testing.assert_array_equal(box['logits']['bias'][1:], old['logits']['bias'][[0, 2]])
    np.testing.assert_array_equal(box['logits']['kernel'][:, 0], new['logits']['kernel'][:, 0])
    np.testing.assert_array_equal(box['deltas']['kernel'][:, 4:], old['deltas']['kernel'][:, :4])
    np.testing.assert_array_equal(box['deltas']['kernel'][:, :4], new['deltas']['kernel'][:, :4])
    mask, old, new = (tree['mask_head_0'] for tree in (merged, there, fresh))
    np.testing.assert_array_equal(mask['kernel'][:, 1], old['kernel'][:, 0])
    np.testing.assert_array_equal(mask['kernel'][:, 0], new['kernel'][:, 0])
    np.testing.assert_array_equal(mask['conv1']['kernel'], old['conv1']['kernel'])


@pytest.mark.slow
def test_one_class_is_fine_tuned_from_a_run(finished, tmp_path, capsys):
    """Images with objects of other classes alone are background."""
    workdir, _ = finished
    place = prepare(tmp_path, 'tents', ('tent',))
    config = one_step(tiny_config(place, 'tents'), workdir)
    config.model.name = None
    train(config, tmp_path / 'run')
    assert "1 of 1 outputs of the classifier are the checkpoint's" in capsys.readouterr().out
    before, after = (load_variables(place)[1]['params'] for place in (workdir, tmp_path / 'run'))
    # What was zero has moved by the rate.
    same = partial(np.testing.assert_allclose, rtol=0, atol=1e-20)
    jax.tree.map(same, after['backbone'], before['backbone'])
    old, new = (params['box_head_0']['logits']['kernel'] for params in (before, after))
    np.testing.assert_array_equal(new, old[:, 1:])


def test_networks_of_other_kinds_and_canvases_that_cannot_be_are_refused(config, shapes):
    config.model.name = 'gc_resnet18'
    with pytest.raises(ConfigError, match=r'gc_resnet18 is a network for classification.*gc_mask'):
        assemble(config)
    config = tiny_config(shapes)
    config.data.canvases = ((30, 32),)
    with pytest.raises(ConfigError, match='in multiples of 32'):
        assemble(config)


def test_a_plan_traces_the_step_of_one_canvas(config):
    """The step that `plan` compiles for a TPU, traced here with shapes alone."""
    built = plan.describe(config, jax.devices()[:1], 8)
    shape = built.description.preprocessing.train_shape
    batch = built.task.batch_shapes(built.batch_size, *shape)
    step = make_train_step(built.model, built.optimizer, built.task, built.step_options, built.mesh)
    state = jax.eval_shape(built.initialize, jax.random.key(0))
    _, sums = jax.eval_shape(step, state, batch)
    assert {'loss', 'mask', 'finite'} <= sums.keys()
    real = load_detection('shapes', 'train', config.data.data_dir)
    load = built.task.train_loader(built.config.data, built.description.preprocessing)
    with load(real, global_batch_size=8, seed=0, num_threads=0) as batches:
        first = next(batches)
    assert {name: (value.shape, value.dtype) for name, value in first.items()} == {
        name: (value.shape, value.dtype) for name, value in batch.items()
    }


def test_images_to_evaluate_on_that_fit_on_no_canvas_are_refused_at_once(config, tmp_path):
    config.data.canvases = ((64, 64),)
    config.data.evaluation_image_size = (64, 96)
    with pytest.raises(DataError, match=r"split 'validation' .*fits on no canvas"):
        train(config, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()
