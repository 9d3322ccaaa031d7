"""The README does what it says: its Python runs, what it names exists, its table is the truth."""

import dataclasses
import re
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from gcnet_jax.__main__ import main
from gcnet_jax.commands.config_files import read_flags
from gcnet_jax.models import create_model, list_models, model_entry
from gcnet_jax.models.summary import summarize
from gcnet_jax.stored import ModelDescription, write_ported

ROOT = Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()
SNIPPETS = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
COMMANDS = [
    line.partition('  #')[0].strip()
    for block in re.findall(r'```bash\n(.*?)```', README, re.DOTALL)
    for line in block.replace('\\\n', ' ').splitlines()
]


# Snippets that show another library at work need it.
MARKS = {'import onnxruntime': pytest.mark.onnx, 'import timm': pytest.mark.torch}


def marked(index):
    return pytest.param(index, marks=[MARKS[text] for text in MARKS if text in SNIPPETS[index]])


def store(directory, name, random_variables):
    """Leaves a network that was not trained where the README's commands leave a trained one."""
    preprocessing = dataclasses.replace(model_entry(name).preprocessing, test_size=8)
    description = ModelDescription(name, {}, preprocessing=preprocessing)
    images = jnp.zeros((1, 64, 64, 3))
    write_ported(directory, description, random_variables(description.build(), images, train=False))


@pytest.mark.parametrize('index', [marked(index) for index in range(len(SNIPPETS))])
def test_python_runs(index, tmp_path, monkeypatch, random_variables):
    monkeypatch.chdir(tmp_path)
    for command in COMMANDS:
        if not command.startswith('python -m gcnet_jax export'):
            continue
        arguments = command.split()[3:]
        checkpoint, out = (
            arguments[arguments.index(flag) + 1] for flag in ('--checkpoint', '--out')
        )
        if f"'{out}'" in SNIPPETS[index]:
            network = Path(checkpoint).name
            store(checkpoint, 'gccnn' if network == 'digits' else network, random_variables)
            assert main(arguments) == 0
    exec(compile(SNIPPETS[index], f'README snippet {index}', 'exec'), {'__name__': 'readme'})


def test_there_are_snippets_and_commands():
    assert len(SNIPPETS) >= 5
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize('command', [text for text in COMMANDS if text.startswith('python train')])
def test_training_commands_are_read(command):
    config, _, _ = read_flags(command.split()[1:], ROOT / 'configs' / 'digits.py')
    assert config.model.name in list_models() or config.training.init_from


@pytest.mark.parametrize('command', [text for text in COMMANDS if ' -m gcnet_jax ' in text])
def test_other_commands_exist(command, capsys):
    name = command.split()[3]
    with pytest.raises(SystemExit) as stopped:
        main([name, '--help'])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for flag in re.findall(r' (--[a-z-]+)', command):
        assert flag in printed


def test_linked_files_exist():
    links = [link for link in re.findall(r'\]\(([^)#]+)\)', README) if '://' not in link]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


ROWS = {
    row[0]: row[1:]
    for row in re.findall(
        r'^\| `(\w+)` \| ([\d,]+) \| ([\d.]+) G \| (\d+) \| (.*?) \|$', README, re.M
    )
}
QUICK = ('gc_resnet50', 'gc_resnet20', 'gccnn')


def test_table_lists_every_network():
    assert sorted(ROWS) == list_models()
    for name, row in ROWS.items():
        assert row[-1] == model_entry(name).description


@pytest.mark.parametrize(
    'name',
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ROWS],
)
def test_table_has_the_measured_numbers(name):
    size = model_entry(name).preprocessing.test_size
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    summary = summarize(create_model(name), images, train=False)
    parameters, giga, blocks, _ = ROWS[name]
    assert f'{summary.total.parameters:,}' == parameters
    assert f'{summary.total.multiply_adds / 1e9:.2f}' == giga
    assert len(summary.context) == int(blocks)


def test_requirements_are_read_by_the_package():
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())
    assert project['project']['dynamic'] == ['dependencies']
    files = project['tool']['setuptools']['dynamic']['dependencies']['file']
    assert files == ['requirements.txt']
