"""What a start imports: libraries that are heavy to import wait until something needs them."""

import subprocess
import sys

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
        ('import gcnet_jax.inference.predictor', ('orbax',)),
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
