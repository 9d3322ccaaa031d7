import asyncio
import errno
import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gcnet_jax.errors import CheckpointError
from gcnet_jax.stored import ModelDescription, find_checkpoint
from gcnet_jax.stored.checksums import json_checksum
from gcnet_jax.training.checkpoints import CheckpointStore, no_space_left
from gcnet_jax.training.mesh import make_mesh, state_shardings
from gcnet_jax.training.state import TrainState

DESCRIPTION = ModelDescription('gccnn', {'num_classes': 4}, ('a', 'b', 'c', 'd'))


def make_state(step, shape=(2, 2, 2), use_ema=True):
    rng = np.random.default_rng(step)
    params = {
        'kernel': rng.normal(size=(3, 3, 4, 8)).astype(np.float32),
        'half': rng.normal(size=(8,)).astype(jnp.bfloat16),
    }
    batch_stats = {'mean': rng.normal(size=8).astype(np.float32)}
    state = TrainState(
        step=np.asarray(step, np.int32),
        key=np.array([1, 2], np.uint32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optax.sgd(0.1, momentum=0.9).init(params),
        ema=jax.tree.map(np.copy, {'params': params, 'batch_stats': batch_stats})
        if use_ema
        else None,
    )
    mesh = make_mesh(*shape, devices=jax.devices()[: np.prod(shape)])
    return jax.device_put(state, state_shardings(state, mesh, smallest=2))


def save(workdir, steps, keep=9, accuracies=()):
    store = CheckpointStore(workdir, DESCRIPTION, 'accuracy', keep)
    for step in steps:
        metrics = {'eval/accuracy': accuracies[step]} if step in accuracies else {}
        store.save(make_state(step), {'step': step, 'window': {'loss': step / 3}}, metrics)
    store.close()
    return workdir / 'checkpoints'


def target(shape=(2, 2, 2), use_ema=True):
    state = make_state(0, shape, use_ema)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )


def restore(workdir, shape=(2, 2, 2)):
    lines = []
    store = CheckpointStore(workdir, DESCRIPTION, 'accuracy', 9, lines.append)
    restored = store.restore(target(shape))
    store.close()
    return restored, lines


def same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize('shape', [(2, 2, 2), (1, 8, 1), (8, 1, 1), (2, 1, 4), (1, 1, 1)])
def test_state_and_position_come_back_on_any_mesh(tmp_path, shape):
    save(tmp_path, [7])
    (state, position), lines = restore(tmp_path, shape)
    same(state, make_state(7))
    assert position == {'step': 7, 'window': {'loss': 7 / 3}}
    assert state.params['kernel'].sharding == make_state(7, shape).params['kernel'].sharding
    assert not lines


def test_a_state_without_a_moving_average_comes_back(tmp_path):
    store = CheckpointStore(tmp_path, DESCRIPTION, 'accuracy', 9)
    assert store.last_good() == 'there is no checkpoint yet'
    assert store.newest is None
    position = {'step': 3, 'examples': 0, 'window': {}, 'best': {'step': 0, 'accuracy': 0.5}}
    store.save(make_state(3, use_ema=False), position, {})
    store.wait()
    assert store.newest == 3
    assert store.last_good() == f'the last good checkpoint is {tmp_path / "checkpoints" / "3"}'
    state, stored = store.restore(target(use_ema=False))
    store.close()
    same(state, make_state(3, use_ema=False))
    assert state.ema is None
    assert stored == position


def test_without_a_checkpoint_there_is_nothing_to_restore(tmp_path):
    assert restore(tmp_path) == (None, [])


def test_the_newest_and_the_best_are_kept(tmp_path):
    root = save(tmp_path, range(1, 7), 2, {1: 0.1, 2: 0.9, 3: 0.3, 4: 0.4, 5: 0.5, 6: 0.6})
    assert sorted(path.name for path in root.iterdir()) == ['2', '5', '6']
    assert find_checkpoint(tmp_path, 'best') == root / '2'
    assert find_checkpoint(tmp_path) == root / '6'


def test_the_best_is_one_that_was_evaluated(tmp_path):
    root = save(tmp_path, [1, 2, 3], 1, {1: 0.0})
    assert sorted(path.name for path in root.iterdir()) == ['1', '3']


def damage_truncated(checkpoint):
    # Every file: which of them hold the newest version of a node is for the format to say.
    for path in (checkpoint / 'variables').rglob('d/*'):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_missing(checkpoint):
    shutil.rmtree(checkpoint / 'training' / 'd', ignore_errors=True)
    for path in (checkpoint / 'training').rglob('d/*'):
        path.unlink()


def damage_flipped(checkpoint):
    for path in (checkpoint / 'variables').rglob('d/*'):
        data = np.frombuffer(path.read_bytes(), np.uint8).copy()
        data[32::64] ^= 0x10
        path.write_bytes(data.tobytes())


def damage_emptied(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def damage_position(checkpoint):
    (checkpoint / 'position' / 'metadata').write_text('{"step": ')


def damage_a_number_of_the_position(checkpoint):
    path = checkpoint / 'position' / 'metadata'
    path.write_text(path.read_text().replace('1.6', '1.7'))


def damage_metrics(checkpoint):
    # Orbax's manager reads the metrics of every checkpoint, and stops at what is no JSON.
    (checkpoint / 'metrics' / 'metrics').write_text('')


def damage_a_number_of_the_metrics(checkpoint):
    (checkpoint / 'metrics' / 'metrics').write_text('{"eval/accuracy": 0.9}')


@pytest.mark.slow
@pytest.mark.parametrize('keep', [slice(None), slice(0), slice(0, -20), slice(0, 7)])
def test_damage_to_any_file_is_seen_or_harmless(tmp_path, keep):
    """Each file of a checkpoint in turn: with one byte changed, emptied, or cut short."""
    root = save(tmp_path / 'whole', [3, 5])
    names = [path.relative_to(root) for path in (root / '5').rglob('*') if path.is_file()]
    assert len(names) > 20
    seen = 0
    for name in names:
        workdir = tmp_path / 'damaged'
        shutil.copytree(tmp_path / 'whole', workdir)
        path = workdir / 'checkpoints' / name
        data = bytearray(path.read_bytes()[keep])
        if keep == slice(None):
            data[len(data) // 2] ^= 0x10
        path.write_bytes(data)
        (state, position), lines = restore(workdir)
        assert position['step'] == state.step
        same(state, make_state(int(state.step)))
        assert len(lines) == (state.step == 3)
        seen += state.step == 3
        shutil.rmtree(workdir)
    assert seen >= 8


@pytest.mark.parametrize(
    'damage',
    [
        damage_truncated,
        damage_missing,
        damage_flipped,
        damage_emptied,
        damage_position,
        damage_a_number_of_the_position,
        damage_metrics,
        damage_a_number_of_the_metrics,
    ],
)
def test_a_damaged_checkpoint_is_said_and_the_one_before_is_used(tmp_path, damage):
    root = save(tmp_path, [3, 5])
    damage(root / '5')
    (state, position), lines = restore(tmp_path)
    same(state, make_state(3))
    assert position['step'] == 3
    assert len(lines) == 1
    assert str(root / '5') in lines[0]
    assert [path.name for path in root.iterdir()] == ['3']
    assert (tmp_path / 'damaged-checkpoint-5').is_dir()
    save(tmp_path, [5])  # The step is free again.
    same(restore(tmp_path)[0][0], make_state(5))


def test_a_step_can_be_damaged_more_than_once(tmp_path):
    root = save(tmp_path, [3])
    for _ in range(2):
        save(tmp_path, [5])
        damage_position(root / '5')
        (state, _), (line,) = restore(tmp_path)
        assert state.step == 3
        assert len(line) < 400
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        'checkpoints',
        'damaged-checkpoint-5',
    ]


def test_one_process_sets_aside_for_all(tmp_path, monkeypatch):
    root = save(tmp_path, [3])
    store = CheckpointStore(tmp_path, DESCRIPTION, 'accuracy', 9)
    for process, left in ((1, ['3']), (0, [])):
        with monkeypatch.context() as patch:
            patch.setattr(jax, 'process_index', lambda process=process: process)
            store._set_aside([3])
        assert [path.name for path in root.iterdir()] == left
    store.close()


def test_nothing_is_removed_when_every_checkpoint_is_damaged(tmp_path):
    root = save(tmp_path, [3, 5])
    damage_truncated(root / '3')
    damage_truncated(root / '5')
    with pytest.raises(CheckpointError, match='none of the checkpoints 5, 3 can be read'):
        restore(tmp_path)
    assert sorted(path.name for path in root.iterdir()) == ['3', '5']


def test_a_changed_value_is_seen_by_the_checksum_alone(tmp_path):
    """The stored checksum and the value differ in one bit, which no file format would notice."""
    root = save(tmp_path, [3])
    state = make_state(5)
    store = CheckpointStore(tmp_path, DESCRIPTION, 'accuracy', 9)
    store.save(state, {'step': 5}, {})
    store.close()
    sums = json.loads((root / '5' / 'checksums' / 'metadata').read_text())
    sums['training']["['key']"] ^= 1
    (root / '5' / 'checksums' / 'metadata').write_text(json.dumps(sums))
    (state, _), lines = restore(tmp_path)
    assert state.step == 3
    assert "1 arrays differ, first ['key']" in lines[0]


def test_a_full_disk_while_saving_is_one_line_and_loses_nothing(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path, DESCRIPTION, 'accuracy', 9)
    store.save(make_state(3), {'step': 3}, {})
    store.wait()

    def full(*unused, **also_unused):
        try:
            raise OSError(errno.ENOSPC, 'No space left on device')
        except OSError as error:
            raise ValueError('Failed to write an array') from error

    monkeypatch.setattr(store._manager, 'save', full)
    with pytest.raises(CheckpointError, match=r'no space left .*last good checkpoint is .*/3'):
        store.save(make_state(5), {'step': 5}, {})
    store.close()
    same(restore(tmp_path)[0][0], make_state(3))


def caused_by(error, cause=None, context=None):
    error.__cause__, error.__context__ = cause, context
    return error


@pytest.mark.parametrize(
    ('error', 'expected'),
    [
        (OSError(errno.ENOSPC, 'full'), True),
        (OSError(errno.EDQUOT, 'full'), True),
        (OSError(errno.EACCES, 'denied'), False),
        (RuntimeError('write: No space left on device (os error 28)'), True),
        (RuntimeError('write: Disk quota exceeded'), True),
        (caused_by(ValueError('x'), cause=OSError(errno.ENOSPC, 'full')), True),
        (caused_by(ValueError('x'), context=OSError(errno.ENOSPC, 'full')), True),
        (caused_by(ValueError('x'), cause=KeyError('y')), False),
        (None, False),
    ],
)
def test_a_full_disk_is_known_by_number_text_and_cause(error, expected):
    assert no_space_left(error) is expected


def test_orbax_does_not_log_what_is_explained(tmp_path, caplog):
    store = CheckpointStore(tmp_path, DESCRIPTION, 'accuracy', 9)
    for error in (OSError(errno.ENOSPC, 'No space left on device'), KeyError('other')):
        try:
            raise error
        except Exception:
            logging.getLogger('absl').exception('in the background')
    store.close()
    assert [record.exc_info[0] for record in caplog.records] == [KeyError]


def test_writes_that_end_after_the_first_error_say_nothing(tmp_path):
    asyncio.set_event_loop_policy(None)  # Other tests leave their stores open.
    store = CheckpointStore(tmp_path, DESCRIPTION, 'accuracy', 1)
    closed = [asyncio.new_event_loop()]
    store.close()
    closed.append(asyncio.new_event_loop())
    for loop in closed:
        loop.close()
    closed[0].call_soon_threadsafe(print)
    with pytest.raises(RuntimeError, match='closed'):
        closed[1].call_soon_threadsafe(print)


def test_other_errors_are_not_called_a_full_disk(tmp_path):
    store = CheckpointStore(tmp_path, DESCRIPTION, 'accuracy', 9)
    with pytest.raises(ZeroDivisionError), store.explain_errors():
        raise ZeroDivisionError
    store.close()


@pytest.mark.parametrize(
    'change',
    [{'step': 4}, {'step': 3.0}, {'examples': -1}, {'window': {'loss': 'x'}}, {'best': [1]}],
)
def test_a_position_that_the_loop_could_not_go_on_from_is_damage(tmp_path, change):
    position = {'step': 3, 'examples': 9, 'window': {'loss': 0.5}, 'best': None}
    store = CheckpointStore(tmp_path, DESCRIPTION, 'accuracy', 9)
    store.save(make_state(3), position, {})
    store.close()
    place = tmp_path / 'checkpoints' / '3'
    (place / 'position' / 'metadata').write_text(json.dumps(position | change))
    sums = json.loads((place / 'checksums' / 'metadata').read_text())
    sums['position'] = json_checksum(position | change)
    (place / 'checksums' / 'metadata').write_text(json.dumps(sums))
    with pytest.raises(CheckpointError, match='damaged: its position is'):
        restore(tmp_path)
