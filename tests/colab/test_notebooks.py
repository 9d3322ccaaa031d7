"""The notebooks: nothing of a run is kept in them, they parse, and they run from top to bottom."""

import ast
import base64
import json
import os
import re
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / 'colab').glob('*.ipynb'))
# What must be among the outputs of each.
EXPECTED = {
    'train_tpu': ['! NO TPU: jax', 'eval/accuracy', 'train/loss'],
    'inference_and_attention': ['digits/digit_', '%'],
    'port_from_pytorch': ['tensors', '%'],
    'detect_and_segment': ['china.jpg: ', 'AP50', 'mean IoU', 'square'],
}
PICTURES = {
    'train_tpu': 2,
    'inference_and_attention': 6,
    'port_from_pytorch': 1,
    'detect_and_segment': 7,
}


def read(path):
    return json.loads(path.read_text())


def code_of(path):
    cells = [cell for cell in read(path)['cells'] if cell['cell_type'] == 'code']
    return [''.join(cell['source']) for cell in cells]


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return request.param


def test_there_are_four():
    assert {path.stem for path in NOTEBOOKS} == set(EXPECTED)


def test_outputs_are_stripped(notebook):
    content = read(notebook)
    assert (content['nbformat'], content['nbformat_minor']) == (4, 5)
    assert 'signature' not in content['metadata']
    ids = [cell['id'] for cell in content['cells']]
    assert len(set(ids)) == len(ids)
    for cell in content['cells']:
        assert cell['metadata'] == {}
        if cell['cell_type'] == 'code':
            assert cell['outputs'] == []
            assert cell['execution_count'] is None


def test_every_cell_is_plain_python(notebook):
    for code in code_of(notebook):
        ast.parse(code)  # No magics, no shell: what runs here runs anywhere.


def test_it_defines_nothing_and_touches_no_package(notebook):
    kinds = (ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.While)
    for number, code in enumerate(code_of(notebook)):
        assert not any(isinstance(node, kinds) for node in ast.walk(ast.parse(code)))
        # The first cell fetches the package, into a directory of its own.
        assert number == 0 or 'pip' not in re.findall(r'\w+', code)


def set_up(notebook, source):
    """Runs the first cell with a source in its form."""
    code = code_of(notebook)[0].replace("source = ''", f'source = {source!r}', 1)
    names = {}
    exec(compile(code, notebook.name, 'exec'), names)
    return names


@pytest.fixture
def pretend_pip(monkeypatch, tmp_path):
    """Takes the place of pip, and of what the notebook imports; returns what was installed."""
    installed = []

    def run(command, check):
        installed.append(command[-1])
        place = Path(command[command.index('--target') + 1])
        if 'wrong' not in command[-1]:
            (place / 'gcnet_jax' / 'colab').mkdir(parents=True, exist_ok=True)
        assert '--no-deps' in command
        return types.SimpleNamespace(returncode=int('wrong' in command[-1]))

    helper = types.SimpleNamespace(prepare=lambda place, expect_tpu: place)
    monkeypatch.setitem(sys.modules, 'notebook_setup', helper)
    monkeypatch.setattr(subprocess, 'run', run)
    monkeypatch.setattr(sys, 'path', list(sys.path))
    monkeypatch.delenv('GCNET_JAX_SOURCE', raising=False)
    monkeypatch.chdir(tmp_path)
    return installed


@pytest.mark.parametrize(
    ('source', 'installed'),
    [
        ('https://host/owner/name', 'git+https://host/owner/name'),
        ('https://host/owner/name.git', 'git+https://host/owner/name.git'),
        ('git+ssh://git@host/name.git@main', 'git+ssh://git@host/name.git@main'),
        ('https://host/name.zip', 'https://host/name.zip'),
        ('gcnet-jax==0.1', 'gcnet-jax==0.1'),
        ('uploaded/gcnet.zip', 'uploaded/gcnet.zip'),
    ],
)
def test_the_first_cell_fetches_the_package(notebook, pretend_pip, source, installed, tmp_path):
    place = str(tmp_path / 'gcnet_jax_source' / 'gcnet_jax')
    assert set_up(notebook, source)['setup'] == place
    assert pretend_pip == [installed]
    assert sys.path[0] == f'{place}/colab'


def test_a_copy_is_used_as_it_lies(notebook, pretend_pip, tmp_path, monkeypatch):
    assert set_up(notebook, str(ROOT))['setup'] == str(ROOT)
    (tmp_path / 'copy' / 'colab').mkdir(parents=True)
    (tmp_path / 'copy' / 'colab' / 'notebook_setup.py').touch()
    assert set_up(notebook, '')['setup'] == 'copy/'
    assert pretend_pip == []


def test_a_zip_on_drive_is_found_once_drive_is_there(notebook, pretend_pip, monkeypatch):
    mounted = []
    drive = types.SimpleNamespace(mount=mounted.append)
    monkeypatch.setitem(sys.modules, 'google.colab', types.SimpleNamespace(drive=drive))
    set_up(notebook, '/content/drive/MyDrive/gcnet.zip')
    assert mounted == ['/content/drive']
    assert pretend_pip == ['/content/drive/MyDrive/gcnet.zip']


def test_without_a_source_the_first_cell_says_what_to_do(notebook, pretend_pip):
    with pytest.raises(FileNotFoundError, match='name in `source` where it comes from'):
        set_up(notebook, '')
    set_up(notebook, 'gcnet-jax')  # What an earlier try has left is not used.
    with pytest.raises(FileNotFoundError, match=r"no gcnet_jax from 'wrong'.*Check that address"):
        set_up(notebook, 'wrong')


def test_the_default_source_is_the_projects_address(notebook):
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    address = project.get('urls', {}).get('Repository', '')
    assert f'source = {address!r}  # @param' in code_of(notebook)[0]


def test_what_it_imports_from_the_package_exists(notebook):
    for code in code_of(notebook):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith('gcnet_jax'):
                module = __import__(node.module, fromlist=['_'])
                for name in node.names:
                    assert getattr(module, name.name) is not None


def test_every_form_field_names_its_kind(notebook):
    kinds = {'string': str, 'integer': int, 'number': (int, float), 'boolean': bool}
    for code in code_of(notebook):
        for line in code.splitlines():
            if '@param' not in line:
                continue
            value, form = re.fullmatch(r'\w+ = (.+)  # @param (.+)', line).groups()
            choices, _, _ = form.partition(' {"allow-input": true}')
            value, choices = ast.literal_eval(value), json.loads(choices)
            if isinstance(choices, list):
                assert value in choices, line
            else:
                assert isinstance(value, kinds[choices['type']]), line


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """A kernel of this very Python; another's would be found otherwise."""
    directory = tmp_path / 'jupyter' / 'kernels' / 'python3'
    directory.mkdir(parents=True)
    arguments = [sys.executable, '-m', 'ipykernel_launcher', '-f', '{connection_file}']
    specification = {'argv': arguments, 'display_name': 'Python 3', 'language': 'python'}
    (directory / 'kernel.json').write_text(json.dumps(specification))
    monkeypatch.setenv('JUPYTER_PATH', str(tmp_path / 'jupyter'))
    monkeypatch.setenv('GCNET_JAX_SMOKE', '1')
    monkeypatch.setenv('GCNET_JAX_SOURCE', str(ROOT))
    monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'sets'))
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
    monkeypatch.delenv('XLA_FLAGS')  # The tests' eight devices.
    monkeypatch.delenv('PYTHONPATH', raising=False)


@pytest.mark.notebook
@pytest.mark.filterwarnings('default')  # Those of Jupyter's libraries.
def test_it_runs_from_top_to_bottom(notebook, kernel, tmp_path):
    import nbclient
    import nbformat

    content = nbformat.read(notebook, as_version=4)
    nbformat.validate(content)
    directory = tmp_path / 'work'
    directory.mkdir()
    nbclient.NotebookClient(
        content, timeout=1800, resources={'metadata': {'path': str(directory)}}
    ).execute()
    outputs = [output for cell in content.cells for output in cell.get('outputs', ())]
    text = ''.join(output.get('text', '') for output in outputs)
    for expected in EXPECTED[notebook.stem]:
        assert expected in text, text
    pictures = [output['data'].get('image/png') for output in outputs if 'data' in output]
    pictures = [base64.b64decode(data) for data in pictures if data]
    assert len(pictures) == PICTURES[notebook.stem]
    assert all(data.startswith(b'\x89PNG') for data in pictures)
    assert notebook.read_bytes() == (ROOT / 'colab' / notebook.name).read_bytes()
    assert os.listdir(directory)
