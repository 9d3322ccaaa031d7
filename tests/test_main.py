"""The command line: what it prints, and how it fails."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import gcnet_jax
from gcnet_jax import planning
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


def test_what_prepare_prints_names_splits_that_exist(tmp_path, capsys):
    for split in ('train', 'val'):
        for label in ('cat\u00e9', 'dog'):
            (tmp_path / 'my pets' / split / label).mkdir(parents=True)
            for index in range(4):
                pixels = np.full((9, 7, 3), index * 20, np.uint8)
                place = tmp_path / 'my pets' / split / label / f'{index}\x1b.png'
                Image.fromarray(pixels).save(place, 'PNG')
    (tmp_path / 'my pets' / 'train' / 'ant').mkdir()
    (tmp_path / 'my pets' / 'train' / 'dog' / 'a\nb.txt').write_text('about')
    data_dir = str(tmp_path / 'my sets')
    arguments = ['prepare', str(tmp_path / 'my pets'), '--name', 'pets', '--data-dir', data_dir]
    assert main([*arguments, '--skip-damaged']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        r'left out: train/dog/a\nb.txt (not an image of a known format '
        '(JPEG, PNG, GIF, BMP, WEBP, TIFF, PPM))'
    )
    assert lines[1] == 'no class: train/ant (an empty folder)'
    assert lines[2] == 'pets: 2 classes, images: train 8, validation 8'
    settings = [
        '--config.data.name=pets',
        f'--config.data.data_dir={data_dir}',
        '--config.training.batch_size=2',
    ]
    assert lines[-2].startswith('train on it: python -m gcnet_jax train folder --config.')
    assert shlex.split(lines[-2])[8:] == [*settings, '--workdir', 'runs/pets']
    assert lines[-1].startswith(
        'or fine-tune a trained network: python -m gcnet_jax train finetune'
    )
    initial = '--config.training.init_from=DIR'
    assert shlex.split(lines[-1])[10:] == [initial, *settings, '--workdir', 'runs/pets_tuned']
    assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['summary', 'gc_resnet5'], "unknown model 'gc_resnet5'; did you mean"),
        (['summary', 'resnet50', '--size', '0'], '--size must be 1 or more, got 0'),
        (['summary', 'resnet50', '--size', '8x0'], '--size must be 1 or more, got 8x0'),
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


CONFIGS = Path(__file__).parents[1] / 'configs'


@pytest.fixture
def planned(monkeypatch):
    """Plans are not made; returns what they would have been made of."""
    calls = []

    def make_plans(config, topologies, batch_per_chip, *, find_largest, tell, compiling):
        calls.append((config, topologies, batch_per_chip, find_largest))
        return ['first', 'second']

    monkeypatch.setattr(planning, 'prepare_process', lambda: None)
    monkeypatch.setattr(planning, 'make_plans', make_plans)
    monkeypatch.setattr(planning, 'format_plans', lambda plans: f'table of {plans}')
    monkeypatch.setattr(planning, 'plan_to_dict', lambda plan: {'plan': plan})
    return calls


def test_plan_reads_its_flags_and_any_setting(planned, capsys):
    arguments = ['plan', '--config', str(CONFIGS / 'imagenet.py:resnet50'), '--topology', 'v5e:1x1']
    assert main(arguments) == 0
    assert capsys.readouterr().out == "table of ['first', 'second']\n"
    config, topologies, batch_per_chip, find_largest = planned[0]
    assert config.model.name == 'resnet50'
    assert (topologies, batch_per_chip, find_largest) == (['v5e:1x1'], None, False)
    more = [
        '--topology=v6e:4x4', '--batch-per-chip', '256', '--largest-batch', '--json',
        '--config.mesh.fsdp=4', '--noconfig.data.flip',
    ]  # fmt: skip
    assert main(arguments + more) == 0
    assert json.loads(capsys.readouterr().out) == [{'plan': 'first'}, {'plan': 'second'}]
    config, topologies, batch_per_chip, find_largest = planned[1]
    assert (config.mesh.fsdp, config.data.flip) == (4, False)
    assert (topologies, batch_per_chip, find_largest) == (['v5e:1x1', 'v6e:4x4'], 256, True)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--topology', 'v5e:7'], "unknown topology 'v5e:7'"),
        (['--topology', 'v5e:1x1', '--config.mesh.fsdq=2'], "did you mean 'config.mesh.fsdp'"),
        (['--topology', 'v5e:1x1', '--config.mesh.fsdp=two'], 'fsdp'),
        (['--topology', 'v5e:1x1', '--batch-per-chip', '0'], 'it must be 1 or more'),
    ],
)
def test_plans_errors_are_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(planning, 'prepare_process', lambda: None)
    assert main(['plan', '--config', str(CONFIGS / 'digits.py'), *arguments]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith('gcnet_jax plan: ')
    assert captured.err.count('\n') == 1
    assert captured.out == ''


@pytest.mark.parametrize(
    'arguments',
    [
        ['plan', '--topology', 'v5e:1x1'],
        ['plan', '--config', 'configs/digits.py'],
        ['plan', '--config', 'x.py', '--topology', 'v5e:1x1', '--batch-per-chp', '3'],
        ['plan', '--config', 'x.py', '--topology', 'v5e:1x1', 'config.mesh.fsdp=4'],
        ['models', '--config.mesh.fsdp=4'],
    ],
)
def test_flags_that_a_command_does_not_have_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert 'arguments' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (
            ['plan', '--topolgy', 'v5e:1x1'],
            'required: --config, --topology; unrecognized: --topolgy (did you mean --topology?)',
        ),
        (['port', '--outt=x', 'a.pth'], 'unrecognized: --outt=x (did you mean --out?)'),
        (['plan', '--config=a', '--config.mesh.fsdp=4'], 'arguments are required: --topology\n'),
        (['models', '--tpo-k=2', '--hlep'], '--tpo-k=2 --hlep (did you mean --help?)'),
        (
            ['plan', '--config=a', '--topology=b', '--batch-per-chp', '--config.mesh.fsdp=4'],
            'unrecognized arguments: --batch-per-chp (did you mean --batch-per-chip?)\n',
        ),
    ],
)
def test_a_misspelt_flag_is_named_with_the_one_meant(arguments, message, capsys):
    with pytest.raises(SystemExit, match='2'):
        main(arguments)
    assert message in capsys.readouterr().err


def test_usage_errors_exit_with_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(['sumary'])
    assert stopped.value.code == 2
    assert 'summary' in capsys.readouterr().err


def test_the_version_and_the_defaults_are_told(capsys):
    with pytest.raises(SystemExit, match='0'):
        main(['--version'])
    assert capsys.readouterr().out == f'gcnet_jax {gcnet_jax.__version__}\n'
    for command, flag in (('predict', 'top-k'), ('evaluate', 'batch-size'), ('prepare', 'seed')):
        with pytest.raises(SystemExit, match='0'):
            main([command, '--help'])
        words = ' '.join(capsys.readouterr().out.split('options:')[1].split())
        text = words.split(f'--{flag} ')[1].split(' --')[0]
        assert re.search(r'default: \d+', text), (command, text)


def test_train_takes_a_shipped_config_by_its_name_and_settings(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr('gcnet_jax.training.loop.train', lambda *given: calls.append(given))
    monkeypatch.chdir('/')
    assert main(['train', 'folder', '--config.data.name=pets', '--workdir', 'runs/pets']) == 0
    assert main(['train', 'configs/imagenet.py:resnet50', '--config.training.seed=3']) == 0
    (folder, place), (imagenet, default_place) = calls
    assert (folder.data.name, str(place)) == ('pets', 'runs/pets')
    assert (imagenet.model.name, imagenet.training.seed) == ('resnet50', 3)
    assert str(default_place) == 'runs/imagenet_resnet50'
    assert main(['train', 'foldr']) == 1
    assert "gcnet_jax train: unknown config file (--config) 'foldr'" in capsys.readouterr().err
    assert main(['train', 'folder', '--config.data.nam=x']) == 1
    assert "did you mean 'config.data.name'" in capsys.readouterr().err


def test_a_config_file_with_a_mistake_is_named_with_its_line(tmp_path, capsys):
    file = tmp_path / 'own.py'
    file.write_text('import os\ndef get_config(:\n    pass\n')
    assert main(['train', str(file)]) == 1
    assert re.search(r'own.py: .*line 2 of own.py: def get_config\(:', capsys.readouterr().err)


def test_what_a_terminal_cannot_show_is_escaped(tmp_path):
    """No name ends the program, whatever the encoding; and none moves the cursor."""
    (tmp_path / 'a\udcff\x1b[2J猫.png').write_bytes(b'')
    code = (
        'import sys; from gcnet_jax.__main__ import main; '
        f'sys.exit(main(["port", {str(tmp_path)!r} + "/a\\udcff\\x1b[2J猫.png", "--out", "x"]))'
    )
    environment = os.environ | {'PYTHONIOENCODING': 'ascii', 'PYTHONUTF8': '0'}
    done = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True)
    assert done.returncode == 1
    (line,) = done.stderr.decode('ascii').splitlines()
    assert line.endswith(
        r'a\udcff\x1b[2J\u732b.png is empty; the download was cut off: fetch it again'
    )


def test_what_is_printed_of_files_is_escaped(tmp_path, monkeypatch, capsys):
    report = types.SimpleNamespace(lines=lambda: ['left 1: \x1b]0;title\x07 (a\nb)'])
    description = types.SimpleNamespace(name='net\x1b[2J')
    monkeypatch.setattr('gcnet_jax.porting.port', lambda *_, **__: (description, report))
    assert main(['port', 'a.pth', '--out', 'out\x1b']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [r'left 1: \x1b]0;title\x07 (a\nb)', r'wrote net\x1b[2J to out\x1b']


def test_ctrl_c_ends_a_command_in_one_line(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr('gcnet_jax.models.list_models', interrupt)
    assert main(['models']) == 130
    assert capsys.readouterr().err == 'gcnet_jax models: interrupted\n'


def test_the_wheel_has_every_package():
    root = Path(__file__).parents[1]
    listed = tomllib.loads((root / 'pyproject.toml').read_text())['tool']['setuptools']['packages']
    found = {
        str(path.parent.relative_to(root)).replace('/', '.')
        for path in (root / 'gcnet_jax').rglob('__init__.py')
    }
    assert set(listed) == found | {'gcnet_jax.colab', 'gcnet_jax.configs'}
    assert (root / 'gcnet_jax' / 'py.typed').is_file()


@pytest.mark.slow
def test_an_installed_package_trains_by_its_own_configs(tmp_path):
    """In an environment of its own, away from this directory."""
    source, environment = tmp_path / 'source', tmp_path / 'environment'
    root = Path(__file__).parents[1]
    names = (
        'gcnet_jax',
        'colab',
        'configs',
        'pyproject.toml',
        'requirements.txt',
        'README.md',
        'LICENSE',
    )
    for name in names:
        copy = shutil.copytree if (root / name).is_dir() else shutil.copy
        source.mkdir(exist_ok=True)
        copy(root / name, source / name)
    subprocess.run([sys.executable, '-m', 'venv', environment], check=True)
    python = environment / 'bin' / 'python'
    subprocess.run([python, '-m', 'pip', 'install', '-q', '--no-deps', source], check=True)
    site = next(environment.glob('lib/python*/site-packages'))
    (site / 'dependencies.pth').write_text(sysconfig.get_paths()['purelib'])
    command = [environment / 'bin' / 'gcnet_jax', 'train', 'digits', '--workdir', 'run']
    settings = ['--config.training.total_steps=1', '--config.data.data_dir=sets']
    done = subprocess.run(
        [*command, *settings, '--config.schedule.warmup_epochs=0'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert 'after step 1; trained' in done.stdout
