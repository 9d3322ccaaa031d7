"""Text from strangers, made fit for a terminal."""

import pytest

from gcnet_jax.errors import one_line, unknown_name


@pytest.mark.parametrize(
    ('text', 'shown'),
    [
        ('a\nb\tc\udcff é 猫.png', 'a\\nb\\tc\\udcff é 猫.png'),
        ('\x1b[2J\x07\x9b31m', '\\x1b[2J\\x07\\x9b31m'),
        ('\u202etxt.exe\u2028', '\\u202etxt.exe\\u2028'),
    ],
)
def test_names_fit_one_line(text, shown):
    assert one_line(text) == shown


def test_long_text_keeps_its_beginning_and_its_end():
    shown = one_line('/' + 'very/' * 1_000_000 + 'deep.png', limit=60)
    assert len(shown) == 60
    assert shown.startswith('/very/very/')
    assert shown.endswith('very/deep.png')
    assert one_line('a' * 200) == 'a' * 200


def test_an_unknown_name_is_escaped():
    assert '\x1b' not in unknown_name('model', '\x1b[2Jresnet', ['resnet50'])
