"""The fixture `compile_once` works in any order of the tests, and only while it is in use."""

import jax
import numpy as np
import pytest
from jax import monitoring

HIT = '/jax/compilation_cache/cache_hits'
heard = []


def hits():
    """Compiles one program twice, and returns how often it was found."""
    heard.clear()
    for _ in range(2):
        jax.jit(lambda x: 5 * x - 7)(np.float32(1))  # A new function, for JAX.
    return heard.count(HIT)


@pytest.fixture(scope='module')
def others_before():
    """Most tests compile without the cache, and JAX remembers what it was set to then."""
    monitoring.register_event_listener(lambda event, **_: heard.append(event))
    assert hits() == 0


def test_programs_are_shared_after_others_have_compiled(others_before, compile_once, programs):
    assert hits() == 1
    assert hits() == 2
    assert list(programs.glob('*-cache'))
