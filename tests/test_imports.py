"""What a start imports: libraries that are heavy to import wait until something needs them."""

import ast
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = (
    'IPython',
    'beartype',
    'grain',
    'huggingface_hub',
    'matplotlib',
    'optax',
    'orbax',
    'pandas',
    'scipy',
    'sklearn',
    'tensorboardX',
    'tensorflow_datasets',
    'torch',
)


@pytest.mark.parametrize(
    ('statement', 'needed'),
    [
        ('import gcnet_jax, gcnet_jax.__main__', ()),
        ('from gcnet_jax import GlobalContext, create_model', ()),
        ('import gcnet_jax.inference.classifier', ('orbax',)),
        ('import gcnet_jax.training.loop', ('grain', 'optax', 'orbax', 'tensorflow_datasets')),
    ],
)
def test_what_is_heavy_is_imported_where_it_is_needed(statement, needed):
    code = f'import sys; {statement}; print([name for name in {HEAVY} if name in sys.modules])'
    run = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True)
    assert set(eval(run.stdout)) <= set(needed)


def test_help_needs_no_jax():
    code = 'import sys, gcnet_jax.__main__; assert "jax" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], check=True)


# Imports run downward: a room imports nothing of a floor above, nor of a room beside it.
FLOORS = (
    ('errors', 'ranges'),
    ('files', 'private_directories'),
    ('compilation_cache', 'metrics_file', 'ops', 'context', 'data'),
    ('models',),
    ('tasks',),
    ('stored',),
    ('inference', 'porting', 'training'),
    ('analysis', 'planning'),
    ('commands',),
)
# Each with the only room beside it, or above, that it may import.
EXCEPTIONS = {('ops', 'context')}


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f'{node.module}.{alias.name}' for alias in node.names]
        for name in names:
            package, _, rest = name.partition('.')
            if package == 'gcnet_jax' and rest:
                yield rest.partition('.')[0]


def test_imports_run_downward():
    height = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    package = Path(__file__).parents[1] / 'gcnet_jax'
    wrong = []
    for path in itertools.chain(package.glob('*.py'), package.glob('*/**/*.py')):
        room = path.relative_to(package).parts[0].removesuffix('.py')
        if room in ('__init__', '__main__'):
            continue
        for other in imported_rooms(path):
            allowed = other == room or height[other] < height[room]
            if not allowed and (room, other) not in EXCEPTIONS:
                wrong.append(f'{path.relative_to(package)} imports {other}')
    assert not wrong
