"""Curves of runs, as the figure holds them, and how damaged runs are refused."""

import json
import sys
import threading
import time
import types

import numpy as np
import pytest
from PIL import Image

from gcnet_jax.__main__ import main
from gcnet_jax.analysis.curves import draw_curves, watch_curves
from gcnet_jax.errors import ConfigError

LINES = [
    {'step': 10, 'epoch': 0.5, 'train/loss': 2.0, 'train/accuracy': 0.25},
    {'step': 20, 'epoch': 1.0, 'train/loss': 1.0, 'train/accuracy': 0.5, 'train/gradient_norm': 3},
    {'step': 20, 'epoch': 1.0, 'eval/loss': 1.5, 'eval/accuracy': 0.375, 'eval/examples': 7},
]


def run(directory, lines=LINES, end=''):
    directory.mkdir(parents=True)
    text = ''.join(json.dumps(line) + '\n' for line in lines) + end
    (directory / 'metrics.jsonl').write_text(text)
    return str(directory)


def curves(axes):
    return [
        (line.get_xdata(), line.get_ydata()) for line in axes.get_lines() if len(line.get_xdata())
    ]


def test_loss_and_accuracy_of_training_and_evaluation_are_drawn(tmp_path):
    loss, accuracy = draw_curves([run(tmp_path / 'a')]).axes
    assert (loss.get_title(), accuracy.get_title()) == ('loss', 'accuracy')
    assert loss.get_xlabel() == 'epoch'
    for found, expected in (
        (curves(loss), [([0.5, 1.0], [2.0, 1.0]), ([1.0], [1.5])]),
        (curves(accuracy), [([0.5, 1.0], [0.25, 0.5]), ([1.0], [0.375])]),
    ):
        assert [(list(x), list(y)) for x, y in found] == expected


def test_the_loss_is_labelled_with_plain_numbers(tmp_path):
    lines = [dict(LINES[0], **{'train/loss': 30.0}), dict(LINES[1], **{'train/loss': 0.55})]
    figure = draw_curves([run(tmp_path / 'a', lines)])
    figure.draw_without_rendering()
    axis = figure.axes[0].yaxis
    labels = [label.get_text() for minor in (False, True) for label in axis.get_ticklabels(minor)]
    assert {'1', '10', '0.6', '2'} <= set(labels)
    assert not any('e' in label for label in labels)


def test_the_axis_can_count_steps(tmp_path):
    loss, _ = draw_curves([run(tmp_path / 'a')], by='step').axes
    assert [list(x) for x, _ in curves(loss)] == [[10, 20], [20]]
    with pytest.raises(ConfigError, match="unknown horizontal axis 'minutes'; known: epoch, step"):
        draw_curves([tmp_path / 'a'], by='minutes')


def test_runs_differ_in_colour_and_are_named_by_their_directories(tmp_path):
    runs = [run(tmp_path / 'gc' / f'{name}$x$') for name in 'abc'] + [run(tmp_path / 'plain')]
    figure = draw_curves(runs)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ['train', 'eval', 'gc/a$x$', 'gc/b$x$', 'gc/c$x$', 'plain']
    assert len({line.get_color() for line in figure.axes[0].get_lines()}) == 4


def test_more_runs_than_a_palette_has_differ_too(tmp_path):
    figure = draw_curves([run(tmp_path / str(index)) for index in range(12)])
    assert len({line.get_color() for line in figure.axes[0].get_lines()}) == 12


def test_a_run_under_way_is_drawn_to_its_last_whole_line(tmp_path):
    loss, _ = draw_curves([run(tmp_path / 'a', end='{"step": 30, "train/lo')]).axes
    assert list(curves(loss)[0][0]) == [0.5, 1.0]


def test_the_command_writes_a_picture(tmp_path, capsys):
    out = tmp_path / 'curves.png'
    assert main(['curves', run(tmp_path / 'a'), run(tmp_path / 'b'), '--out', str(out)]) == 0
    assert capsys.readouterr().out == f'wrote {out}\n'
    with Image.open(out) as image:
        pixels = np.asarray(image.convert('RGB'))
    assert pixels.shape == (420, 1000, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a', 'b', 'curves.png']


@pytest.mark.parametrize(
    ('lines', 'end', 'message'),
    [
        (None, '', 'is not a directory; name the working directory of a run'),
        ([], '', 'metrics.jsonl holds no metrics yet'),
        ([{'step': 1, 'epoch': 1.0}], '', 'metrics.jsonl holds no metrics yet'),
        ([], 'oops\n{}\n', 'metrics.jsonl, line 1 is not JSON with a step'),
        ([{'step': 1, 'epoch': 1, 'eval/loss': 'x'}], '', "step 1: eval/loss is 'x', not a number"),
        ([{'step': 1, 'eval/loss': 1.0}], '', 'step 1: epoch is None, not a number'),
    ],
)
def test_a_run_that_cannot_be_drawn_is_one_line(tmp_path, capsys, lines, end, message):
    if lines is not None:
        run(tmp_path / 'bad', lines, end)
    out = tmp_path / 'curves.png'
    assert main(['curves', run(tmp_path / 'good'), str(tmp_path / 'bad'), '--out', str(out)]) == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count('\n') == 1
    assert not out.exists()


def test_a_directory_without_metrics_and_a_run_named_twice_are_refused(tmp_path, capsys):
    out = str(tmp_path / 'curves.png')
    assert main(['curves', str(tmp_path), '--out', out]) == 1
    assert 'holds no metrics.jsonl' in capsys.readouterr().err
    good = run(tmp_path / 'good')
    assert main(['curves', good, good, '--out', out]) == 1
    assert 'a run is named twice' in capsys.readouterr().err


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path, capsys):
    assert main(['curves', run(tmp_path / 'a'), '--out', str(tmp_path / 'no' / 'x.png')]) == 1
    assert 'cannot write' in capsys.readouterr().err


class Handle:
    """What IPython's display returns: it remembers what is shown."""

    def __init__(self, picture):
        self.shown = [picture]

    def update(self, picture):
        self.shown.append(picture)


def test_curves_are_shown_anew_while_a_run_goes_on(tmp_path, monkeypatch):
    handles = []

    def display(picture, display_id):
        assert display_id
        handles.append(Handle(picture))
        return handles[-1]

    notebook = types.SimpleNamespace(Image=lambda data: data, display=display)
    monkeypatch.setitem(sys.modules, 'IPython.display', notebook)
    with watch_curves([tmp_path / 'a'], seconds=0.01):
        time.sleep(0.05)
        assert handles == []  # The run has not begun.
        run(tmp_path / 'a')
        until = time.monotonic() + 60
        while not handles and time.monotonic() < until:
            time.sleep(0.01)
        (handle,) = handles
    assert len(handle.shown) >= 2  # And once more at the end.
    assert all(picture.startswith(b'\x89PNG') for picture in handle.shown)


def test_watching_ends_with_an_error_inside(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'IPython.display', types.SimpleNamespace(Image=0, display=0))
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt), watch_curves([tmp_path / 'a']):
        raise KeyboardInterrupt
    assert threading.active_count() == before


def test_labels_of_a_short_range_differ(tmp_path):
    lines = [
        dict(LINES[0], **{'train/accuracy': 0.952}),
        dict(LINES[1], **{'train/accuracy': 0.9565}),
    ]
    figure = draw_curves([run(tmp_path / 'a', lines[:2])])
    figure.draw_without_rendering()
    labels = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    assert len(labels) == len(set(labels)) > 2
    assert all(label.endswith('%') for label in labels)


def test_runs_of_another_task_have_its_best_metric(tmp_path):
    lines = [
        {'step': 10, 'epoch': 0.5, 'train/loss': 2.0},
        {'step': 20, 'epoch': 1.0, 'eval/loss': 1.5, 'eval/mAP': 0.375},
    ]
    panels = draw_curves([run(tmp_path / 'a', lines)]).axes
    assert [panel.get_title() for panel in panels] == ['loss', 'mAP']
    assert [(list(x), list(y)) for x, y in curves(panels[1])] == [([1.0], [0.375])]
    both = draw_curves([tmp_path / 'a', run(tmp_path / 'b')])
    assert [panel.get_title() for panel in both.axes] == ['loss', 'accuracy', 'mAP']
    assert both.get_size_inches()[0] == 15


def test_a_run_that_has_only_a_loss_yet_is_drawn(tmp_path):
    panels = draw_curves([run(tmp_path / 'a', [{'step': 1, 'epoch': 0.5, 'train/loss': 2.0}])]).axes
    assert [panel.get_title() for panel in panels] == ['loss']
