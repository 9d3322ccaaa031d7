import json

import pytest

from gcnet_jax.errors import CheckpointError
from gcnet_jax.files import as_place
from gcnet_jax.tasks import Classification
from gcnet_jax.training import metrics
from gcnet_jax.training.metrics import Clock, MetricsWriter, Progress, Window, read_metrics
from tests.bucket import local_bucket

TASK = Classification(3, mean=(0.5,) * 3, std=(0.2,) * 3)


def write(workdir, step, steps):
    writer = MetricsWriter(workdir, step, tensorboard=False)
    for number in steps:
        writer.write(number, number / 2, {'train/loss': 1 / number})
    writer.close()


def test_one_json_object_a_line(tmp_path):
    write(tmp_path, 0, [1, 3])
    lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {'step': 1, 'epoch': 0.5, 'train/loss': 1.0},
        {'step': 3, 'epoch': 1.5, 'train/loss': 1 / 3},
    ]
    assert read_metrics(tmp_path) == [json.loads(line) for line in lines]


def test_lines_after_the_restored_step_are_dropped(tmp_path):
    write(tmp_path, 0, [1, 2, 3, 4])
    whole = (tmp_path / 'metrics.jsonl').read_bytes()
    write(tmp_path, 2, [3, 4])
    assert (tmp_path / 'metrics.jsonl').read_bytes() == whole


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    write(tmp_path, 0, [1, 2])
    whole = (tmp_path / 'metrics.jsonl').read_bytes()
    (tmp_path / 'metrics.jsonl').write_bytes(whole + b'{"step": 3, "epo')
    write(tmp_path, 2, [])
    assert (tmp_path / 'metrics.jsonl').read_bytes() == whole


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    (tmp_path / 'metrics.jsonl').write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(CheckpointError, match='line 2 is not JSON'):
        read_metrics(tmp_path)


def test_values_that_are_not_numbers_are_never_written(tmp_path):
    writer = MetricsWriter(tmp_path, 0, tensorboard=False)
    with pytest.raises(ValueError, match='JSON compliant'):
        writer.write(1, 0.5, {'train/loss': float('nan')})
    writer.close()
    assert read_metrics(tmp_path) == []


def test_tensorboard_events_are_written(tmp_path):
    writer = MetricsWriter(tmp_path, 0, tensorboard=True)
    writer.write(1, 0.5, {'train/loss': 2.0})
    writer.close()
    (events,) = tmp_path.glob('events.out.tfevents.*')
    assert b'train/loss' in events.read_bytes()


def test_there_is_no_events_file_without_events(tmp_path):
    MetricsWriter(tmp_path, 7, tensorboard=True).close()
    assert [path.name for path in tmp_path.iterdir()] == ['metrics.jsonl']


def test_plain_lines_where_there_is_no_terminal(capsys):
    progress = Progress('auto', 0, 20, TASK)
    progress.report(10, 0.5, {'train/loss': 1.23456, 'train/accuracy': 0.5}, rate=0.1)
    assert capsys.readouterr().out == (
        'step 10/20 (epoch 0.50): train/loss 1.235, train/accuracy 50.00%, 1:40 left\n'
    )


STEP_VALUES = {
    'train/loss': 1.5,
    'train/accuracy': 0.25,
    'train/gradient_norm': 0.123,
    'train/learning_rate': 0.1,
    'train/images_per_second': 12345.0,
    'train/data_wait_fraction': 0.01,
}


def test_a_bar_has_the_time_left_and_the_last_values(capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '100')
    monkeypatch.setenv('LINES', '30')
    progress = Progress('bar', 5, 20, TASK)
    progress.advance()
    progress.report(6, 0.5, STEP_VALUES, rate=0.1)
    progress.report(6, 0.5, {'eval/accuracy': 0.75, 'eval/seconds': 3.0}, rate=0.0)
    progress.report(7, 0.5, STEP_VALUES | {'train/bad_steps': 2}, rate=0.1)
    progress.close()
    shown = capsys.readouterr()
    assert '6/20' in shown.err
    assert ' left, 12,345 images/s, loss 1.5, accuracy 25.00%' in shown.err
    assert 'gradient_norm' not in shown.err
    assert shown.out == (
        'step 6/20 (epoch 0.50): eval/accuracy 75.00%\nstep 7/20 (epoch 0.50): train/bad_steps 2\n'
    )


def test_the_time_left_leaves_out_the_first_step(capsys, monkeypatch):
    """Because that one is compiled: here for 100 s, and a step takes 2 s."""
    now = [1000.0]
    monkeypatch.setattr('tqdm.std.time', lambda: now[0])
    monkeypatch.setenv('COLUMNS', '100')
    progress = Progress('bar', 5, 20, TASK)
    for seconds in (100, 2, 2):
        now[0] += seconds
        progress.advance()
    progress.close()
    lines = capsys.readouterr().err.replace('\r', '\n').splitlines()
    assert '6/20 ? left' in ' '.join(lines)
    assert '7/20 00:26 left' in ' '.join(lines)
    assert '8/20 00:24 left' in lines[-1]


@pytest.mark.parametrize('mode', ['bar', 'lines', 'none'])
def test_compiling_is_announced(mode, capsys):
    progress = Progress(mode, 0, 2, TASK)
    progress.compiling()
    progress.close()
    expected = '' if mode == 'none' else 'compiling the training step\n'
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize('mode', ['bar', 'lines'])
def test_a_name_cannot_control_the_terminal(mode, capsys):
    progress = Progress(mode, 0, 2, TASK)
    progress.say('label \x1b[2Ja\nb')
    progress.close()
    assert 'label \\x1b[2Ja\\nb\n' in capsys.readouterr().out


@pytest.mark.parametrize('columns', [80, 100, 120])
def test_a_bar_fits_its_terminal(columns, capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', str(columns))
    monkeypatch.setenv('LINES', '30')
    progress = Progress('bar', 225_180, 450_360, TASK)
    progress.report(225_180, 45.0, STEP_VALUES, rate=4.2)
    progress.close()
    lines = capsys.readouterr().err.replace('\r', '\n').splitlines()
    (line,) = {line for line in lines if 'images/s' in line}
    assert line.endswith('accuracy 25.00%')
    assert '225180/450360' in line
    assert len(line) <= columns
    assert len(line.partition('|')[0].strip()) >= 2  # The bar itself, half full.


def test_the_clock_leaves_out_what_it_was_stopped_for(monkeypatch):
    now = [0.0]
    monkeypatch.setattr('gcnet_jax.training.metrics.time.perf_counter', lambda: now[0])
    clock = Clock()
    clock.step_done()  # The first step, which was compiled.
    clock.start()
    for _ in range(4):
        now[0] += 0.5
        clock.step_done()
    clock.stop()
    now[0] += 100
    assert clock.rate() == 2.0
    assert clock.rate() == 0.0


def test_clock_tells_the_share_that_was_waited_for_data(monkeypatch):
    now = [0.0]
    monkeypatch.setattr('time.perf_counter', lambda: now[0])
    clock = Clock()
    with clock.waiting():  # Before the first step is done: nothing is measured yet.
        now[0] += 7
    assert clock.waited_fraction() == 0.0
    clock.start()
    now[0] += 3
    with clock.waiting():
        now[0] += 1
    assert clock.waited_fraction() == 0.25
    clock.stop()
    now[0] += 100
    with clock.waiting():
        now[0] += 9
    assert clock.waited_fraction() == 0.25
    clock.rate()
    assert clock.waited_fraction() == 0.0


def test_in_a_bucket_the_file_is_written_again(tmp_path, monkeypatch, capsys):
    with local_bucket(tmp_path) as bucket:
        workdir = as_place(f'{bucket}/run')
        writer = MetricsWriter(workdir, 0, tensorboard=True)
        assert 'TensorBoard events are not written to a bucket' in capsys.readouterr().out
        writer.write(1, 0.5, {'train/loss': 1.0})
        assert read_metrics(workdir) == []  # Not an upload for each line,
        writer.flush()  # but before each checkpoint,
        assert [line['step'] for line in read_metrics(workdir)] == [1]
        monkeypatch.setattr(metrics, 'BUCKET_SECONDS', 0)
        writer.write(2, 1.0, {'train/loss': 1.0})  # and after a while.
        assert [line['step'] for line in read_metrics(workdir)] == [1, 2]
        writer.close()
        write(workdir, 1, [2, 3])
        assert [line['step'] for line in read_metrics(workdir)] == [1, 2, 3]
        assert [path.name for path in workdir.iterdir()] == ['metrics.jsonl']


def test_a_weighted_loss_is_divided_by_the_weights():
    window = Window()
    for weight in (1.0, 3.0):
        step = {'loss': 2.0, 'correct': 1, 'count': 4, 'gradient_norm': 1, 'finite': True}
        window.add(step | {'weight': weight}, 0)
    again = Window(dict(window.sums))
    assert again.means(TASK)['train/loss'] == 1.0
    assert again.means(TASK)['train/accuracy'] == 0.25
    earlier = dict(again.sums)
    del earlier['weight']  # As a run of an earlier version saved it, without class weights.
    assert Window(earlier).means(TASK)['train/loss'] == 0.5
    nothing = Window()
    nothing.add(step | {'loss': 0.0, 'weight': 0.0}, 0)
    assert nothing.means(TASK)['train/loss'] == 0.0
