"""Settings that are read out of the texts of configs, without running them."""

import pytest

from gcnet_jax.porting.told import config_texts, fraction, groups, whole_numbers


@pytest.mark.parametrize(
    ('text', 'value'),
    [
        ('ratio=0.25', 0.25),
        ('ratio=1 / 4.', 0.25),
        ("'ratio': 0.0625,", 0.0625),
        ('"ratio": 1/16', 1 / 16),
        ('ratio=2', 2),
        ('dropout_ratio=0.1', None),
        ('ratio=x', None),
        ('ratio=1 / 0', 1),
        ('', None),
    ],
)
def test_fractions(text, value):
    assert fraction('ratio', text) == value


@pytest.mark.parametrize(
    ('text', 'numbers'),
    [
        ('strides=(1, 2, 1, 1)', (1, 2, 1, 1)),
        ("'strides': [1, 2]", (1, 2)),
        ('strides=(3, )', (3,)),
        ('strides=()', ()),
        ('strides=(1, two)', None),
        ('strides=4', None),
        ('all_strides=(1, 2)', None),
        (f'strides=({"1, " * 1000})', (1,) * 16),
    ],
)
def test_whole_numbers(text, numbers):
    assert whole_numbers('strides', text) == numbers


def test_groups_end_where_their_brackets_do_and_leave_out_groups_inside():
    text = (
        "model = dict(head=dict(a=(1, 2), b=dict(type='c'), d=[dict(e=1)], f=4), g=1);"
        " {'head': {'a': {'b': 1}, 'c': [1]}, 'd': 1}"
    )
    assert [*groups('head', text)] == ['(a=(1, 2), b=dict, d=[dict], f=4)', "{'a': , 'c': [1]}"]
    assert [*groups('head', 'head=dict(a=1')] == []
    assert len([*groups('head', 'head=dict()' * 100)]) == 8
    assert [*groups('head', 'head=dict(' * 200_000)] == []


def test_configs_are_found_where_mmcv_and_mmengine_put_them():
    metadata = {'meta': {'config': 'a', 'cfg': {'b': 1}}, 'cfg': 'c', 'config': None}
    assert [*config_texts(metadata)] == ['a', "{'b': 1}", 'c']
    assert [*config_texts({'meta': 3})] == []
