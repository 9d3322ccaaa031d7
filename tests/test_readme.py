"""README and docs/ do what they say: their code runs, what they name exists, tables are true."""

import ast
import dataclasses
import importlib
import re
import shlex
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks import accuracy
from gcnet_jax.__main__ import _parser, main
from gcnet_jax.commands.config_files import load_config, read_flags
from gcnet_jax.data.preprocessing import KeepRatio
from gcnet_jax.models import create_model, list_models, model_entry
from gcnet_jax.models.summary import summarize
from gcnet_jax.porting.convert import variable_shapes
from gcnet_jax.porting.families import LIBRARIES
from gcnet_jax.porting.published_segmenters import PUBLISHED
from gcnet_jax.stored import ModelDescription, write_ported
from gcnet_jax.tasks import TASKS
from gcnet_jax.training import overrides
from gcnet_jax.training.config import all_paths, default_config
from gcnet_jax.training.overrides import override

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / 'gcnet_jax'
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md')))
}


def blocks(page, language):
    return re.findall(rf'```{language}\n(.*?)```', PAGES[page], re.DOTALL)


def commands(page):
    """The command lines of a page, continued ones joined, without comments."""
    lines = ''.join(blocks(page, 'bash')).replace('\\\n', ' ').splitlines()
    parts = (part for line in lines for part in line.partition(' #')[0].split('&&'))
    return [' '.join(part.split()) for part in parts]


def prose(page):
    return re.sub(r'```.*?```', '', PAGES[page], flags=re.DOTALL)


def quoted(page):
    """What stands in backticks outside the blocks of code."""
    return re.findall(r'`([^`\n]+)`', prose(page).replace('\\|', ''))


def table(page, header):
    """The rows of a table, as lists of cells; `header` is the cells of its first line."""
    begin = PAGES[page].index(f'| {header} |\n')
    lines = PAGES[page][begin:].partition('\n\n')[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]


SNIPPETS = {
    f'{page}:{index}': code for page in PAGES for index, code in enumerate(blocks(page, 'python'))
}
COMMANDS = [(page, command) for page in PAGES for command in commands(page)]
# Snippets that show another library at work need it.
MARKS = {'import onnxruntime': pytest.mark.onnx, 'import timm': pytest.mark.torch}


def marked(name):
    return pytest.param(name, marks=[MARKS[text] for text in MARKS if text in SNIPPETS[name]])


def store(directory, name, random_variables):
    """Leaves a network that was not trained where a page's commands leave a trained one."""
    preprocessing = dataclasses.replace(model_entry(name).preprocessing, test_size=8)
    description = ModelDescription(name, {}, preprocessing=preprocessing)
    images = jnp.zeros((1, 64, 64, 3))
    write_ported(directory, description, random_variables(description.build(), images, train=False))


@pytest.mark.parametrize('name', [marked(name) for name in SNIPPETS])
def test_python_runs(name, tmp_path, monkeypatch, random_variables):
    monkeypatch.chdir(tmp_path)
    for command in commands(name.partition(':')[0]):
        if not command.startswith('python -m gcnet_jax export'):
            continue
        arguments = command.split()[3:]
        checkpoint, out = (
            arguments[arguments.index(flag) + 1] for flag in ('--checkpoint', '--out')
        )
        if f"'{out}'" in SNIPPETS[name]:
            network = Path(checkpoint).name
            store(checkpoint, 'gccnn' if network == 'digits' else network, random_variables)
            assert main(arguments) == 0
    exec(compile(SNIPPETS[name], name, 'exec'), {'__name__': 'readme'})


def test_there_are_pages_snippets_and_commands():
    assert len(PAGES) >= 13
    assert len(SNIPPETS) >= 12
    assert len(COMMANDS) >= 30


def check_training(words):
    config, _, _ = read_flags(words, ROOT / 'configs' / 'digits.py')
    assert config.model.name in list_models() or config.training.init_from


def check_command(words):
    """The command takes these arguments, with nothing abbreviated and every setting known."""
    options, settings = _parser().parse_known_args(words)
    flags = [word.partition('=')[0] for word in words if word.startswith('--')]
    known = {*options.parser._option_string_actions}
    assert {flag for flag in flags if not flag.startswith('--config.')} <= known
    if options.command in ('plan', 'train'):
        file, _, variant = options.config.partition(':')
        override(load_config(file, variant), settings)
    else:
        assert not settings


def check_benchmark(name, words):
    if name == 'accuracy':
        flags, settings = accuracy.parse(words)
        assert all(accuracy.runs_of(flags, settings, grid) for grid in flags.grids)
        return
    files = (f'{name}.py', 'common.py', 'settings.py')  # The last two have the flags of several.
    source = ''.join((ROOT / 'benchmarks' / file).read_text() for file in files)
    settings = [word for word in words if word.startswith('--config.')]
    flags = [word for word in words if word.startswith('--') and word not in settings]
    assert all(f"'{flag}'" in source for flag in flags)
    override(default_config(), settings)


def check_pip(words):
    assert words.pop(0) == 'install'
    for word in words:
        extra = re.fullmatch(r'\.\[(\w+)\]', word)
        if extra:
            assert extra[1] in PROJECT['project']['optional-dependencies']
        elif word.endswith('.txt'):
            assert (ROOT / word).is_file()
        else:
            assert word in ('-r', '.')


def check_pytest(words):
    if words:
        marks = [
            mark.partition(':')[0] for mark in PROJECT['tool']['pytest']['ini_options']['markers']
        ]
        assert words[0] == '-m'
        assert words[1] in marks


def description_of(place, workdir=None):
    """What a page's command starts from: a classifier, or a detector."""
    name = Path(place).name
    if name in list_models(task='classification'):
        return ModelDescription(name, {})
    return ModelDescription('gc_mask_rcnn_resnet50_fpn', {}, (), KeepRatio(), task='detection')


@pytest.mark.parametrize(('page', 'command'), COMMANDS)
def test_commands_exist(page, command, monkeypatch):
    monkeypatch.setattr(overrides, 'read_initial_description', description_of)
    words = shlex.split(command.removeprefix('srun '))
    match words:
        case ['python', 'train.py', *_]:
            check_training(words[1:])
        case ['python', '-m', 'gcnet_jax', *arguments]:
            check_command(arguments)
        case ['python', '-m', module, *arguments] if module.startswith('benchmarks.'):
            check_benchmark(module.removeprefix('benchmarks.'), arguments)
        case ['pip', *arguments]:
            check_pip(arguments)
        case ['pytest', *arguments]:
            check_pytest(arguments)
        case _:
            pytest.fail(f'{page}: no check for {command!r}')


def is_setting(path):
    group, _, option = path.partition('.')
    if group == 'model':
        networks = ('resnet50', 'gc_resnet18_d16', 'mask_rcnn_resnet50_fpn')
        if any(hasattr(create_model(name), option.partition('.')[0]) for name in networks):
            return True
    paths = all_paths()
    return path in paths or any(known.startswith(f'{path}.') for known in paths)


@pytest.mark.parametrize('page', PAGES)
def test_settings_in_the_text_exist(page):
    text = ' '.join((*quoted(page), *commands(page)))
    for path in re.findall(r'(?<![\w.])config\.(?!json\b|py\b)([a-z_]+(?:\.[a-z_]+)*)', text):
        assert is_setting(path), path


@pytest.mark.parametrize('page', PAGES)
def test_flags_in_the_text_exist(page):
    subparsers = _parser()._subparsers._group_actions[0].choices.values()
    known = {flag for command in subparsers for flag in command._option_string_actions}
    for flag in re.findall(r'(?<![\w-])--[a-z][a-z-]*(?![\w.-])', ' '.join(quoted(page))):
        assert flag in known or flag == '--config', flag


def resolve(name):
    """Imports as much of a dotted name as is a module, and takes the rest from it."""
    parts = name.split('.')
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module('.'.join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise AssertionError(name)


@pytest.mark.parametrize('page', PAGES)
def test_names_and_files_in_the_text_exist(page):
    rooms = {path.stem for path in PACKAGE.iterdir()}
    for text in quoted(page):
        if re.fullmatch(r'\w+(\.\w+)+', text) and text.partition('.')[0] in rooms:
            resolve(f'gcnet_jax.{text}')
        elif re.fullmatch(r'gcnet_jax(\.\w+)+', text):
            resolve(text)
        elif re.match(r'(gcnet_jax|tests|configs|docs|colab|benchmarks|\.ci)/[\w./]*$', text):
            assert (ROOT / text).exists(), text


def anchors(page):
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r'^#+ (.*)$', re.sub(r'```.*?```', '', page, flags=re.DOTALL), re.M)
    return {re.sub(r'[^\w\- ]', '', text.lower()).replace(' ', '-') for text in headings}


@pytest.mark.parametrize('page', PAGES)
def test_links_lead_somewhere(page):
    links = [link for link in re.findall(r'\]\(([^)]+)\)', prose(page)) if '://' not in link]
    for link in links:
        place, _, anchor = link.partition('#')
        target = (ROOT / page).parent / place if place else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_readme_links_every_page():
    assert {page for page in PAGES if f']({page})' in PAGES['README.md']} == {*PAGES} - {
        'README.md'
    }


@pytest.mark.parametrize('page', [page for page in PAGES if page != 'README.md'])
def test_a_page_begins_with_what_it_covers(page):
    title, first = PAGES[page].split('\n\n')[:2]
    assert title.startswith('# ')
    assert re.fullmatch(r'This page covers [^.]*\.', first)


ROWS = {
    row[0].strip('`'): row[1:]
    for row in table('docs/networks.md', 'name | parameters | multiply-adds | context | what it is')
}
QUICK = ('gc_resnet50', 'gc_resnet20', 'gccnn')


def test_table_lists_every_network():
    assert sorted(ROWS) == list_models(task='classification')
    for name, row in ROWS.items():
        assert row[-1] == model_entry(name).description


DETECTORS = {
    row[0].strip('`'): row[1]
    for row in table('docs/detect.md', 'detector | parameters | box AP | mask AP | published file')
}


def test_table_lists_every_detector():
    assert sorted(DETECTORS) == list_models(task='detection')


@pytest.mark.parametrize(
    'name',
    [
        name if name == 'gc_mask_rcnn_resnet50_fpn' else pytest.param(name, marks=pytest.mark.slow)
        for name in DETECTORS
    ],
)
def test_table_has_the_parameters_of_the_detector(name):
    shapes = variable_shapes(create_model(name))
    trained = [leaf.size for path, leaf in shapes.items() if path.startswith('params/')]
    assert f'{sum(trained):,}' == DETECTORS[name]


SEGMENTERS = {
    row[0].strip('`'): row[1]
    for row in table('docs/segment.md', 'segmenter | parameters | mean IoU | published files')
}


def test_table_lists_every_segmenter():
    assert sorted(SEGMENTERS) == list_models(task='segmentation')
    text = PAGES['docs/segment.md']
    assert all(text.count(f'`{digits}`') == 1 for digits in PUBLISHED)


@pytest.mark.parametrize(
    'name',
    [
        name if name == 'gc_resnet50_d8_voc' else pytest.param(name, marks=pytest.mark.slow)
        for name in SEGMENTERS
    ],
)
def test_table_has_the_parameters_of_the_segmenter(name):
    shapes = variable_shapes(create_model(name))
    trained = [leaf.size for path, leaf in shapes.items() if path.startswith('params/')]
    assert f'{sum(trained):,}' == SEGMENTERS[name]


def test_readme_lists_every_network_once():
    rows = table('README.md', 'networks | context | weights from')
    names = [name for row in rows for name in re.findall(r'`(\w+)`', row[0])]
    assert sorted(names) == list_models(task='classification')
    for row in rows:
        for name in re.findall(r'`(\w+)`', row[0]):
            assert (row[1].partition(',')[0] == 'none') == (not int(ROWS[name][2])), name


def test_readme_lists_every_config():
    rows = table('README.md', 'task | data | output | loss | best checkpoint by | configs')
    names = [name for row in rows for name in re.findall(r'`(\w+)`', row[-1])]
    assert sorted(names) == sorted(path.stem for path in (ROOT / 'configs').glob('*.py'))


def test_readme_lists_every_task():
    rows = table('README.md', 'task | data | output | loss | best checkpoint by | configs')
    best = {row[0].strip('`'): row[4].strip('`') for row in rows}
    assert best == {name: f'eval/{task.best}' for name, task in TASKS.items()}


def test_port_lists_every_library():
    rows = table('docs/port.md', 'family | networks')
    assert sorted(row[0].strip('`') for row in rows) == list(LIBRARIES)


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
    assert f'{summary.total.multiply_adds / 1e9:.2f} G' == giga
    assert len(summary.context) == int(blocks)


def test_architecture_draws_the_floors():
    """The floors are those that tests/test_imports.py enforces."""
    tree = ast.parse((ROOT / 'tests' / 'test_imports.py').read_text())
    floors = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == 'FLOORS'
    )
    (drawing,) = blocks('docs/architecture.md', 'mermaid')
    drawn = [set(label.split(', ')) for label in re.findall(r'\["(.*?)"\]', drawing)]
    assert drawn == [set(rooms) for rooms in reversed(floors)]
    rows = table('docs/architecture.md', 'room | purpose')
    listed = [room for row in rows for room in re.findall(r'`(\w+)`', row[0])]
    assert sorted(listed) == sorted(room for rooms in floors for room in rooms)


def test_requirements_are_read_by_the_package():
    assert PROJECT['project']['dynamic'] == ['dependencies']
    files = PROJECT['tool']['setuptools']['dynamic']['dependencies']['file']
    assert files == ['requirements.txt']
