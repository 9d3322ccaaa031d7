"""What the notebooks do before the package is there; above all, what is installed stays."""

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from gcnet_jax.commands.config_files import load_config
from gcnet_jax.data.sources import load_source
from gcnet_jax.errors import CheckpointError, UserError
from gcnet_jax.porting import load_pretrained
from gcnet_jax.training.checks import check_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def setup():
    """The module, which lies outside of every package."""
    spec = importlib.util.spec_from_file_location('setup', ROOT / 'colab' / 'notebook_setup.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pip(setup, monkeypatch):
    """Takes the place of pip; remembers its arguments and the constraints that it was given."""
    calls = []

    def run(command, check):
        file = Path(command[command.index('--constraint') + 1])
        calls.append((command, file.read_text().splitlines()))
        return types.SimpleNamespace(returncode=run.returncode)

    run.returncode = 0
    monkeypatch.setattr(setup, 'subprocess', types.SimpleNamespace(run=run))
    return types.SimpleNamespace(calls=calls, run=run)


def requirements(setup, tmp_path, *lines):
    (tmp_path / 'requirements.txt').write_text('\n'.join(lines))
    return setup.read_requirements(tmp_path)


def test_only_what_is_missing_is_installed_and_the_rest_is_held(setup, pip, tmp_path):
    lines = ('# a comment', 'jax>=0.7  # why', 'no-such-thing>=2', 'numpy>=1', '', 'another_one')
    missing = setup.install_missing(requirements(setup, tmp_path, *lines))
    assert missing == ['no-such-thing>=2', 'another_one']
    ((command, constraints),) = pip.calls
    assert command[-2:] == missing
    assert command[0] == sys.executable
    for name in ('jax', 'jaxlib', 'flax', 'numpy'):
        assert f'{name}=={importlib.metadata.version(name)}' in constraints


def test_nothing_is_installed_where_nothing_is_missing(setup, pip):
    assert setup.install_missing(setup.read_requirements(ROOT)) == []
    assert pip.calls == []


def test_what_is_too_old_is_an_error_and_not_upgraded(setup, pip, tmp_path):
    with pytest.raises(RuntimeError, match=r'jax is .*, needed is >=999.*newer runtime'):
        setup.install_missing(requirements(setup, tmp_path, 'jax>=999', 'no-such-thing'))
    assert pip.calls == []


def test_the_tests_own_tools_are_not_installed(setup, tmp_path):
    found = {line.partition('>')[0] for line in setup.read_requirements(ROOT).splitlines()}
    assert {'jax', 'flax', 'etils[epath]'} <= found
    assert not found & {'pytest', 'pytest-xdist', 'beartype'}
    # Where the package was installed into a directory, its metadata say what it needs.
    (tmp_path / 'gcnet_jax').mkdir()
    place = tmp_path / 'gcnet_jax-0.1.0.dist-info'
    place.mkdir()
    needed = ('jax>=0.7', 'pytest>=8', 'gcsfs ; extra == "gcs"', 'x ; python_version < "3"')
    lines = ['Metadata-Version: 2.4', 'Name: gcnet-jax', 'Version: 0.1.0']
    (place / 'METADATA').write_text(
        '\n'.join([*lines, *(f'Requires-Dist: {text}' for text in needed)])
    )
    assert setup.read_requirements(tmp_path) == 'jax>=0.7'


def test_an_installed_package_is_put_on_the_path(setup, monkeypatch, tmp_path):
    (tmp_path / 'gcnet_jax').mkdir()
    (tmp_path / 'gcnet_jax' / '__init__.py').touch()
    monkeypatch.setattr(sys, 'path', list(sys.path))
    assert setup.prepare(tmp_path / 'gcnet_jax').source == tmp_path
    assert sys.path[0] == str(tmp_path)


def test_a_changed_form_is_told_in_the_notebooks_words(setup, tmp_path):
    from gcnet_jax.training.workdir import CONFIG_FILE

    config = setup.training_config(smoke(True), dataset='digits', epochs=1, dtype='bfloat16')
    assert config.model.dtype == 'bfloat16'
    config.data.data_dir = str(tmp_path / 'sets')
    workdir = tmp_path / 'runs' / 'first'
    workdir.mkdir(parents=True)
    before = config.to_dict() | {'schedule': {**config.schedule, 'peak_learning_rate': 9.0}}
    (workdir / CONFIG_FILE).write_text(json.dumps(before))
    with pytest.raises(CheckpointError) as raised:
        setup.train(config, workdir)
    assert str(raised.value) == (
        "the run 'first' is there with another config (config.schedule.peak_learning_rate); "
        'choose another run_name, or give the same settings to continue that run'
    )


def test_a_failed_installation_is_an_error(setup, pip, tmp_path):
    pip.run.returncode = 1
    with pytest.raises(RuntimeError, match='pip could not install no-such-thing'):
        setup.install_missing(requirements(setup, tmp_path, 'no-such-thing'))


def test_it_needs_only_the_standard_library_until_then():
    code = (
        'import sys\n'
        'before = set(sys.modules)\n'
        'import notebook_setup\n'
        'new = {name.partition(".")[0] for name in set(sys.modules) - before}\n'
        'assert new <= {*sys.stdlib_module_names, "notebook_setup"}, new'
    )
    subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT / 'colab')


def test_prepare_makes_the_package_importable_and_reads_the_smoke_setting(
    setup, monkeypatch, tmp_path, capsys
):
    (tmp_path / 'requirements.txt').write_text('numpy')
    monkeypatch.setattr(sys, 'path', list(sys.path))
    monkeypatch.setenv('GCNET_JAX_SMOKE', '1')
    found = setup.prepare(tmp_path)
    assert sys.path[0] == str(tmp_path)
    assert found.smoke
    assert f'jax {jax.__version__} on 8 x cpu' in capsys.readouterr().out
    monkeypatch.setenv('GCNET_JAX_SMOKE', '0')
    assert not setup.prepare(tmp_path).smoke


def test_a_missing_tpu_is_said_loudly_where_one_is_expected(setup, monkeypatch):
    assert '!' not in setup.describe_devices(expect_tpu=False)
    banner = setup.describe_devices(expect_tpu=True)
    assert banner.startswith('!!!!!!!!')
    assert 'NO TPU: jax' in banner
    assert 'Change runtime type > TPU' in banner

    def fail():
        raise RuntimeError('Unable to initialize backend')

    monkeypatch.setattr(jax, 'devices', fail)
    assert 'on 0 x nothing.\n! Unable to initialize backend' in setup.describe_devices(True)
    chip = types.SimpleNamespace(platform='tpu', device_kind='TPU v5 lite')
    monkeypatch.setattr(jax, 'devices', lambda: [chip])
    assert setup.describe_devices(True) == f'jax {jax.__version__} on 1 x TPU v5 lite'


def smoke(value):
    return types.SimpleNamespace(source=ROOT, smoke=value)


CONTEXT = {'block': 'global_context', 'stages': '2, 3', 'position': 'after_conv1', 'ratio': 0.5}


def test_a_config_is_that_of_the_file_with_what_the_form_says(setup):
    digits = setup.training_config(smoke(False), dataset='digits', epochs=3)
    expected = load_config(str(ROOT / 'configs' / 'digits.py'))
    expected.training.total_epochs = 3.0
    expected.schedule.warmup_epochs = 0.75
    expected.runtime.progress = 'lines'
    assert digits.to_dict() == expected.to_dict()
    changed = setup.training_config(
        smoke(False),
        dataset='digits',
        epochs=3,
        image_size=32,
        network='resnet20',
        batch_size=32,
        learning_rate=0.25,
        **CONTEXT,
    )
    assert changed.data.image_size == 8
    assert changed.model.name == 'resnet20'
    assert changed.model.context == ({**CONTEXT, 'stages': (2, 3)},)
    assert changed.training.batch_size == 32
    assert changed.schedule.peak_learning_rate == 0.25
    check_config(changed)
    none = setup.training_config(
        smoke(False), dataset='digits', epochs=3, **CONTEXT | {'block': 'none'}
    )
    assert none.model.context is None
    other = CONTEXT | {'block': 'non_local'}
    non_local = setup.training_config(smoke(False), dataset='digits', epochs=3, **other)
    assert 'ratio' not in non_local.model.context[0]


def test_a_short_run_is_of_the_digits(setup):
    config = setup.training_config(smoke(True), dataset='imagenet2012', epochs=90, image_size=224)
    assert (config.data.name, config.data.image_size) == ('digits', 8)
    assert config.training.total_epochs == 1.0
    assert config.schedule.warmup_epochs == 0.25


def test_a_tfds_set_is_prepared_and_a_folder_too(setup, monkeypatch, tmp_path):
    prepared = []
    monkeypatch.setattr(setup, 'prepare_tfds', prepared.append)
    config = setup.training_config(smoke(False), dataset='cifar100', epochs=3, image_size=32)
    assert prepared == ['cifar100']
    assert (config.data.name, config.data.augmentation) == ('cifar100', 'pad_crop')
    config = setup.training_config(smoke(False), dataset='stl10', epochs=3, image_size=96)
    assert (config.data.image_size, config.data.augmentation) == (96, 'resized_crop')

    monkeypatch.setattr('tensorflow_datasets.core.constants.DATA_DIR', str(tmp_path / 'sets'))
    for split, name in (('train', 'a'), ('train', 'b'), ('val', 'a'), ('val', 'b')):
        (tmp_path / 'pets' / split / name).mkdir(parents=True)
        pixels = np.zeros((9, 9, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / 'pets' / split / name / 'x.png')
    config = setup.training_config(
        smoke(False), dataset='folder', folder=str(tmp_path / 'pets'), epochs=3, image_size=64
    )
    # What the data set has, chosen when the run begins.
    assert (config.data.name, config.data.evaluation_split) == ('my_images', None)
    assert len(load_source('my_images', 'validation', str(tmp_path / 'sets'))) == 2


def test_runs_go_to_drive_in_colab_only(setup, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert setup.run_directory('a', on_drive=False) == tmp_path / 'runs' / 'a'
    assert setup.run_directory('a', on_drive=True) == tmp_path / 'runs' / 'a'
    assert 'not Colab' in capsys.readouterr().out
    mounted = []
    drive = types.SimpleNamespace(mount=mounted.append)
    monkeypatch.setitem(sys.modules, 'google.colab', types.SimpleNamespace(drive=drive))
    found = setup.run_directory('a', on_drive=True)
    assert found == Path('/content/drive/MyDrive/gcnet_jax/a')
    assert mounted == ['/content/drive']


def test_a_tfds_set_is_prepared_in_an_environment_apart(setup, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(
        setup, 'subprocess', types.SimpleNamespace(run=lambda c, check: calls.append(c))
    )
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    setup.prepare_tfds('cifar10')
    make, install, build = calls
    place = tmp_path / 'gcnet_jax' / 'tensorflow'
    python = str(place / 'bin' / 'python')
    assert make == [sys.executable, '-m', 'venv', str(place)]
    assert place.stat().st_mode & 0o777 == 0o700
    assert install[0] == build[0] == python
    assert 'tensorflow-cpu' in install
    assert build[-2:] == ['cifar10', '']
    compile(build[2], 'code', 'exec')


def test_a_planted_environment_is_not_run(setup, monkeypatch, tmp_path):
    """Whoever can write to the directory could have put a program there."""
    monkeypatch.setattr(setup.subprocess, 'run', lambda *_, **__: pytest.fail('something was run'))
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    python = tmp_path / 'gcnet_jax' / 'tensorflow' / 'bin' / 'python'
    python.parent.mkdir(parents=True)
    python.touch()
    (tmp_path / 'gcnet_jax').chmod(0o777)
    with pytest.raises(UserError, match='programs are run from it and others can write to'):
        setup.prepare_tfds('cifar10')


def test_digits_are_written_as_images(setup, monkeypatch, tmp_path):
    monkeypatch.setattr('tensorflow_datasets.core.constants.DATA_DIR', str(tmp_path / 'sets'))
    files = setup.write_digits(tmp_path / 'digits', 3)
    assert len(set(files)) == 3
    for file in files:
        with Image.open(file) as image:
            assert image.size == (8, 8)


def test_the_photograph_is_there(setup):
    with Image.open(setup.sample_photo()) as image:
        assert image.size == (640, 427)


def test_random_weights_are_those_of_a_whole_network(setup, tmp_path):
    file = setup.write_random_weights('gcresnext26ts', tmp_path / 'model.safetensors')
    model, variables, report = load_pretrained(file)
    assert type(model).__name__ == 'ByobNet'
    assert report.values == 10_476_600 + sum(
        leaf.size for leaf in jax.tree.leaves(variables['batch_stats'])
    )
    assert not report.initialised
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables))
