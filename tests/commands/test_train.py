from pathlib import Path

import pytest

from gcnet_jax.commands import config_files, train
from gcnet_jax.errors import ConfigError
from gcnet_jax.training import loop
from gcnet_jax.training.processes import Interrupted, Preempted

CONFIGS = Path(__file__).parents[2] / 'configs'
DIGITS = CONFIGS / 'digits.py'


def read(*arguments):
    return config_files.read_flags(['train.py', *arguments], DIGITS)


def test_the_default_is_digits():
    config, name, workdir = read()
    assert (config.data.name, name, workdir) == ('digits', 'digits', None)


def test_settings_are_overridden():
    config, name, workdir = read(
        '--config', str(CONFIGS / 'cifar10.py'), '--workdir', 'there',
        '--config.training.total_epochs=20', '--config.model.context.ratio=0.5',
        '--config.model.context.stages=(2,3)', '--noconfig.data.flip',
        '--config.model.num_classes=3',
    )  # fmt: skip
    assert (name, workdir) == ('cifar10', Path('there'))
    assert config.training.total_epochs == 20
    assert config.model.context.ratio == 0.5
    assert config.model.context.stages == (2, 3)
    assert config.data.flip is False
    assert config.model.num_classes == 3


def test_entries_of_a_list_are_overridden():
    config, _, _ = read('--config.model.context[1].ratio=0.5')
    assert config.model.context[1]['ratio'] == 0.5


def test_a_variant_names_the_run():
    config, name, _ = read(f'--config={CONFIGS / "imagenet.py"}:resnet50')
    assert (config.model.name, name) == ('resnet50', 'imagenet_resnet50')


@pytest.mark.parametrize(
    ('argument', 'message'),
    [
        ('--config.training.total_epoch=3', r"did you mean 'config.training.total_epochs'"),
        ('--config.trainign.seed=3', r"did you mean 'config.training.seed'"),
        ('--config.model.context[7].ratio=1', r"unknown setting 'config.model.context\[7\].ratio'"),
        ('--config.training.batch_size=many', 'invalid literal'),
        ('--config.training=3', 'training'),
        ('--confg=x', "Unknown command line flag 'confg'"),
        ('--config=configs/none.py', 'unknown config file'),
        (f'--config={CONFIGS / "imagenet.py"}:resnet51', "did you mean 'resnet50'"),
        (f'--config={CONFIGS / "digits.py"}:other', r"get_config\('other'\) failed"),
        ('training.seed=3', 'settings are given as --config.KEY=VALUE'),
    ],
)
def test_a_wrong_flag_is_one_line(argument, message, capsys, monkeypatch):
    with pytest.raises(ConfigError, match=message):
        read(argument)
    assert train.run(['train.py', argument], DIGITS) == 1
    printed = capsys.readouterr()
    assert printed.out == ''
    assert printed.err.startswith('train.py: ')
    assert printed.err.count('\n') == 1


@pytest.mark.parametrize(
    ('line', 'message'),
    [
        (
            'c.training.batchsize = 3',
            r"get_config\(\) failed, line 4 of own.py: unknown setting 'batchsize'; did you mean "
            "'config.training.batch_size'",
        ),
        ("c.update({'training': {'batchsize': 3}})", "line 4 of own.py: unknown setting 'batchs"),
        (
            'c.training.total_steps = c.training.batchsize',
            "line 4 of own.py: unknown setting 'batc",
        ),
        ("c.training.batch_size = 'many'", 'line 4 of own.py: TypeError: Could not override'),
        ('raise SystemExit(5)', 'line 4 of own.py: SystemExit: 5'),
        ('c = {}', 'returned dict; it must return a ConfigDict'),
        ('return None', 'returned NoneType; it must return a ConfigDict'),
        ('c.training = (', r"'\(' was never closed, line 4 of own.py: c.training = \("),
    ],
)
def test_a_mistake_in_a_config_file_is_one_short_line(line, message, tmp_path, capsys):
    file = tmp_path / 'own.py'
    lines = ('from gcnet_jax.training.config import default_config', 'def get_config():')
    file.write_text('\n'.join([*lines, '    c = default_config()', f'    {line}', '    return c']))
    with pytest.raises(ConfigError, match=message):
        read(f'--config={file}')
    assert train.run(['train.py', f'--config={file}'], DIGITS) == 1
    (printed,) = capsys.readouterr().err.splitlines()
    assert len(printed) < 300 + len(str(file))


def test_a_config_file_without_get_config_is_refused(tmp_path):
    (tmp_path / 'own.py').write_text('x = 1')
    with pytest.raises(ConfigError, match=r'it defines no get_config\(\)'):
        read(f'--config={tmp_path}/own.py')


def test_a_run_goes_to_a_directory_named_after_its_config(monkeypatch):
    seen = []
    monkeypatch.setattr(loop, 'train', lambda config, workdir: seen.append(workdir))
    assert train.run(['train.py'], DIGITS) == 0
    assert train.run(['train.py', '--workdir=there'], DIGITS) == 0
    assert seen == [Path('runs/digits'), Path('there')]


def test_ctrl_c_says_how_to_continue(monkeypatch, tmp_path, capsys):
    def interrupted(config, workdir):
        (tmp_path / 'checkpoints' / '30').mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, 'train', interrupted)
    assert train.run(['train.py', f'--workdir={tmp_path}'], DIGITS) == 130
    assert 'the same command continues from step 30' in capsys.readouterr().err


def test_sigterm_has_an_exit_code_of_its_own(monkeypatch, tmp_path, capsys):
    def stopped(config, workdir):
        raise Preempted('SIGTERM: stopped after step 30 of 90, which is saved')

    monkeypatch.setattr(loop, 'train', stopped)
    assert train.run(['train.py', f'--workdir={tmp_path}'], DIGITS) == 75
    assert capsys.readouterr().err == (
        'train.py: SIGTERM: stopped after step 30 of 90, which is saved\n'
    )
    assert '75 stopped by SIGTERM' in config_files.USAGE


def test_ctrl_c_that_saved_has_its_own_code_too(monkeypatch, tmp_path, capsys):
    def stopped(config, workdir):
        raise Interrupted('Ctrl-C: stopped after step 30 of 90, which is saved')

    monkeypatch.setattr(loop, 'train', stopped)
    assert train.run(['train.py', f'--workdir={tmp_path}'], DIGITS) == 130
    assert capsys.readouterr().err == (
        'train.py: Ctrl-C: stopped after step 30 of 90, which is saved\n'
    )


@pytest.mark.parametrize('place', ['s3://bucket/run', 'http://host/run', 'file:///run', 'gs://'])
def test_a_workdir_that_is_no_place_is_refused_at_once(place, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, 'train', pytest.fail)
    assert train.run(['train.py', f'--workdir={place}'], DIGITS) == 1
    assert f'--workdir {place}' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_nobody_foresaw_keeps_its_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr(loop, 'train', lambda config, workdir: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.run(['train.py', f'--workdir={tmp_path}'], DIGITS)
