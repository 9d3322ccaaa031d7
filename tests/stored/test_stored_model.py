import asyncio
import copy
import dataclasses
import gc
import itertools
import json
import math
import os
import re
import sys
import time

import jax
import numpy as np
import pytest

from gcnet_jax.data.preprocessing import Preprocessing
from gcnet_jax.errors import CheckpointError, ConfigError
from gcnet_jax.stored import (
    ModelDescription,
    find_checkpoint,
    load_variables,
    places,
    read_model_description,
    step_directories,
    write_ported,
)
from gcnet_jax.stored.checks import check_files, check_size
from gcnet_jax.stored.checksums import checksums
from gcnet_jax.stored.variables import first_error_only
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


def with_accuracies(root, accuracies):
    """Directories of checkpoints, each with the text of its accuracy or without an evaluation."""
    for step, text in accuracies.items():
        place = root / 'checkpoints' / str(step) / 'metrics'
        place.mkdir(parents=True)
        if text is not None:
            (place / 'metrics').write_text(f'{{"eval/accuracy": {text}}}')
    return root


@pytest.mark.parametrize(
    ('accuracies', 'best'),
    [
        ({9: '0.5', 10: '0.5', 11: '0.4'}, 10),  # The newest of those alike.
        ({9: None, 10: None}, 10),
        ({9: '0', 10: None}, 9),  # Any evaluation comes before none.
        ({9: '0', 10: 'NaN', 11: 'Infinity', 12: '"1"', 13: 'null', 14: '{'}, 9),
        ({9: '-0.5', 10: None}, 9),
    ],
)
def test_the_best_is_a_number_and_else_the_newest(tmp_path, accuracies, best):
    assert find_checkpoint(with_accuracies(tmp_path, accuracies), 'best').name == str(best)


def test_checkpoints_are_found_by_their_number(tmp_path):
    names = ['9', '10', '2', '9' * 18, '1' * 19, '5.orbax-checkpoint-tmp', 'x1', '-3', 'variables_']
    for name in names:
        (tmp_path / 'checkpoints' / name).mkdir(parents=True)
    for place in (tmp_path, str(tmp_path / 'checkpoints')):
        found = step_directories(place)
        assert list(found) == [2, 9, 10, 10**18 - 1]
        assert found[9] == tmp_path / 'checkpoints' / '9'
    assert step_directories(tmp_path / 'nowhere') == {}


def test_in_a_bucket_only_what_is_written_completely_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(places, 'is_bucket', lambda place: True)
    for step in (3, 5):
        (tmp_path / 'checkpoints' / str(step)).mkdir(parents=True)
    (tmp_path / 'checkpoints' / '3' / 'commit_success.txt').touch()
    assert list(step_directories(tmp_path)) == [3]


@pytest.mark.parametrize(
    ('field', 'long'),
    [('source', lambda length: 'x' * length), ('label_names', lambda length: ('a', 'x' * length))],
)
def test_texts_have_a_longest_length(field, long):
    dataclasses.replace(DESCRIPTION, **{field: long(10_000)})
    with pytest.raises(ConfigError, match=f'{field} of a model description cannot be') as caught:
        dataclasses.replace(DESCRIPTION, **{field: long(10_001)})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    'fields',
    [
        {'name': None},
        {'options': [1]},
        {'options': {1: 2}},
        {'preprocessing': {}},
        {'source': None},
    ],
)
def test_a_description_has_fields_of_the_right_kinds(fields):
    ((field, value),) = fields.items()
    expected = re.escape(f'{field} of a model description cannot be {value!r}')
    for also_wrong in ({}, {'source': 3} if field != 'source' else {}):
        with pytest.raises(ConfigError, match=f'^{expected}$'):
            dataclasses.replace(DESCRIPTION, **fields | also_wrong)


def test_what_is_ported_goes_to_a_new_or_empty_directory(tmp_path):
    (tmp_path / 'file').touch()
    (tmp_path / 'empty').mkdir()
    variables = {'params': {'kernel': np.ones(2, np.float32)}}
    with pytest.raises(CheckpointError, match='file exists and is not empty'):
        write_ported(tmp_path / 'file', DESCRIPTION, variables)
    place = write_ported(tmp_path / 'empty', DESCRIPTION, variables)
    assert place == tmp_path / 'empty' / 'checkpoints' / '0'
    assert load_variables(place)[1]['batch_stats'] == {}


def test_a_newer_format_is_refused(ported):
    path = ported[0] / 'checkpoints' / '0' / 'description' / 'metadata'
    fields = json.loads(path.read_text())
    assert fields['format_version'] == 2
    path.write_text(json.dumps(fields | {'format_version': 3}))
    with pytest.raises(CheckpointError, match='format version 3; this package reads 1 and 2'):
        load_variables(ported[0])
    del fields['label_names']
    path.write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match='incomplete'):
        load_variables(ported[0])


def leaves_of(value, path=()):
    """The path of everything in a JSON value that can be replaced."""
    yield path
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from leaves_of(item, (*path, key))


REPLACEMENTS = [
    *(None, True, 0, -1, 10**9, 10**400, 0.5, math.nan, math.inf, -math.inf, '', 'x', '\x1b[2J\n'),
    *([], [0], [-1, 2], [1e9] * 3, ['a'] * 3, [[]], {}, {'a': 1}, [10**6], [10**9, 4]),
]


def changed(fields, path, value):
    """A copy with one thing replaced or removed."""
    if not path:
        return value
    again = copy.copy(fields)
    if len(path) == 1 and value == 'REMOVED':
        del again[path[0]]
    elif len(path) == 1:
        again[path[0]] = value
    else:
        again[path[0]] = changed(fields[path[0]], path[1:], value)
    return again


def test_a_description_with_any_value_replaced_is_refused_or_means_something():
    """Never another error than the package's own, in one printable line."""
    whole = DESCRIPTION.to_json()
    whole['options'] |= {
        'context': {'stages': [1], 'position': 'after_conv2', 'ratio': 0.5, 'fusion': 'scale'},
        'norm': {'kind': 'batch', 'group_size': 4},
        'dropout_rate': 0.1,
    }
    messages = []
    for path, value in itertools.product(list(leaves_of(whole)), (*REPLACEMENTS, 'REMOVED')):
        if not path and value == 'REMOVED':
            continue
        try:
            description = ModelDescription.from_json(changed(whole, path, value), 'here')
        except CheckpointError as error:
            messages.append(str(error))
        else:
            preprocessing = description.preprocessing
            assert np.isfinite([*preprocessing.mean, *preprocessing.std]).all()
            assert min(preprocessing.std) > 0
            assert 0 < preprocessing.crop_fraction <= 1
            description.build()
    assert len(messages) > 500
    assert all(message.isprintable() and message.startswith('here: ') for message in messages)


@pytest.mark.parametrize(
    ('path', 'value', 'message'),
    [
        (('preprocessing', 'std', 1), 0, 'std must be three positive numbers'),
        (('preprocessing', 'std'), [math.nan] * 3, 'std must be three positive numbers'),
        (('preprocessing', 'mean'), [0.5, 0.5], 'mean must be three numbers'),
        (('preprocessing', 'mean', 0), 123.7, 'on the scale where 255 is 1'),
        (('preprocessing', 'crop_fraction'), 0, r'crop_fraction must be in \[0.05, 1\], got 0'),
        (('preprocessing', 'test_size'), 10**9, 'test_size must be a whole number from 1 to 4096'),
        (
            ('preprocessing', 'train_size'),
            [8, 0],
            r'or a pair of them, height and width, got \(8',
        ),
        (('preprocessing', 'train_size'), [8, 8, 3], r'got \(8, 8, 3\)'),
        (('preprocessing', 'train_size'), [8, True], r'got \(8, True\)'),
        (('task',), 'Classification', 'its task is Classification; this package knows'),
        (('task',), 'x' * 41, 'its task is xxxx'),
        (('task',), None, 'task of a model description cannot be None'),
        (('task',), 'REMOVED', 'missing or unknown task'),
        (('preprocessing', 'interpolation'), 'bicubik', "did you mean 'bicubic'"),
        (('options', 'widths'), [], 'widths must be 1 to 16 numbers'),
        (('options', 'stage_sizes'), [10**6], 'at most 1,000 blocks in all, got'),
        (('options', 'num_classes'), '3', "num_classes must be a whole number, got '3'"),
        (('options', 'dropout_rat'), 0.1, "did you mean 'dropout_rate'"),
        (('label_names', 0), 7, 'label_names of a model description cannot be'),
        (('label_names',), 'abc', 'label_names of a model description cannot be'),
        (('name',), 'gccn', "unknown model 'gccn'; did you mean 'gccnn'"),
        (('source',), 'REMOVED', 'missing or unknown source'),
    ],
)
def test_a_changed_description_says_what_is_wrong(path, value, message):
    with pytest.raises(CheckpointError, match=message):
        ModelDescription.from_json(changed(DESCRIPTION.to_json(), path, value), 'here')


@pytest.mark.parametrize('text', ['[]', '3', '"x"', 'null', '{}', '[' * 10**5, '{"name": NaN}'])
def test_an_item_that_is_no_json_object_is_refused(ported, text):
    for item in ('description', 'checksums'):
        path = ported[0] / 'checkpoints' / '0' / item / 'metadata'
        before = path.read_text()
        path.write_text(text)
        with pytest.raises(CheckpointError) as caught:
            load_variables(ported[0])
        assert str(caught.value).isprintable()
        path.write_text(before)


def test_a_change_that_means_something_is_seen_by_the_checksum(ported):
    path = ported[0] / 'checkpoints' / '0' / 'description' / 'metadata'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'label_names': ['b', 'a', 'c']}))
    with pytest.raises(CheckpointError, match='damaged: the description differs'):
        load_variables(ported[0])


def test_a_checkpoint_without_a_checksum_of_its_description_is_read(ported):
    path = ported[0] / 'checkpoints' / '0' / 'checksums' / 'metadata'
    path.write_text(json.dumps({'variables': json.loads(path.read_text())['variables']}))
    assert load_variables(ported[0])[0] == DESCRIPTION


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, random_variables):
    model = DESCRIPTION.build()
    variables = random_variables(model, np.zeros((1, 8, 8, 3), np.float32), train=False)
    variables['params']['stage1_0']['conv1']['kernel'][0, 0, 0, 1:3] = np.nan
    variables['params']['classifier']['bias'][0] = np.inf
    write_ported(tmp_path / 'nan', DESCRIPTION, variables)
    with pytest.raises(CheckpointError, match=r'2 of its arrays .* the first: params/classifier'):
        load_variables(tmp_path / 'nan')


def test_negative_variances_are_refused(tmp_path, random_variables):
    model = DESCRIPTION.build()
    variables = random_variables(model, np.zeros((1, 8, 8, 3), np.float32), train=False)
    variables['batch_stats']['stage1_0']['norm1']['var'][1] *= -1
    write_ported(tmp_path / 'negative', DESCRIPTION, variables)
    with pytest.raises(CheckpointError, match='norm1/var has negative variances'):
        load_variables(tmp_path / 'negative')


@pytest.mark.parametrize('place', ['variables', 'description/metadata', 'variables/d'])
def test_a_fifo_in_the_place_of_a_file_is_not_waited_for(ported, place):
    path = ported[0] / 'checkpoints' / '0' / place
    if path.is_dir():
        path /= 'fifo'
    else:
        path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match=r'not a regular file|neither a file nor'):
        load_variables(ported[0])


def test_arrays_that_the_files_cannot_hold_are_refused(ported):
    """Missing chunks are zeros to the format: a few bytes could fill any memory."""
    checkpoint = ported[0] / 'checkpoints' / '0'
    leaf = jax.ShapeDtypeStruct((10**6, 10**6), np.float32)
    with pytest.raises(CheckpointError, match=r'would take 4,000,000,000,000 bytes and its files'):
        check_size({'x': leaf}, check_files(checkpoint), checkpoint)


def test_a_sparse_file_is_refused_before_anything_reads_it(ported):
    """TensorStore would end the process."""
    data = next((ported[0] / 'checkpoints' / '0' / 'variables').rglob('d/*'))
    with data.open('r+b') as file:
        file.truncate(2**40)
    with pytest.raises(CheckpointError, match=r'its files claim 1,099,5\d\d,\d\d\d,\d\d\d bytes'):
        load_variables(ported[0])


def test_every_bit_of_every_value_counts():
    """Also the highest, and at any position: weights are odd numbers."""
    values = np.zeros((3, 4), np.uint32)
    for index in np.ndindex(values.shape):
        for bit in range(32):
            flipped = values.copy()
            flipped[index] = np.uint32(1) << np.uint32(bit)
            assert checksums({'x': flipped}) != checksums({'x': values}), (index, bit)


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


def test_a_read_that_ends_after_the_loop_is_dropped():
    with first_error_only():
        loop = asyncio.new_event_loop()
    called = []
    loop.call_soon_threadsafe(called.append, 1)
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    loop.call_soon_threadsafe(called.append, 2)
    assert called == [1]


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


def test_what_version_1_did_not_have_is_no_part_of_it():
    fields = DESCRIPTION.to_json() | {'format_version': 1}
    with pytest.raises(CheckpointError, match='missing or unknown task'):
        ModelDescription.from_json(fields, 'here')
    del fields['task']
    assert ModelDescription.from_json(fields, 'here') == DESCRIPTION


def test_a_task_and_sizes_that_are_not_square_survive_json():
    preprocessing = Preprocessing(train_size=(96, 160), test_size=(128, 128))
    assert (preprocessing.train_shape, preprocessing.test_shape) == ((96, 160), (128, 128))
    assert preprocessing.test_size == 128  # One way to say it.
    changes = {'preprocessing': preprocessing, 'task': 'multilabel'}
    description = dataclasses.replace(DESCRIPTION, **changes)
    again = ModelDescription.from_json(json.loads(json.dumps(description.to_json())), 'here')
    assert again == description
