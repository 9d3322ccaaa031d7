import importlib.util
import os

import jax
import pytest

from gcnet_jax.planning import chips
from gcnet_jax.planning.chips import CHIPS, PlanError, parse_topology, topology_devices


@pytest.mark.parametrize(
    ('name', 'kind', 'count'),
    [
        ('v5e:1x1', 'v5e', 1),
        ('v5e:16x16', 'v5e', 256),
        ('v6e:4x4', 'v6e', 16),
        ('v5p:2x2x4', 'v5p', 16),
        ('v4:4x4x4', 'v4', 64),
    ],
)
def test_topologies_that_exist(name, kind, count):
    assert parse_topology(name) == (CHIPS[kind], count)


@pytest.mark.parametrize(
    'name',
    ['v5e', 'v5e-16', 'v5e:16', 'v5e:32x32', 'v5e:2x2x2', 'v5p:2x2', 'v9:2x2', 'v5e:0x4', ''],
)
def test_topologies_that_do_not(name):
    with pytest.raises(PlanError, match='unknown topology') as raised:
        parse_topology(name)
    message = str(raised.value)
    assert repr(name) in message
    assert 'v5e:AxB up to 256 chips' in message
    assert 'v5p:AxBxC' in message
    assert '\n' not in message


def test_without_libtpu_the_error_says_what_to_install(monkeypatch):
    monkeypatch.delenv('TPU_LIBRARY_PATH', raising=False)
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(PlanError, match=r'pip install "jax\[tpu\]"') as raised:
        topology_devices('v5e:2x2')
    assert '\n' not in str(raised.value)


class Topology:
    def __init__(self, count):
        self.devices = list(range(count))


@pytest.fixture
def pretend_libtpu(monkeypatch):
    """Puts a function in the place of libtpu; a list of how it was called."""
    calls = []

    def pretend(answer):
        def find(name, platform, **options):
            calls.append((name, platform, options))
            return answer()

        monkeypatch.setattr(importlib.util, 'find_spec', lambda name: object())
        monkeypatch.setattr('jax.experimental.topologies.get_topology_desc', find)
        return calls

    return pretend


def test_a_v4_chip_is_one_device(pretend_libtpu):
    calls = pretend_libtpu(lambda: Topology(4))
    assert topology_devices('v4:2x2x1') == [0, 1, 2, 3]
    assert calls == [('v4:2x2x1', 'tpu', {'chip_config_name': 'megacore'})]
    topology_devices('v5e:2x2')
    assert calls[1] == ('v5e:2x2', 'tpu', {})


def test_a_single_chip_has_a_host_of_its_own(pretend_libtpu):
    calls = pretend_libtpu(lambda: Topology(1))
    topology_devices('v5e:1x1')
    assert calls == [('v5e:1x1', 'tpu', {'chips_per_host_bounds': (1, 1, 1)})]


def test_what_the_compiler_refuses_is_one_line(pretend_libtpu):
    def refuse():
        raise jax.errors.JaxRuntimeError('INVALID_ARGUMENT: layout "3x3"\nis not divisible')

    pretend_libtpu(refuse)
    with pytest.raises(PlanError, match='layout "3x3" is not divisible'):
        topology_devices('v5e:3x3')


def test_another_number_of_devices_than_chips_is_refused(pretend_libtpu):
    pretend_libtpu(lambda: Topology(8))
    with pytest.raises(PlanError, match='8 devices for 4 chips'):
        topology_devices('v5e:2x2')


def test_the_process_is_told_to_look_for_no_tpu(monkeypatch):
    for name in chips.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('TPU_ACCELERATOR_TYPE', 'v6e-4')  # What is set already stays.
    updates = []
    monkeypatch.setattr(jax.config, 'update', lambda *change: updates.append(change))
    # What it sets is taken back after the test.
    monkeypatch.setattr(os, 'environ', dict(os.environ))
    chips.prepare_process()
    assert os.environ['TPU_SKIP_MDS_QUERY'] == '1'
    assert os.environ['TPU_ACCELERATOR_TYPE'] == 'v6e-4'
    assert updates == [('jax_platforms', 'cpu')]
