"""What is said before something is compiled, and what is remembered of it."""

import json

import jax
import pytest

from gcnet_jax.planning import durations, make_plans
from gcnet_jax.planning import plan as planning


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    return tmp_path / 'gcnet_jax' / durations.FILE


def test_the_last_time_is_said_the_next_time(monkeypatch, cache):
    now = [0.0]
    monkeypatch.setattr('time.perf_counter', lambda: now[0])
    said = []
    for seconds in (130.0, 7.0):
        with durations.announcer(said.append)('a network'):
            assert said[-1].startswith('compiling a network (')  # Before it takes its time.
            now[0] += seconds
    assert said == [
        'compiling a network (this takes minutes)',
        'compiling a network (130 s last time)',
    ]
    assert json.loads(cache.read_text()) == {'a network': 7.0}
    assert cache.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    'content', ['', '[1]', '{"a": "x"}', '{"a": NaN}', '{"a": -1}', '{"a": true}', '{"a": 1e999}']
)
def test_a_damaged_file_is_replaced(content, cache):
    cache.parent.mkdir()
    cache.write_text(content)
    said = []
    with durations.announcer(said.append)('a'):
        pass
    assert said == ['compiling a (this takes minutes)']
    assert list(json.loads(cache.read_text())) == ['a']


def test_it_is_bounded_and_keeps_the_newest(cache):
    cache.parent.mkdir()
    cache.write_text(json.dumps({str(number): 1.0 for number in range(durations.MAX_ENTRIES)}))
    with durations.announcer(lambda text: None)('0'):
        pass
    with durations.announcer(lambda text: None)('new'):
        pass
    kept = list(json.loads(cache.read_text()))
    assert len(kept) == durations.MAX_ENTRIES
    assert kept[-2:] == ['0', 'new']


def test_nothing_is_kept_where_nothing_can_be_written(monkeypatch, tmp_path):
    (tmp_path / 'file').touch()
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
    with durations.announcer(lambda text: None)('a'):
        pass


def test_what_failed_is_not_remembered(cache):
    with pytest.raises(ValueError, match='no'), durations.announcer(lambda text: None)('a'):
        raise ValueError('no')
    assert not cache.exists()


def test_each_compilation_is_announced(monkeypatch, example_plan, small_config):
    """Also that of the network without context; and each topology is reported when it is done."""
    events = []
    monkeypatch.setattr(planning, 'topology_devices', lambda name: jax.devices())
    monkeypatch.setattr(planning, 'make_plan', lambda *arguments: example_plan)
    monkeypatch.setattr(planning, 'compile_step', lambda experiment: example_plan.program)
    make_plans(
        small_config,
        ['v5e:2x4', 'v6e:2x4'],
        4,
        tell=lambda plan: events.append('done'),
        compiling=durations.announcer(events.append),
    )
    network = f'{small_config.model.name}, {small_config.data.image_size} pixels, float32'
    assert events == [
        f'compiling {network} for v5e:2x4, 4 images a chip (this takes minutes)',
        'done',
        f'compiling {example_plan.network} for {example_plan.topology} without its context '
        '(this takes minutes)',
        f'compiling {network} for v6e:2x4, 4 images a chip (this takes minutes)',
        'done',
    ]
