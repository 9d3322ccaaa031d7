"""How objects are stored, which of them are trained on, and the keys of records."""

import itertools

import numpy as np
import pytest

from gcnet_jax.data.detection_set import decode_objects, encode_object, is_target, record_key
from gcnet_jax.errors import DataError
from tests.data.detection_folders import contents


def test_stored_objects_come_back_bit_for_bit():
    for item in contents(range(9))['annotations']:
        item = item | {'bbox': [0.1 + 0.2, 1e-17, 1 / 3, 12345678.9]}
        stored = encode_object(item, 4)
        (back,) = decode_objects([stored['label']], [stored['annotation'].encode()])
        kept = {key: item[key] for key in ('id', 'bbox', 'area', 'iscrowd', 'segmentation')}
        assert back == kept | {'label': 4}


@pytest.mark.parametrize(
    'text',
    [
        *(b'', b'{', b'[]', b'{"bbox":[1,2,3],"area":1,"iscrowd":0}', b'[' * 100_000),
        b'{"bbox":[1,2,3,NaN],"area":1,"iscrowd":0}',
        b'{"bbox":[1,2,3,4],"area":"a","iscrowd":0}',
        b'{"bbox":[1,2,3,4],"iscrowd":0}',
        b'\xff',
    ],
)
def test_damaged_objects_are_errors(text):
    with pytest.raises(DataError, match='its objects are damaged'):
        decode_objects([1], [text])


@pytest.mark.parametrize(
    ('box', 'area', 'crowd', 'expected'),
    [
        ((0, 0, 1, 1), 0.1, 0, True),
        ((0, 0, 1, 1), 0.1, 1, False),
        ((0, 0, 1, 1), 0, 0, False),
        ((0, 0, 0.99, 5), 1, 0, False),
        ((0, 0, 5, 0.99), 1, 0, False),
        ((-5, 0, 6, 5), 1, 0, True),
        ((-5, 0, 5.9, 5), 1, 0, False),
        ((9.5, 0, 5, 5), 1, 0, False),
        ((0, 19.5, 5, 5), 1, 0, False),
        ((5, 5, -2, 3), 1, 0, False),
    ],
)
def test_what_is_trained_on(box, area, crowd, expected):
    item = {'bbox': list(box), 'area': area, 'iscrowd': crowd}
    assert is_target(item, (20, 10)) is expected


def test_keys_are_in_order_and_spread_out():
    keys = [record_key(position, 1000) for position in range(1000)]
    assert all(low < high for low, high in itertools.pairwise(keys))
    counts = np.bincount([key >> 121 for key in keys])
    assert len(counts) == 128
    assert set(counts) <= {7, 8}
