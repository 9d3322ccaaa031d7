"""Whole runs that start from a checkpoint, are extended, or find another data set than before."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gcnet_jax.commands import config_files
from gcnet_jax.data import sources
from gcnet_jax.data.folder import prepare_folder
from gcnet_jax.data.preprocessing import KeepRatio, Preprocessing
from gcnet_jax.data.sources import load_source
from gcnet_jax.errors import CheckpointError, ConfigError
from gcnet_jax.inference.classifier import Classifier
from gcnet_jax.models.registry import create_model
from gcnet_jax.stored import ModelDescription, load_variables, write_ported
from gcnet_jax.training.config import default_config
from gcnet_jax.training.experiment import assemble
from gcnet_jax.training.loop import train
from gcnet_jax.training.metrics import read_metrics
from gcnet_jax.training.start import read_initial

CONFIG = Path(__file__).parents[2] / 'configs' / 'finetune.py'
LABELS = ('black', 'dark', 'light', 'white')


class Squares:
    """Squares whose brightness tells their class, under the labels of the moment."""

    label_names = LABELS
    examples = 32
    is_multilabel = False
    no_label = 0

    def __init__(self, name, split, data_dir, purpose):
        self.name, self.split = name, split or 'test'
        self.images = []
        for index in range(self.examples):
            file = io.BytesIO()
            pixels = np.full((8, 8, 3), 30 + 60 * (index % 4), np.uint8)
            Image.fromarray(pixels).save(file, 'PNG')
            self.images.append(file.getvalue())

    @property
    def num_classes(self):
        return len(self.label_names)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {'image': self.images[index], 'label': index % min(4, self.num_classes)}


pytestmark = pytest.mark.usefixtures('compile_once')


@pytest.fixture(autouse=True)
def squares(monkeypatch):
    monkeypatch.setattr(sources, 'load_source', Squares)


def tiny_config(**training):
    config = default_config()
    config.model.stage_sizes = (1,)
    config.model.widths = (4,)
    config.model.context = {'stages': (1,), 'position': 'after_conv2', 'ratio': 0.5}
    config.data.image_size = 8
    config.data.augmentation = 'none'
    config.data.num_threads = 0
    config.training.batch_size = 16
    config.training.total_steps = 4
    config.training.log_steps = 1
    config.runtime.progress = 'lines'
    config.runtime.tensorboard = False
    config.training.update(training)
    return config


@pytest.fixture(scope='module')
def finished(tmp_path_factory, compile_once):
    workdir = tmp_path_factory.mktemp('finished')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, 'load_source', Squares)
        config = tiny_config()
        config.data.mean = (0.5, 0.5, 0.5)
        train(config, workdir)
    return workdir


def follow(place, **training):
    """A config that names no network."""
    config = tiny_config(init_from=str(place), **training)
    for key in ('stage_sizes', 'widths', 'context'):
        del config.model[key]
    config.model.name = config.data.image_size = None
    # So low that float32 loses every update.
    config.schedule.peak_learning_rate = 1e-30
    config.training.total_steps = 1
    return config


def head(place):
    return load_variables(place)[1]['params']['classifier']


@pytest.mark.parametrize(
    ('labels', 'message'),
    [
        (('dark', 'black', 'light', 'white'), "in another order: label 0 was 'black', .* 'dark'"),
        (('black', 'dark', 'grey', 'white'), "other labels: .* without 'light', with 'grey'"),
        ((*LABELS, 'x'), r'a run on 4 labels, and the data set now has 5'),
    ],
)
def test_a_run_does_not_go_on_with_other_labels(finished, monkeypatch, labels, message):
    monkeypatch.setattr(Squares, 'label_names', labels)
    config = tiny_config(extend=True, total_steps=8)
    config.data.mean = (0.5, 0.5, 0.5)
    before = (finished / 'config.json').read_text()
    with pytest.raises(CheckpointError, match=message):
        train(config, finished)
    assert (finished / 'config.json').read_text() == before


def test_a_run_does_not_go_on_with_other_preprocessing(finished):
    with pytest.raises(CheckpointError, match=r'have mean \(0.5, 0.5, 0.5\), and now it is'):
        train(tiny_config(), finished)


def test_a_checkpoint_alone_gives_network_and_preprocessing(finished, tmp_path, capsys):
    train(follow(finished), tmp_path / 'next')
    printed = capsys.readouterr().out
    assert printed.index('compiling the training step\n') < printed.index('\nstep 1/1 ')
    assert f'weights from {finished} (gccnn)' in printed
    assert 'the classifier is kept: all 4 labels are the same' in printed
    there, before = load_variables(finished)
    here, after = load_variables(tmp_path / 'next')
    assert here.preprocessing == there.preprocessing
    assert here.build().widths == there.build().widths
    kernel = after['params']['stage1_0']['conv1']['kernel']
    np.testing.assert_array_equal(kernel, before['params']['stage1_0']['conv1']['kernel'])


def test_a_run_goes_on_where_the_checkpoint_it_began_from_is_gone(
    finished, tmp_path, monkeypatch, capsys
):
    """From the command line, with an option of the checkpoint's network that is changed."""
    start = shutil.copytree(finished, tmp_path / 'start')
    words = [
        'train.py', f'--config.training.init_from={start}', '--config.model.dropout_rate=0.1',
        '--config.training.batch_size=16', '--config.data.num_threads=0',
        '--config.runtime.progress=lines', '--config.runtime.tensorboard=false',
        f'--workdir={tmp_path / "next"}',
    ]  # fmt: skip

    def run(steps, *more):
        config, _, workdir = config_files.read_flags(
            [*words, f'--config.training.total_steps={steps}', *more], CONFIG
        )
        return train(config, workdir)

    run(1)
    there = load_variables(start)[0]
    shutil.rmtree(start)
    assert run(2, '--config.training.extend')['step'] == 2
    assert 'continuing from step 1' in capsys.readouterr().out
    here = load_variables(tmp_path / 'next')[0]
    assert here.preprocessing == there.preprocessing
    assert here.options == {**there.options, 'dropout_rate': 0.1}
    words[-1] = f'--workdir={tmp_path / "another"}'
    with pytest.raises(CheckpointError, match=r'start: no such directory'):
        run(1)
    words[-1] = f'--workdir={tmp_path / "next"}'
    words[1] += '2'
    with pytest.raises(CheckpointError, match=r'start2: no such directory'):
        run(1)


def test_a_run_goes_on_in_the_default_workdir_too(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = shutil.copytree(finished, tmp_path / 'start')
    train(follow(start), tmp_path / 'runs' / 'finetune')
    shutil.rmtree(start)
    words = ['train.py', f'--config.training.init_from={start}', '--config.model.dropout_rate=0.1']
    assert config_files.read_flags(words, CONFIG)[0].model.dropout_rate == 0.1


@pytest.mark.parametrize(
    ('name', 'what'),
    [
        ('net.pth', 'a PyTorch file'),
        ('my net.safetensors', 'a PyTorch file'),
        ('hf-hub:timm/gcresnet50t.ra2_in1k', 'a repository of PyTorch weights'),
    ],
)
def test_weights_of_pytorch_are_to_be_ported_first(tmp_path, monkeypatch, name, what):
    monkeypatch.chdir(tmp_path)
    if ':' not in name:
        Path(name).write_bytes(b'x')
    message = (
        rf'config.training.init_from: {name} is {what}; port it first: '
        rf"python -m gcnet_jax port '?{name}'? --out DIR, and give "
        '--config.training.init_from=DIR'
    )
    with pytest.raises(ConfigError, match=message):
        train(follow(name), tmp_path / 'next')
    words = ['train.py', f'--config.training.init_from={name}', '--config.model.dropout_rate=0.1']
    with pytest.raises(ConfigError, match=message):
        config_files.read_flags(words, CONFIG)


def test_the_checkpoint_that_a_run_starts_from_is_named(finished, tmp_path, capsys):
    def text(place):
        return read_initial(assemble(follow(place)), tmp_path / 'run').text

    start = shutil.copytree(finished, tmp_path / 'start')
    shutil.rmtree(start / 'checkpoints' / '2')
    train(follow(start), tmp_path / 'single')
    assert f'weights from {start} (gccnn), step 4\n' in capsys.readouterr().out
    shutil.copytree(finished / 'checkpoints' / '2', start / 'checkpoints' / '2')
    for step, accuracy in ((2, 0.75), (4, 0.5)):
        metrics = start / 'checkpoints' / str(step) / 'metrics' / 'metrics'
        metrics.write_text(json.dumps({'eval/accuracy': accuracy}))
    assert text(start) == (
        f'weights from {start} (gccnn), step 2, the best; the newest is of step 4 '
        f'(--config.training.init_from={start}/checkpoints/4)'
    )
    newest = start / 'checkpoints' / '4'
    assert text(newest) == f'weights from {newest} (gccnn), step 4'
    metrics.write_text(json.dumps({'eval/accuracy': 1.0}))
    assert text(start) == (
        f'weights from {start} (gccnn), step 4, the best and the newest; any other is chosen by '
        f'--config.training.init_from={start}/checkpoints/STEP'
    )


def test_the_classifier_follows_the_names_of_the_labels(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Squares, 'label_names', ('white', 'grey', 'black'))
    train(follow(finished), tmp_path / 'next')
    assert "2 of 3 outputs of the classifier are the checkpoint's" in capsys.readouterr().out
    before, after = head(finished), head(tmp_path / 'next')
    np.testing.assert_array_equal(after['kernel'][:, [0, 2]], before['kernel'][:, [3, 0]])
    np.testing.assert_array_equal(after['bias'][[0, 2]], before['bias'][[3, 0]])
    assert not np.isin(after['kernel'][:, 1], before['kernel']).any()


def test_a_classifier_is_new_where_the_user_says_so(finished, tmp_path):
    train(follow(finished, new_classifier=True), tmp_path / 'next')
    assert not np.isin(head(tmp_path / 'next')['kernel'], head(finished)['kernel']).any()


def test_another_network_than_the_checkpoints_is_refused(finished, tmp_path):
    config = follow(finished)
    config.model.name = 'resnet20'
    with pytest.raises(
        ConfigError, match=r'holds gccnn, and config.model.name is resnet20.*leave config.model'
    ):
        train(config, tmp_path / 'next')
    assert not (tmp_path / 'next').exists()


def test_a_finished_run_is_extended_when_told(tmp_path, capsys):
    train(tiny_config(), tmp_path)
    with pytest.raises(CheckpointError, match=r'another config.training.total_steps; give --conf'):
        train(tiny_config(total_steps=8), tmp_path)
    with pytest.raises(CheckpointError, match=r'another config \(config.training.seed\)'):
        train(tiny_config(total_steps=8, seed=3, extend=True), tmp_path)
    longer = tiny_config(total_steps=8, extend=True)
    assert train(longer, tmp_path)['step'] == 8
    assert 'extended to step 8: the learning rate goes on at' in capsys.readouterr().out
    rates = [line['train/learning_rate'] for line in read_metrics(tmp_path) if 'train/loss' in line]
    expected = [float(assemble(tiny_config()).schedule(step)) for step in range(4)]
    expected += [float(assemble(longer).schedule(step)) for step in range(4, 8)]
    assert rates == pytest.approx(expected)
    # The longer run is now the run; it is continued by its own settings without the flag.
    assert train(tiny_config(total_steps=8), tmp_path)['step'] == 8
    before = (tmp_path / 'config.json').read_text()
    with pytest.raises(CheckpointError, match=r'already at step 8, .* it would end at step 6'):
        train(tiny_config(total_steps=6, extend=True), tmp_path)
    assert (tmp_path / 'config.json').read_text() == before


def test_a_warmup_is_shortened_to_half_of_a_short_run(capsys, tmp_path):
    config = tiny_config()
    config.schedule.warmup_steps = 100
    built = assemble(config)
    assert built.notes == (
        'the warm-up of 100 steps is shortened to 2, half of the 4 steps of this run',
    )
    rates = [float(built.schedule(step)) for step in range(4)]
    assert np.argmax(rates) == 2
    config.schedule.warmup_steps = 2
    assert assemble(config).notes == ()


def test_a_batch_larger_than_the_data_set_is_pointed_out(tmp_path, capsys):
    config = tiny_config(batch_size=48, total_steps=1)
    train(config, tmp_path)
    printed = capsys.readouterr().out
    assert 'batch_size is 48, and there are only 32 training images: a step takes 1.5' in printed
    assert assemble(tiny_config(batch_size=32)).notes == ()


def test_detectors_are_trained_by_a_task_of_their_own(tmp_path):
    name = 'mask_rcnn_resnet50_fpn'
    config = tiny_config()
    config.model.name = name
    with pytest.raises(ConfigError, match=f'{name} is a network for detection.*name=detection'):
        assemble(config)
    description = ModelDescription(name, {}, preprocessing=KeepRatio(), task='detection')
    write_ported(tmp_path, description, {'params': {'scale': np.ones(1)}})
    config = tiny_config()
    config.training.init_from = str(tmp_path)
    with pytest.raises(ConfigError, match=f'{name} is a network for detection'):
        assemble(config)


@pytest.mark.slow
def test_ninety_images_fine_tune_from_a_ported_network_by_one_command(
    tmp_path, monkeypatch, random_variables
):
    """A folder with `train` and `val`, a checkpoint of 1000 nameless classes, nothing else set."""
    monkeypatch.setattr(sources, 'load_source', load_source)
    rng = np.random.default_rng(0)
    colors = {'blue': (40, 60, 200), 'green': (40, 200, 60), 'red': (200, 50, 50)}
    for split, count in (('train', 30), ('val', 6)):
        for label, color in colors.items():
            place = tmp_path / 'images' / split / label
            place.mkdir(parents=True)
            for index in range(count):
                pixels = np.clip(np.array(color) + rng.integers(-40, 41, (40, 48, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(place / f'{index}.png')
    prepare_folder(tmp_path / 'images', 'colors', str(tmp_path / 'sets'))
    options = {'stage_sizes': (1, 1, 1, 1), 'widths': (16, 16, 16, 16), 'num_classes': 1000}
    model = create_model('gcresnet50t', **options)
    variables = random_variables(model, np.zeros((1, 32, 32, 3), np.float32), train=False)
    own = Preprocessing((0.5,) * 3, (0.5,) * 3, 'bicubic', 0.95, 32, 40)
    write_ported(
        tmp_path / 'ported', ModelDescription('gcresnet50t', options, preprocessing=own), variables
    )
    config, _, _ = config_files.read_flags(
        [
            'train.py', f'--config.training.init_from={tmp_path / "ported"}',
            '--config.data.name=colors', f'--config.data.data_dir={tmp_path / "sets"}',
            '--config.runtime.progress=none', '--config.runtime.tensorboard=false',
        ],
        CONFIG,
    )  # fmt: skip
    final = train(config, tmp_path / 'run')
    assert final['eval/examples'] == 18
    assert final['eval/accuracy'] > 0.8
    classifier = Classifier.load(tmp_path / 'run')
    assert classifier.description.preprocessing == own
    assert classifier.description.name == 'gcresnet50t'
    right = [
        classifier(path).label == label
        for label in colors
        for path in sorted((tmp_path / 'images' / 'val' / label).iterdir())
    ]
    best = max(
        line['eval/accuracy'] for line in read_metrics(tmp_path / 'run') if 'eval/loss' in line
    )
    assert np.mean(right) == pytest.approx(best)
