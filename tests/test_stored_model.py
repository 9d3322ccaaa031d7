import asyncio
import dataclasses
import gc
import json
import sys
import time

import jax
import numpy as np
import pytest

from gcnet_jax.errors import CheckpointError
from gcnet_jax.models.registry import Preprocessing
from gcnet_jax.stored_model import (
    ModelDescription,
    checksums,
    find_checkpoint,
    first_error_only,
    load_variables,
    read_model_description,
    write_ported,
)
from gcnet_jax.training.mesh import make_mesh, state_shardings

DESCRIPTION = ModelDescription(
    'gccnn',
    {'num_classes': 3, 'widths': [4], 'stage_sizes': [1], 'context': None, 'dtype': 'float32'},
    ('a', 'b', 'c'),
    Preprocessing(mean=(0.1, 0.2, 0.3), test_size=8),
    'a test',
)


@pytest.fixture
def ported(tmp_path, random_variables):
    variables = random_variables(
        DESCRIPTION.build(), np.zeros((1, 8, 8, 3), np.float32), train=False
    )
    write_ported(tmp_path / 'ported', DESCRIPTION, variables)
    return tmp_path / 'ported', variables


def test_a_ported_network_comes_back(ported):
    directory, variables = ported
    for place in (directory, directory / 'checkpoints', directory / 'checkpoints' / '0'):
        description, loaded = load_variables(place)
        assert description == DESCRIPTION == read_model_description(place)
        assert jax.tree.structure(loaded) == jax.tree.structure(variables)
        jax.tree.map(np.testing.assert_array_equal, loaded, variables)
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(loaded))


def test_nothing_is_written_over(ported):
    directory, variables = ported
    with pytest.raises(CheckpointError, match='not empty'):
        write_ported(directory, DESCRIPTION, variables)


def test_a_directory_without_a_checkpoint_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match='no checkpoint in it'):
        load_variables(tmp_path)
    with pytest.raises(CheckpointError, match='no such directory'):
        load_variables(tmp_path / 'nowhere')


def test_the_best_is_that_of_the_highest_accuracy(tmp_path):
    for step, accuracy in [(1, 0.5), (2, 0.9), (3, 0.7), (4, None)]:
        place = tmp_path / 'checkpoints' / str(step) / 'metrics'
        place.mkdir(parents=True)
        metrics = {} if accuracy is None else {'eval/accuracy': accuracy}
        (place / 'metrics').write_text(json.dumps(metrics))
    assert find_checkpoint(tmp_path).name == '4'
    assert find_checkpoint(tmp_path, 'best').name == '2'


def test_a_newer_format_is_refused(ported):
    path = ported[0] / 'checkpoints' / '0' / 'description' / 'metadata'
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {'format_version': 2}))
    with pytest.raises(CheckpointError, match='format version 2; this package reads 1'):
        load_variables(ported[0])
    del fields['label_names']
    path.write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match='incomplete'):
        load_variables(ported[0])


def test_damage_is_one_line(ported):
    for path in (ported[0] / 'checkpoints' / '0' / 'variables').rglob('d/*'):
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match='cannot be read') as caught:
        load_variables(ported[0])
    assert '\n' not in str(caught.value)


def test_nothing_else_is_told_of_damage(tmp_path, random_variables, monkeypatch, caplog):
    """Orbax reads all arrays at once; the errors of those that it left behind came out later."""
    description = ModelDescription('gc_resnet20', {'num_classes': 3})
    images = np.zeros((1, 32, 32, 3), np.float32)
    variables = random_variables(description.build(), images, train=False)
    write_ported(tmp_path / 'ported', description, variables)
    for path in (tmp_path / 'ported' / 'checkpoints' / '0' / 'variables').rglob('d/*'):
        path.write_bytes(path.read_bytes()[:-20])
    told = []
    monkeypatch.setattr(sys, 'unraisablehook', told.append)
    for _ in range(40):
        with pytest.raises(CheckpointError, match='cannot be read'):
            load_variables(tmp_path / 'ported')
    time.sleep(0.5)  # TensorStore's threads are not ours to wait for.
    gc.collect()
    assert told == []
    assert caplog.records == []


def test_reads_that_were_left_behind_end_in_silence(monkeypatch):
    """As Orbax reads: all at once, and each turns what ends it into an error of its own."""

    async def slow():
        try:
            await asyncio.sleep(0.05)
        except BaseException as error:
            raise ValueError from error
        raise ValueError

    async def wrong():
        raise KeyError('the first')

    async def all_at_once():
        await asyncio.gather(wrong(), slow(), slow())

    told = []
    monkeypatch.setattr(sys, 'unraisablehook', told.append)
    with first_error_only():
        loop = asyncio.new_event_loop()
        with pytest.raises(KeyError, match='the first'):
            loop.run_until_complete(all_at_once())
        loop.close()
    gc.collect()
    assert told == []


@pytest.mark.parametrize('shape', [(8, 1, 1), (1, 8, 1), (2, 4, 1)])
def test_checksums_do_not_depend_on_the_mesh(shape):
    rng = np.random.default_rng(0)
    tree = {
        'a': rng.normal(size=(3, 8, 16)).astype(np.float32),
        'b': rng.normal(size=(64,)).astype(jax.numpy.bfloat16),
        'c': np.asarray(7, np.int32),
    }
    placed = jax.device_put(tree, state_shardings(tree, make_mesh(*shape), smallest=2))
    assert checksums(placed) == checksums(tree)


def test_checksums_see_one_bit_and_two_swapped_values():
    values = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    flipped, swapped = values.copy(), values.copy()
    flipped.view(np.uint32)[3, 2] ^= 1
    swapped[1, 2], swapped[4, 0] = values[4, 0], values[1, 2]
    assert len({checksums({'x': x})["['x']"] for x in (values, flipped, swapped)}) == 3


def test_descriptions_survive_json():
    again = ModelDescription.from_json(json.loads(json.dumps(DESCRIPTION.to_json())), 'here')
    assert again == DESCRIPTION
    assert dataclasses.asdict(again.preprocessing) == dataclasses.asdict(DESCRIPTION.preprocessing)
