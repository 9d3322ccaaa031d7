"""Crafted and damaged files, opened in a process of its own: a crash ends only that."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.porting.crafted import FORMS, floats, legacy, state_dict, tensor, zipped
from tests.porting.hostile import programs

# Opens every file of a directory and reads all its tensors, within 10 s and 1 GB each.
PROGRAM = """
import collections, json, resource, signal, sys, time, traceback
from pathlib import Path
from gcnet_jax.errors import CheckpointError
from gcnet_jax.porting.files import read_checkpoint

def too_long(*_):
    raise TimeoutError('10 s')

signal.signal(signal.SIGALRM, too_long)
status = Path('/proc/self/statm')
if status.exists():
    used = int(status.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
results = {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    signal.alarm(10)
    try:
        tensors = read_checkpoint(path).tensors
        for name in tensors:
            tensors[name]
        result = 'read'
    except CheckpointError as error:
        result = f'refused: {error}'
        assert '\\n' not in result and len(result) < 1500, result
    except BaseException:
        result = f'raised: {traceback.format_exc()}'
    signal.alarm(0)
    results[path.name] = result
print(json.dumps(results))
"""


def open_all(directory: Path) -> dict[str, str]:
    """What became of each file: 'read', 'refused: WHY' or 'raised: TRACEBACK'."""
    finished = subprocess.run(
        [sys.executable, '-c', PROGRAM, str(directory)],
        env=os.environ | {'PYTHONPATH': str(Path(__file__).parents[2])},
        cwd=directory.parent,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    return json.loads(finished.stdout)


def test_crafted_pickles_are_refused_or_harmless(tmp_path):
    directory = tmp_path / 'files'
    directory.mkdir()
    expected = {}
    for form, write in FORMS.items():
        for number, (name, (data, refused)) in enumerate(programs().items()):
            if len(data) > 2_000_000 and form == 'legacy':
                continue  # it takes seconds
            file = f'{number:03}_{form}.pth'
            (directory / file).write_bytes(write(data, {'0': floats(1, 2)}))
            expected[file] = (f'{name}, {form}', 'refused' if refused else 'read')
    results = open_all(directory)
    wrong = {
        expected[file][0]: result
        for file, result in results.items()
        if not result.startswith(expected[file][1])
    }
    assert len(results) == len(expected) > 120
    assert not wrong
    assert [path.name for path in tmp_path.iterdir()] == ['files']  # no code made a file


def mutate(content: bytes, generator: np.random.Generator) -> bytes:
    """Changes a few bytes, cuts, repeats or removes a part, or writes an extreme number."""
    data = bytearray(content)
    start = int(generator.integers(len(data)))
    length = int(generator.integers(1, 40))
    kind = int(generator.integers(6))
    if kind == 0:
        for place in generator.integers(len(data), size=int(generator.integers(1, 6))):
            data[place] ^= 1 << int(generator.integers(8))
    elif kind == 1:
        data[start : start + length] = generator.bytes(length)
    elif kind == 2:
        del data[start : start + length]
    elif kind == 3:
        data[start:start] = data[start : start + length] * int(generator.integers(1, 30))
    elif kind == 4:
        data[start : start + 4] = [b'\xff\xff\xff\xff', b'\xff\xff\xff\x7f', b'\0' * 4][length % 3]
    else:
        del data[start:]
    return bytes(data)


def seeds(kind: str) -> list[bytes]:
    """Honest and crafted files to start from."""
    if kind == 'safetensors':
        from safetensors.numpy import save

        arrays = {
            'a.weight': np.arange(6, dtype=np.float32).reshape(2, 3),
            'b.weight': np.arange(4, dtype=np.float16),
            'c.num_batches_tracked': np.array(3),
        }
        return [save(arrays, {'format': 'pt'}), save({'w': np.zeros(2, np.float32)})]
    small = [data for data, _ in programs().values() if len(data) < 5_000]
    data = state_dict({'epoch': 3, 'meta': {'config': 'text' * 20}}, b=tensor('1', (2, 2)))
    storages = {'0': floats(1, 2), '1': floats(1, 2, 3, 4)}
    form = FORMS[kind]
    return [form(data, storages)] * 20 + [form(data, {'0': floats(1, 2)}) for data in small]


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['zip', 'legacy', 'safetensors'])
def test_changed_files_end_in_the_packages_own_errors(tmp_path, kind):
    """A thousand files each; changed bytes are restored to a valid checksum half of the time."""
    generator = np.random.default_rng(1)
    directory = tmp_path / 'files'
    directory.mkdir()
    start = seeds(kind)
    for number in range(1_000):
        content = start[int(generator.integers(len(start)))]
        if kind == 'zip' and number % 2:
            data = state_dict({'epoch': 3, 'meta': {'config': 'text' * 20}})
            content = zipped(mutate(data, generator), {'0': floats(1, 2)})
        else:
            content = mutate(content, generator)
        (directory / f'{number:04}.pth').write_bytes(content)
    results = open_all(directory)
    counts = {
        kind: sum(result.startswith(kind) for result in results.values())
        for kind in ('read', 'refused', 'raised')
    }
    print(kind, counts)
    raised = [result for result in results.values() if result.startswith('raised')]
    assert not raised, raised[:2]
    assert len(results) == 1_000
    assert counts['refused'] > 300
    assert [path.name for path in tmp_path.iterdir()] == ['files']


def test_the_honest_file_that_the_crafted_ones_start_from_is_read(tmp_path):
    from gcnet_jax.porting.files import read_checkpoint

    for form in (zipped, legacy):
        (tmp_path / 'a.pth').write_bytes(form(state_dict(), {'0': floats(1, 2)}))
        np.testing.assert_array_equal(read_checkpoint(tmp_path / 'a.pth').tensors['w'], [1, 2])
