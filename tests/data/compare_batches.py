"""Batches of any loader: taken from it, and compared bit for bit."""

import numpy as np


def take(batches, count):
    with batches:
        return [next(batches) for _ in range(count)]


def assert_equal(first, second):
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype
            np.testing.assert_array_equal(a[key], b[key])
