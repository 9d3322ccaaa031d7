"""Which residual blocks hold context blocks, and the settings that say so."""

import pytest
from ml_collections import ConfigDict

from gcnet_jax.context import GlobalContext, NonLocal
from gcnet_jax.errors import ConfigError
from gcnet_jax.models.placement import (
    Placement,
    apply_placements,
    check_placements,
    parse_context,
    placed_modules,
)

ENTRY = {'block': 'global_context', 'stages': (2, 4), 'position': 'after_conv3'}
SIZES = (3, 4, 6, 1)
POSITIONS = ('after_conv1', 'after_conv3')


@pytest.mark.parametrize(
    ('blocks', 'expected'),
    [
        (None, {(2, 0), (2, 1), (2, 2), (2, 3), (4, 0)}),
        ((0,), {(2, 0), (4, 0)}),
        ((-1,), {(2, 3), (4, 0)}),
        ((), set()),
    ],
)
def test_a_placement_holds_the_blocks_of_its_stages(blocks, expected):
    placement = Placement(GlobalContext, (2, 4), 'after_conv3', blocks)
    held = {
        (stage, block)
        for stage, size in enumerate(SIZES, 1)
        for block in range(size)
        if placement.holds(stage, block, size)
    }
    assert held == expected


@pytest.mark.parametrize('stages', [0, -1, 5, 9, (2, 5)])
def test_only_stages_of_the_network_are_named(stages):
    check_placements(parse_context(ENTRY | {'stages': (1, 2, 3, 4)}), SIZES, POSITIONS)
    with pytest.raises(ConfigError, match=r'context stage .* it has stages 1 to 4'):
        check_placements(parse_context(ENTRY | {'stages': stages}), SIZES, POSITIONS)


@pytest.mark.parametrize('block', [-6, -5, 4, 5])
def test_only_blocks_of_the_stage_are_named(block):
    for known in range(-4, 4):
        check_placements(parse_context(ENTRY | {'stages': 2, 'blocks': known}), SIZES, POSITIONS)
    entry = ENTRY | {'stages': 2, 'blocks': (0, block)}
    with pytest.raises(ConfigError, match=f'index {block} is not in stage 2, .*: -4 to 3'):
        check_placements(parse_context(entry), SIZES, POSITIONS)


def test_only_positions_of_the_networks_blocks_are_named():
    with pytest.raises(ConfigError, match=r"'after_add' is not in .* after_conv1, after_conv3"):
        check_placements(parse_context(ENTRY | {'position': 'after_add'}), SIZES, POSITIONS)


def test_settings_come_in_several_forms():
    (placement,) = parse_context(ENTRY | {'blocks': [0, -1], 'ratio': 1 / 8})
    assert (placement.stages, placement.position, placement.blocks) == (
        (2, 4),
        'after_conv3',
        (0, -1),
    )
    assert placement.build() == GlobalContext(ratio=1 / 8)
    assert parse_context(None) == ()
    assert parse_context(placement) == (placement,)
    entries = [placement, ConfigDict(ENTRY), {'stages': 3, 'position': 'after_add'}]
    kept, config, short = parse_context(entries)
    assert kept is placement
    assert len({placement, kept}) == 1  # A network that holds it has a hash, as nn.jit needs.
    assert config.stages == (2, 4)
    assert parse_context(ConfigDict(ENTRY))[0].stages == (2, 4)
    assert short.build() == GlobalContext()
    assert (short.stages, short.blocks) == ((3,), None)
    (other,) = parse_context(ENTRY | {'block': 'non_local'})
    assert other.build() == NonLocal()


@pytest.mark.parametrize(
    ('entries', 'message'),
    [
        ('global_context', 'context must be a mapping'),
        (3, 'context must be a mapping'),
        ([ENTRY, 3], 'each entry must be a mapping, got 3'),
        ({}, 'global_context needs stages and position'),
        ({'stages': 1}, 'global_context needs position'),
        (ENTRY | {'block': ['global_context']}, 'unknown context block'),
        (ENTRY | {'position': ['after_add']}, 'unknown context position'),
        (ENTRY | {'stages': True}, 'context.stages must be whole numbers'),
        (ENTRY | {'stages': (2, False)}, 'context.stages must be whole numbers'),
        (ENTRY | {'stages': (2, 2.5)}, 'context.stages must be whole numbers'),
        (ENTRY | {'stages': 2.5}, 'context.stages must be whole numbers'),
        (ENTRY | {'stages': ''}, 'context.stages must be whole numbers'),
        (ENTRY | {'blocks': '01'}, 'context.blocks must be whole numbers'),
        # The network decides these for all its blocks.
        (ENTRY | {'dtype': 'bfloat16'}, "unknown option of context block global_context 'dtype'"),
        (ENTRY | {'param_dtype': 'bfloat16'}, 'unknown option .* .param_dtype'),
        (ENTRY | {'block_': 1}, "did you mean 'block'"),
        (ENTRY | {'position_': 1}, "did you mean 'position'"),
    ],
)
def test_wrong_settings_are_refused(entries, message):
    with pytest.raises(ConfigError, match=message):
        parse_context(entries)


def test_blocks_of_one_position_run_in_order_and_are_numbered_there():
    made = []

    def build(letter):
        def make(dtype, name):
            made.append((letter, dtype, name))
            return lambda features: features + letter

        return make

    order = [('a', 'after_add'), ('b', 'after_conv1'), ('c', 'after_add')]
    placements = [Placement(build(letter), (1,), position) for letter, position in order]
    assert apply_placements('x', placements, 'after_add', 'low') == 'xac'
    assert made == [('a', 'low', 'context_after_add_0'), ('c', 'low', 'context_after_add_1')]
    assert apply_placements('x', placements, 'after_conv3', 'low') == 'x'
    assert placed_modules(placements, 'after_conv2', None) == []
