"""The command line: what it prints, and how it fails."""

import numpy as np
import pytest
from PIL import Image

from gcnet_jax.__main__ import main
from gcnet_jax.data.sources import load_source


def test_models_lists_what_matches(capsys):
    assert main(['models', 'gc_resnet5*']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines][:2] == ['gc_resnet50', 'gc_resnet50_c4']


def test_summary_prints_the_papers_numbers(capsys):
    assert main(['summary', 'gc_resnet50', '--size', '64']) == 0
    printed = capsys.readouterr().out
    assert '28,078,773' in printed
    assert '2,521,741' in printed
    assert '64 x 64 x 3' in printed


def test_prepare_makes_a_set_that_loads_by_its_name(tmp_path, capsys):
    for label in ('cat', 'dog'):
        (tmp_path / 'pets' / label).mkdir(parents=True)
        for index in range(4):
            pixels = np.full((9, 7, 3), index * 20, np.uint8)
            Image.fromarray(pixels).save(tmp_path / 'pets' / label / f'{index}.png')
    data_dir = str(tmp_path / 'sets')
    arguments = ['prepare', str(tmp_path / 'pets'), '--name', 'pets', '--data-dir', data_dir]
    assert main([*arguments, '--test-fraction', '0.25']) == 0
    printed = capsys.readouterr().out
    assert 'pets: 2 classes, images: train 6, test 2' in printed
    assert f'--config.data.name=pets --config.data.data_dir={data_dir}' in printed
    assert load_source('pets', 'test', data_dir).label_names == ('cat', 'dog')


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['summary', 'gc_resnet5'], "unknown model 'gc_resnet5'; did you mean"),
        (['summary', 'resnet50', '--size', '0'], '--size must be 1 or more, got 0'),
        (['models', 'nothing*'], "no network matches 'nothing*'"),
        (['prepare', '/does/not/exist', '--name', 'x'], "'/does/not/exist' is not a directory"),
    ],
)
def test_errors_are_one_line_and_exit_code_1(arguments, message, capsys):
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count('\n') == 1
    assert captured.out == ''


def test_usage_errors_exit_with_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(['sumary'])
    assert stopped.value.code == 2
    assert 'summary' in capsys.readouterr().err
