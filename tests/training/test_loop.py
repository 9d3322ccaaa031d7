"""Whole runs of a tiny network on pictures made here, on eight devices."""

import io
import json
import os
import re
import signal

import jax
import numpy as np
import pytest
from PIL import Image

from gcnet_jax.data import sources
from gcnet_jax.errors import CheckpointError, ConfigError, UserError
from gcnet_jax.files import as_place
from gcnet_jax.stored import find_checkpoint, load_variables, write_ported
from gcnet_jax.training import experiment, lock, loop, metrics
from gcnet_jax.training.checkpoints import CheckpointStore
from gcnet_jax.training.config import default_config
from gcnet_jax.training.loop import TrainingError, train
from gcnet_jax.training.metrics import MetricsWriter, read_metrics
from gcnet_jax.training.processes import Interrupted, Preempted
from gcnet_jax.training.start import read_initial
from tests.bucket import local_bucket
from tests.training.compare_runs import without_timing


class FakeSource:
    """Squares whose brightness tells their class."""

    label_names = ('black', 'dark', 'light', 'white')
    num_classes = 4
    is_multilabel = False
    no_label = 0

    def __init__(self, name, split, data_dir, purpose='evaluation'):
        split = split or 'test'  # As the real one chooses for a set that has no validation split.
        self.name, self.split = name, split
        self.images = []
        rng = np.random.default_rng(len(split))
        for index in range({'train': 44, 'test': 13}[split]):
            pixels = 30 + 60 * (index % 4) + rng.integers(-20, 21, (8, 8, 3))
            file = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(file, 'PNG')
            self.images.append(file.getvalue())

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {'image': self.images[index], 'label': index % 4}

    def describe(self, index):
        return f'square {index}'


pytestmark = pytest.mark.usefixtures('compile_once')


@pytest.fixture(autouse=True)
def fake_data(monkeypatch):
    monkeypatch.setattr(sources, 'load_source', FakeSource)


def tiny_config(**training):
    config = default_config()
    config.model.stage_sizes = (1,)
    config.model.widths = (4,)
    config.model.context = {'stages': (1,), 'position': 'after_conv2', 'ratio': 0.5}
    config.model.dropout_rate = 0.1
    config.data.image_size = 8
    config.data.augmentation = 'pad_crop'
    config.task.mixup_alpha = 0.2
    config.data.num_threads = 0
    config.training.batch_size = 16
    config.training.total_steps = 12
    config.training.ema_decay = 0.5
    config.training.log_steps = 5
    config.training.evaluation_steps = 8
    config.training.checkpoint_steps = 3
    config.training.keep_checkpoints = 9
    config.runtime.progress = 'lines'
    config.runtime.tensorboard = False
    for name, value in training.items():
        config.training[name] = value
    return config


@pytest.fixture(scope='module')
def whole_run(tmp_path_factory, compile_once):
    """An uninterrupted run, which others are compared with."""
    workdir = tmp_path_factory.mktemp('whole')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, 'load_source', FakeSource)
        return workdir, train(tiny_config(), workdir)


def test_a_run_leaves_everything_behind(whole_run):
    workdir, final = whole_run
    lines = read_metrics(workdir)
    assert [(line['step'], 'eval/loss' in line) for line in lines] == [
        (5, False),
        (8, True),
        (10, False),
        (12, False),
        (12, True),
    ]
    train_keys = {'loss', 'accuracy', 'gradient_norm', 'learning_rate', 'images_per_second'}
    train_keys.add('data_wait_fraction')
    assert {f'train/{key}' for key in train_keys} <= set(lines[0])
    assert {'eval/loss', 'eval/accuracy', 'eval/top5'} <= set(lines[1])
    assert lines[1]['eval/examples'] == 13
    assert lines[0]['epoch'] == pytest.approx(5 * 16 / 44)
    assert final['eval/accuracy'] == lines[-1]['eval/accuracy']
    config = json.loads((workdir / 'config.json').read_text())
    assert config['model']['context']['ratio'] == 0.5
    steps = sorted(int(path.name) for path in (workdir / 'checkpoints').iterdir())
    assert steps == [3, 6, 8, 9, 12]


def test_the_time_that_is_waited_for_data_is_told(tmp_path, monkeypatch):
    """By a clock that only moves while an image is read: all of the time is waited for."""
    now, read = [0.0], FakeSource.__getitem__

    def read_slowly(self, index):
        now[0] += 1
        return read(self, index)

    monkeypatch.setattr(FakeSource, '__getitem__', read_slowly)
    monkeypatch.setattr(metrics.time, 'perf_counter', lambda: now[0])
    train(tiny_config(), tmp_path)
    lines = [line for line in read_metrics(tmp_path) if 'train/loss' in line]
    assert [line['train/data_wait_fraction'] for line in lines] == [1.0, 1.0, 1.0]


def test_a_checkpoint_rebuilds_the_network_with_nothing_else(whole_run):
    """The stored network, applied by hand to the test images, has the accuracy of the log."""
    workdir, final = whole_run
    description, variables = load_variables(workdir)
    assert description.label_names == FakeSource.label_names
    preprocessing = description.preprocessing
    source = FakeSource('', 'test', None)
    pixels = np.stack(
        [np.asarray(Image.open(io.BytesIO(source[index]['image']))) for index in range(13)]
    )
    images = (pixels / 255 - preprocessing.mean) / preprocessing.std
    logits = np.asarray(
        description.build().apply(variables, images.astype(np.float32), train=False), np.float64
    )
    labels = np.arange(13) % 4
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(13), labels]
    assert final['eval/loss'] == pytest.approx(losses.mean(), rel=1e-4)
    assert final['eval/accuracy'] == pytest.approx((logits.argmax(axis=1) == labels).mean())


def test_sigterm_saves_at_once_and_the_same_call_continues_bit_for_bit(
    tmp_path, monkeypatch, whole_run
):
    """The signal comes while the line of step 5 is written; the second one during the save."""
    write, save = MetricsWriter.write, CheckpointStore.save

    def write_and_signal(self, step, *values):
        write(self, step, *values)
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    def save_and_signal(self, *arguments):
        save(self, *arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, 'write', write_and_signal)
        with pytest.raises(Preempted, match=r'stopped after step 6 of 12, which is saved'):
            train(tiny_config(), tmp_path)
        patch.setattr(MetricsWriter, 'write', write)
        patch.setattr(CheckpointStore, 'save', save_and_signal)
        with pytest.raises(Preempted, match=r'stopped after step 8 of 12, which is saved'):
            train(tiny_config(), tmp_path)
    assert signal.getsignal(signal.SIGTERM) is before
    train(tiny_config(), tmp_path)
    assert without_timing(tmp_path) == without_timing(whole_run[0])
    one, two = load_variables(tmp_path)[1], load_variables(whole_run[0])[1]
    jax.tree.map(np.testing.assert_array_equal, one, two)


class Killed(BaseException):
    """Stands for the end of the process: nothing may catch it."""


@pytest.mark.parametrize('stop', [5, 12])
def test_a_killed_run_continues_bit_for_bit(tmp_path, monkeypatch, whole_run, stop, capsys):
    """Killed when the line of step `stop` was written, before the checkpoint that follows it."""
    write = MetricsWriter.write

    def write_and_die(self, step, *values):
        write(self, step, *values)
        if step == stop:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, 'write', write_and_die)
        with pytest.raises(Killed):
            train(tiny_config(), tmp_path)
    killed = read_metrics(tmp_path)
    assert killed[-1]['step'] == stop
    train(tiny_config(), tmp_path)
    assert f'continuing from step {({5: 3, 12: 9})[stop]}' in capsys.readouterr().out
    assert without_timing(tmp_path) == without_timing(whole_run[0])
    one, two = load_variables(tmp_path)[1], load_variables(whole_run[0])[1]
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_a_run_that_is_complete_is_left_as_it_is(whole_run, capsys):
    workdir, final = whole_run
    before = (workdir / 'metrics.jsonl').read_bytes()
    config = tiny_config()
    config.runtime.tensorboard = True
    again = train(config, workdir)
    assert not list(workdir.glob('events.*'))
    assert (workdir / 'metrics.jsonl').read_bytes() == before
    assert 'was complete already' in capsys.readouterr().out
    assert again['eval/accuracy'] == final['eval/accuracy']


@pytest.mark.slow
def test_a_workdir_continues_on_another_mesh(tmp_path, whole_run, monkeypatch):
    config = tiny_config()
    with monkeypatch.context() as patch:
        write = MetricsWriter.write

        def write_and_die(self, step, *values):
            write(self, step, *values)
            if step == 8:
                raise Killed

        patch.setattr(MetricsWriter, 'write', write_and_die)
        with pytest.raises(Killed):
            train(config, tmp_path)
    config.mesh.fsdp = 2
    final = train(config, tmp_path)
    assert final['eval/loss'] == pytest.approx(whole_run[1]['eval/loss'], rel=1e-3)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    config = tiny_config(checkpoint_steps=1)
    config.schedule.peak_learning_rate = 1e30
    with pytest.raises(
        TrainingError, match=r'step (\d+) is not finite .*last good checkpoint'
    ) as caught:
        train(config, tmp_path)
    step = int(str(caught.value).split()[1])
    newest = find_checkpoint(tmp_path)
    assert str(newest) in str(caught.value)
    assert int(newest.name) < step
    for leaf in jax.tree.leaves(load_variables(tmp_path)[1]):
        assert np.isfinite(leaf).all()


def test_steps_that_are_not_finite_are_skipped_and_counted_if_so_set(tmp_path):
    config = tiny_config(checkpoint_steps=1, max_bad_steps=3)
    config.schedule.peak_learning_rate = 1e30
    with pytest.raises(TrainingError) as caught:
        train(config, tmp_path)
    assert int(str(caught.value).split()[1]) > 3


def test_bad_steps_are_counted_and_only_those_in_a_row_stop_the_run(tmp_path, monkeypatch):
    bad, calls = (2, 4, 8, 9), []
    compile_step = loop.jit_train_step

    def with_bad_steps(*arguments):
        step = compile_step(*arguments)

        def run(state, batch):
            calls.append(None)
            state, metrics = step(state, batch)
            return state, metrics | {'finite': np.asarray(len(calls) not in bad)}

        return run

    monkeypatch.setattr(loop, 'jit_train_step', with_bad_steps)
    with pytest.raises(TrainingError, match='step 9 is not finite'):
        train(tiny_config(max_bad_steps=2), tmp_path)
    lines = [line for line in read_metrics(tmp_path) if 'train/loss' in line]
    assert [(line['step'], line['train/bad_steps']) for line in lines] == [(5, 2)]


@pytest.mark.parametrize(
    ('group', 'key', 'value', 'message'),
    [
        (
            'training',
            'batch_size',
            12,
            r'must divide by 8: the mesh splits it into 8 \(data 8, fsdp 1\)',
        ),
        ('training', 'accumulation_steps', 4, 'must divide by 32'),
        ('mesh', 'data', 3, 'does not fit 8 devices'),
        ('model', 'num_classes', 5, 'data set digits has 4 labels'),
        ('model', 'name', 'gcnn', "did you mean 'gccnn'"),
        ('model', 'widht', (3,), "did you mean 'widths'"),
        ('model', 'norm', {'kind': 'bacth'}, "unknown norm.kind 'bacth'; did you mean 'batch'"),
        ('model', 'norm', {'group_size': 3}, 'group_size is 3; it must divide the 16 images'),
        ('model', 'norm', {'kind': 'group'}, r'must divide the 4 channels of stage1_0/'),
        ('training', 'init_from', '/nowhere', 'no such directory'),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    tmp_path, group, key, value, message
):
    config = tiny_config()
    config[group][key] = value
    with pytest.raises((ConfigError, CheckpointError), match=message) as caught:
        train(config, tmp_path / 'run')
    assert '\n' not in str(caught.value)
    assert not (tmp_path / 'run').exists()


def test_a_height_that_spatial_does_not_divide_is_refused(tmp_path):
    config = tiny_config()
    config.mesh.data, config.mesh.spatial = 2, 4
    config.data.evaluation_image_size = 10
    with pytest.raises(ConfigError, match=r'evaluation_image_size is 10; it must divide by'):
        train(config, tmp_path)
    config.data.evaluation_image_size, config.data.image_size = 8, 6
    with pytest.raises(ConfigError, match=r'config.data.image_size is 6; it must divide by'):
        train(config, tmp_path)


def test_fine_tuning_adds_the_context_to_a_plain_network(tmp_path, whole_run, capsys):
    """A ported plain network is a checkpoint like any other."""
    description, variables = load_variables(whole_run[0])
    block = variables['params']['stage1_0']
    context = [name for name in block if name.startswith('context')]
    assert context
    for name in context:
        del block[name]
    plain = {**description.options, 'context': None}
    write_ported(
        tmp_path / 'plain', type(description)('gccnn', plain, description.label_names), variables
    )
    config = tiny_config(init_from=str(tmp_path / 'plain'), total_steps=1)
    config.schedule.peak_learning_rate = 1e-30
    final = train(config, tmp_path / 'run')
    printed = capsys.readouterr().out
    assert f'weights from {tmp_path / "plain"}' in printed
    assert 'context parameters are new' in printed
    tuned = load_variables(tmp_path / 'run')[1]
    kernel = tuned['params']['stage1_0']['conv1']['kernel']
    np.testing.assert_allclose(kernel, block['conv1']['kernel'], rtol=1e-6)  # It was averaged.
    assert 'context_after_conv2_0' in tuned['params']['stage1_0']
    assert np.isfinite(final['eval/loss'])


def test_a_data_set_of_another_size_does_not_continue_a_run(tmp_path, monkeypatch):
    """The order of the images follows from their number, so the position would mean others."""
    train(tiny_config(total_steps=3, checkpoint_steps=3), tmp_path)
    monkeypatch.setattr(FakeSource, '__len__', lambda self: len(self.images) - 1)
    config = tiny_config(total_steps=3, checkpoint_steps=3)
    with pytest.raises(CheckpointError, match='has 43 training images, and had 44 when this run'):
        train(config, tmp_path)


def test_compiled_programs_are_kept_in_the_workdir_or_where_the_config_says(tmp_path, monkeypatch):
    asked = []

    def remember(default, setting):
        asked.append((default, setting))
        raise UserError('enough')

    monkeypatch.setattr('gcnet_jax.training.workdir.compilation_cache', remember)
    config = tiny_config()
    with pytest.raises(UserError, match='enough'):
        train(config, tmp_path)
    config.runtime.compilation_cache = str(tmp_path / 'shared')
    with pytest.raises(UserError, match='enough'):
        train(config, tmp_path)
    default = tmp_path / 'compilation_cache'
    assert asked == [(default, None), (default, str(tmp_path / 'shared'))]


@pytest.mark.slow
def test_a_run_in_a_bucket_is_continued_and_read_from_there(tmp_path, monkeypatch, whole_run):
    monkeypatch.setattr(lock, 'SETTLE_SECONDS', 0)
    monkeypatch.chdir(tmp_path)
    write = MetricsWriter.write

    def write_and_stop(self, step, *values):
        write(self, step, *values)
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with local_bucket(tmp_path / 'served') as bucket:
        place = f'{bucket}/runs/one'
        with monkeypatch.context() as patch:
            patch.setattr(MetricsWriter, 'write', write_and_stop)
            with pytest.raises(Preempted, match=r'stopped after step 6 of 12, which is saved'):
                train(tiny_config(), place)
        train(tiny_config(), place)
        assert without_timing(as_place(place)) == without_timing(whole_run[0])
        variables = load_variables(place)[1]
        jax.tree.map(np.testing.assert_array_equal, variables, load_variables(whole_run[0])[1])
        inside = {path.name for path in (tmp_path / 'served/bucket/runs/one').iterdir()}
        assert inside == {'checkpoints', 'config.json', 'metrics.jsonl'}
        # A checkpoint that was not written completely has no mark, and is not there.
        newest = find_checkpoint(place)
        (newest / 'commit_success.txt').unlink()
        assert find_checkpoint(place).name != newest.name
        # Another run starts from it.
        other = experiment.assemble(tiny_config(init_from=place))
        assert f'weights from {place} (gccnn)' in read_initial(other, tmp_path / 'next').text
    assert {path.name for path in tmp_path.iterdir()} == {'served'}


def test_ctrl_c_saves_and_a_second_one_ends_at_once(tmp_path, monkeypatch, whole_run, capfd):
    write = MetricsWriter.write

    def write_and_interrupt(self, step, *values):
        write(self, step, *values)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)

    times = 1
    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, 'write', write_and_interrupt)
        with pytest.raises(Interrupted, match=r'^Ctrl-C: stopped after step 6 of 12, which is sav'):
            train(tiny_config(), tmp_path)
        assert 'Ctrl-C: saving after this step' in capfd.readouterr().err
        times = 2
        with pytest.raises(KeyboardInterrupt):
            train(tiny_config(), tmp_path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train(tiny_config(), tmp_path)
    assert without_timing(tmp_path) == without_timing(whole_run[0])


def test_ctrl_c_before_the_first_step_ends_at_once(tmp_path, monkeypatch):
    def interrupt(*arguments):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(loop, 'make_train_step', interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_config(), tmp_path)
    assert not (tmp_path / 'run.lock').exists()


def test_two_runs_in_one_directory(tmp_path):
    with lock.hold_workdir(tmp_path), pytest.raises(CheckpointError, match='in use by process'):
        train(tiny_config(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_home_directory_is_expanded(tmp_path, monkeypatch, whole_run):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    train(
        tiny_config(total_steps=3, init_from=f'~/{os.path.relpath(whole_run[0], tmp_path)}'),
        '~/run',
    )
    assert [path.name for path in tmp_path.iterdir()] == ['run']


def fine_tuning_config(**training):
    """Everything that fine-tuning on few images has, at once."""
    config = tiny_config(early_stopping_steps=6, evaluation_steps=2, **training)
    config.optimizer.frozen = ('stage1_0/*norm*',)
    config.optimizer.layer_decay = 0.5
    config.optimizer.weight_decay = 0.1
    config.data.randaugment_ops = 1
    config.data.color_jitter = 0.4
    config.task.class_weights = 'balanced'
    config.schedule.peak_learning_rate = 1e-9  # The accuracy stays what it is.
    config.schedule.warmup_epochs = 0.0
    return config


@pytest.mark.slow
def test_early_stopping_ends_the_run_and_a_killed_run_stops_at_the_same_step(
    tmp_path, monkeypatch, capsys
):
    final = train(fine_tuning_config(), tmp_path / 'whole')
    out = capsys.readouterr().out
    best = max(read_metrics(tmp_path / 'whole'), key=lambda line: line.get('eval/accuracy', -1))
    assert final['step'] == best['step'] + 6 < 12
    assert f'stopped early after step {final["step"]} of 12' in out
    assert f'since step {best["step"]}' in out
    accuracy = f'best {best["eval/accuracy"]:.2%} at step {best["step"]}'
    assert f'after step {final["step"]} ({accuracy}); trained in' in out.splitlines()[-1]
    assert re.search(r'\d+ of \d+ parameters are frozen: stage1_0/\*norm\*', out)
    write = MetricsWriter.write

    def write_and_die(self, step, *values):
        write(self, step, *values)
        if step == 5:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, 'write', write_and_die)
        with pytest.raises(Killed):
            train(fine_tuning_config(), tmp_path / 'killed')
    again = train(fine_tuning_config(), tmp_path / 'killed')
    assert again['step'] == final['step']
    assert without_timing(tmp_path / 'killed') == without_timing(tmp_path / 'whole')
    one, two = (load_variables(tmp_path / name)[1] for name in ('killed', 'whole'))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    capsys.readouterr()
    lines = read_metrics(tmp_path / 'whole')
    assert train(fine_tuning_config(), tmp_path / 'whole')['step'] == final['step']
    assert 'was complete already' in capsys.readouterr().out
    assert read_metrics(tmp_path / 'whole') == lines


@pytest.mark.parametrize('ema', [0.0, 0.5])
def test_few_steps_are_evaluated_with_statistics_of_the_weights_as_they_are(tmp_path, ema):
    """The checkpoint of the first step has the mean statistics over all training images."""
    config = tiny_config(total_steps=1, checkpoint_steps=1, ema_decay=ema)
    final = train(config, tmp_path)
    built = experiment.assemble(config)
    variables = load_variables(tmp_path)[1]
    zeros = jax.tree.map(np.zeros_like, variables['batch_stats'])

    @jax.jit
    def follow(params, images):
        return built.model.apply(
            {'params': params, 'batch_stats': zeros},
            images,
            train=True,
            mutable=['batch_stats'],
            rngs={'dropout': jax.random.key(0)},
        )[1]['batch_stats']

    found = []
    with built.train_batches() as batches:
        for _ in range(3):  # 44 images in batches of 16.
            images = (next(batches)['image'] / 255 - built.task.mean) / (built.task.std)
            kept = follow(variables['params'], images.astype(np.float32))
            found.append(jax.tree.map(lambda leaf: np.asarray(leaf) / 0.1, kept))
    mean = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *found)
    jax.tree.map(
        lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-4),
        variables['batch_stats'],
        mean,
    )
    assert final['eval/loss'] < 3


def test_fine_tunings_settings_that_do_not_fit_are_refused_before_anything_runs(tmp_path):
    config = tiny_config()
    config.optimizer.frozen = ('layer1*',)
    with pytest.raises(ConfigError, match=r"'layer1\*', which matches no parameter"):
        train(config, tmp_path)
    config = tiny_config()
    config.task.class_weights = (1.0, 2.0)
    with pytest.raises(ConfigError, match='has 2 numbers, but data set digits has 4 labels'):
        train(config, tmp_path)
    assert not list(tmp_path.iterdir())
