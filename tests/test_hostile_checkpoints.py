"""A thousand damaged checkpoints, read in a process of its own within time and memory."""

import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from gcnet_jax.stored import ModelDescription, write_ported

FILES = 1000
# Damages one copy after another and loads it, within 10 s and 1 GB each. What cannot be read must
# be a CheckpointError of one printable line; what can must build and be finite.
PROGRAM = """
import json, os, resource, shutil, signal, sys, traceback
from pathlib import Path
import jax, numpy as np
from gcnet_jax.errors import CheckpointError
from gcnet_jax.inference.classifier import Classifier
from gcnet_jax.stored import find_checkpoint, load_variables

VALUES = (None, True, -1, 0, 10**12, 1e308, float('nan'), '', 'x' * 20_000, [], [[]], {}, {'a': 1})

def replace_json(path, rng):
    # One value at any depth, or text that is no JSON.
    if rng.random() < 0.2:
        path.write_text('[' * int(rng.integers(1, 200_000)))
        return
    value = json.loads(path.read_text())
    place = value
    while isinstance(place, (dict, list)) and place:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = keys[rng.integers(len(keys))]
        inner = place[key]
        if not isinstance(inner, (dict, list)) or not inner or rng.random() < 0.3:
            place[key] = VALUES[rng.integers(len(VALUES))]
            break
        place = inner
    path.write_text(json.dumps(value))

def damage(path, rng):
    kind = rng.integers(8)
    data = bytearray(path.read_bytes())
    if kind <= 2:
        try:
            return replace_json(path, rng)
        except ValueError:
            pass
    if kind == 3 and data:
        path.write_bytes(data[: rng.integers(len(data))])
    elif kind == 4:
        path.unlink()
    elif kind == 5:
        path.unlink()
        (os.mkfifo, os.mkdir, lambda p: os.symlink('/dev/zero', p))[rng.integers(3)](path)
    elif kind == 6:
        with path.open('wb') as file:
            file.truncate(2**40)
    elif data:
        for _ in range(int(rng.integers(1, 20))):
            data[rng.integers(len(data))] = rng.integers(256)
        path.write_bytes(data)

def too_long(*_):
    raise TimeoutError('10 s')

signal.signal(signal.SIGALRM, too_long)
whole, place = Path(sys.argv[1]), Path(sys.argv[2])
jax.device_put(0)
status = Path('/proc/self/statm')
if status.exists():
    used = int(status.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
results = []
for seed in range(int(sys.argv[3])):
    rng = np.random.default_rng(seed)
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(whole, place)
    files = sorted(path for path in place.rglob('*') if path.is_file())
    # Half of the time one of the descriptions, which are small beside the arrays.
    if rng.random() < 0.5:
        files = [path for path in files if path.name == 'metadata' or path.name[0] == '_']
    path = files[rng.integers(len(files))]
    damage(path, rng)
    signal.alarm(10)
    try:
        description, variables = load_variables(find_checkpoint(place, 'best'))
        Classifier(description, variables, fold=False)
        result = 'read'
    except CheckpointError as error:
        result = 'refused' if str(error).isprintable() else f'not one line: {error!r}'
    except BaseException:
        result = f'raised at seed {seed}, {path.relative_to(place)}: {traceback.format_exc()}'
    signal.alarm(0)
    results.append(result)
print(json.dumps(results))
"""


@pytest.mark.slow
def test_a_thousand_damaged_checkpoints(tmp_path, random_variables):
    options = {'num_classes': 3, 'widths': [4], 'stage_sizes': [1], 'context': None}
    description = ModelDescription('gccnn', options, ('a', 'b', 'c'))
    images = jnp.zeros((1, 8, 8, 3))
    variables = random_variables(description.build(), images, train=False)
    write_ported(tmp_path / 'whole', description, variables)
    finished = subprocess.run(
        [sys.executable, '-c', PROGRAM, tmp_path / 'whole', tmp_path / 'copy', str(FILES)],
        env=os.environ | {'PYTHONPATH': str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    results = json.loads(finished.stdout)
    wrong = [result for result in results if result not in ('read', 'refused')]
    print(collections.Counter(results))
    assert not wrong, '\n\n'.join(wrong[:3])
    assert results.count('refused') > FILES / 3
