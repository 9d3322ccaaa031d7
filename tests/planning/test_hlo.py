"""Traffic read from handwritten HLO, where every number can be counted, and from real programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gcnet_jax.planning.hlo import Collective, array_bytes, read_traffic
from gcnet_jax.training.mesh import make_mesh

ADD = """
%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}
"""


def traffic(entry, *others):
    body = '\n'.join(f'  {line}' for line in entry)
    text = f'HloModule m\n{ADD}\n' + '\n'.join(others)
    return read_traffic(f'{text}\n\nENTRY %main (a: f32[8]) -> f32[8] {{\n{body}\n}}\n')


@pytest.mark.parametrize(
    ('shape', 'size'),
    [
        ('f32[]', 4),
        ('bf16[3,5]{1,0:T(8,128)(2,1)}', 30),
        ('pred[7]{0}', 7),
        ('s4[5]{0}', 3),
        ('f8e4m3fn[6]', 6),
        ('c64[2]', 16),
        ('f32[<=4,2]', 32),
        ('(f32[2]{0:T(128)S(1)}, (u8[3]{0}, token[]), s32[2]{0})', 19),
    ],
)
def test_sizes_of_types(shape, size):
    assert array_bytes(shape) == size


def test_memory_on_the_chip_is_told_apart():
    shape = '(f32[2]{0:T(128)S(1)}, bf16[3]{0:T(256)}, u32[]{:S(2)})'
    assert array_bytes(shape) == 18
    assert array_bytes(shape, main_memory_only=True) == 6


def test_a_tuple_is_one_collective_of_all_its_arrays():
    found = traffic(
        [
            '%a = f32[8]{0:T(128)S(1)} parameter(0)',
            '%b = bf16[4,2]{1,0:T(8,128)(2,1)} parameter(1)',
            'ROOT %r = (f32[8]{0:T(128)S(1)}, /*index=1*/bf16[4,2]{1,0:T(8,128)(2,1)}) '
            'all-reduce(%a, %b), channel_id=1, to_apply=%add, metadata={op_name="x all-gather(y)"}',
        ]
    )
    assert found.collectives == {'all-reduce': Collective(count=1, bytes=32 + 16)}
    assert found.hbm_bytes == 2 * 16


def test_start_and_done_are_one():
    found = traffic(
        [
            '%a = f32[8]{0} parameter(0)',
            '%s = (f32[8]{0}, f32[32]{0}) all-gather-start(%a), channel_id=1, dimensions={0}',
            '%d = f32[32]{0} all-gather-done(%s)',
            '%p = (f32[32]{0}, f32[32]{0}, u32[], u32[]) collective-permute-start(%d), '
            'channel_id=2, source_target_pairs={{0,1},{1,0}}',
            '%q = f32[32]{0} collective-permute-done(%p)',
            '%r = f32[32]{0} all-reduce-start(%q), channel_id=3, to_apply=%add',
            'ROOT %e = f32[32]{0} all-reduce-done(%r)',
        ]
    )
    assert found.collectives == {
        'all-gather': Collective(1, 128),
        'all-reduce': Collective(1, 128),
        'collective-permute': Collective(1, 128),
    }
    # Each reads its source and writes its result.
    assert found.hbm_bytes == (32 + 128) + 2 * 128 + 2 * 128


def test_a_reduce_scatter_counts_what_it_reduces():
    found = traffic(
        [
            '%a = f32[32]{0} parameter(0)',
            '%r = f32[8]{0} reduce-scatter(%a), channel_id=1, dimensions={0}, to_apply=%add',
            'ROOT %g = f32[32]{0} all-gather(%r), channel_id=2, dimensions={0}',
        ]
    )
    assert found.collectives == {
        'all-gather': Collective(1, 128),
        'reduce-scatter': Collective(1, 128),
    }


BODY = """
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %v = f32[8]{0} get-tuple-element(%p), index=1
  %r = f32[8]{0} all-reduce(%v), channel_id=1, to_apply=%add
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %r)
}
"""
CONDITION = """
%condition (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %p = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}
"""
LOOP = [
    '%t = (s32[], f32[8]{0}) parameter(0)',
    'ROOT %w = (s32[], f32[8]{0}) while(%t), condition=%condition, body=%body',
]


def test_a_loop_counts_for_every_turn_that_its_condition_allows():
    found = traffic(LOOP, BODY, CONDITION)
    assert found.collectives == {'all-reduce': Collective(5, 5 * 32)}
    assert found.hbm_bytes == 5 * (32 + 32)
    assert found.unknown_loops == 0


def test_a_loop_counts_for_the_turns_that_the_compiler_noted():
    noted = ', backend_config={"known_trip_count":{"n":"3"},"other":{}}'
    found = traffic([LOOP[0], LOOP[1] + noted], BODY, CONDITION)
    assert found.collectives == {'all-reduce': Collective(3, 3 * 32)}


def test_a_loop_without_an_end_is_told():
    found = traffic(LOOP, BODY, CONDITION.replace('direction=LT', 'direction=NE'))
    assert found.collectives == {'all-reduce': Collective(1, 32)}
    assert found.unknown_loops == 1


def test_loops_in_loops_multiply():
    outer = BODY.replace('%body', '%outer').replace(
        '%r = f32[8]{0} all-reduce(%v), channel_id=1, to_apply=%add',
        '%w = (s32[], f32[8]{0}) while(%p), condition=%condition, body=%body\n'
        '  %r = f32[8]{0} get-tuple-element(%w), index=1',
    )
    found = traffic([LOOP[0], LOOP[1].replace('body=%body', 'body=%outer')], BODY, outer, CONDITION)
    assert found.collectives == {'all-reduce': Collective(25, 25 * 32)}


def test_every_branch_of_a_conditional_is_counted():
    branch = """
%branch (v: f32[8]) -> f32[8] {
  %v = f32[8]{0} parameter(0)
  ROOT %r = f32[8]{0} all-reduce(%v), channel_id=1, to_apply=%add
}
"""
    found = traffic(
        [
            '%i = s32[] parameter(0)',
            '%v = f32[8]{0} parameter(1)',
            'ROOT %c = f32[8]{0} conditional(%i, %v, %v), branch_computations={%branch, %other}',
        ],
        branch,
        branch.replace('%branch', '%other'),
    )
    assert found.collectives == {'all-reduce': Collective(2, 64)}


def test_a_collective_overlapped_with_computation_counts_once():
    fused = """
%{name} (v: f32[8]) -> f32[32] {{
  %v = f32[8]{{0}} parameter(0)
  ROOT %g = f32[32]{{0}} all-gather(%v), channel_id=7, dimensions={{0}}
}}
"""
    call = '%{name} = f32[32]{{0}} fusion(%v), kind=kCustom, calls=%{name}'
    names = ('start', 'beside', 'done')
    found = traffic(
        ['%v = f32[8]{0} parameter(0)', *(call.format(name=name) for name in names)],
        *(fused.format(name=name) for name in names),
    )
    assert found.collectives == {'all-gather': Collective(1, 128)}
    assert found.hbm_bytes == 3 * (32 + 128)


def test_a_fused_sum_that_is_sliced_is_a_reduce_scatter():
    fused = """
%all-reduce-scatter.1 (v: f32[32]) -> f32[8] {
  %v = f32[32]{0} parameter(0)
  %r = f32[32]{0} all-reduce(%v), channel_id=1, to_apply=%add
  %zero = u32[] constant(0)
  ROOT %s = f32[8]{0} dynamic-slice(%r, %zero), dynamic_slice_sizes={8}
}
"""
    found = traffic(
        [
            '%v = f32[32]{0} parameter(0)',
            'ROOT %f = f32[8]{0} fusion(%v), kind=kCustom, calls=%all-reduce-scatter.1',
        ],
        fused,
    )
    assert found.collectives == {'reduce-scatter': Collective(1, 128)}
    assert found.hbm_bytes == 128 + 32


def test_a_copy_to_the_chip_reads_the_main_memory_once():
    found = traffic(
        [
            '%a = f32[100]{0:T(128)} parameter(0)',
            '%s = (f32[100]{0:T(128)S(1)}, f32[100]{0:T(128)}, u32[]{:S(2)}) copy-start(%a)',
            '%d = f32[100]{0:T(128)S(1)} copy-done(%s)',
            '%part = ((f32[100]{0:T(128)}), f32[10]{0:T(128)S(1)}, s32[]{:S(2)}) slice-start(%a), '
            'slice={[0:10]}',
            '%slice = f32[10]{0:T(128)S(1)} slice-done(%part)',
            '%sum = f32[100]{0:T(128)S(1)} fusion(%d, %slice), kind=kLoop, calls=%add',
            '%back = (f32[100]{0:T(128)}, f32[100]{0:T(128)S(1)}, u32[]{:S(2)}) copy-start(%sum)',
            'ROOT %out = f32[100]{0:T(128)} copy-done(%back)',
        ]
    )
    assert found.hbm_bytes == 400 + 40 + 400
    assert found.collectives == {}


def test_a_real_programs_gradient_is_reduced_once():
    mesh = make_mesh()
    by_batch = NamedSharding(mesh, PartitionSpec(('data',)))
    whole = NamedSharding(mesh, PartitionSpec())

    def loss(kernel, inputs):
        return jnp.mean(jnp.square(inputs @ kernel))

    kernel, inputs = np.ones((32, 16), np.float32), np.ones((64, 32), np.float32)
    compiled = (
        jax.jit(jax.grad(loss), in_shardings=(whole, by_batch), out_shardings=whole)
        .lower(kernel, inputs)
        .compile()
    )
    found = read_traffic(compiled.as_text())
    assert found.collectives == {'all-reduce': Collective(1, 32 * 16 * 4)}
    assert found.unknown_loops == 0


def test_a_real_programs_loop_counts_for_every_turn():
    mesh = make_mesh()
    parts = NamedSharding(mesh, PartitionSpec('data'))

    def run(values):
        def turn(values, _):
            # The mean is over all devices, and the next turn needs it.
            return values - values.mean(axis=0), None

        return jax.lax.scan(turn, values, length=7)[0]

    values = jax.ShapeDtypeStruct((16, 24), jnp.float32, sharding=parts)
    compiled = jax.jit(run, out_shardings=parts).lower(values).compile()
    found = read_traffic(compiled.as_text())
    assert found.collectives == {'all-reduce': Collective(7, 7 * 24 * 4)}
    assert found.unknown_loops == 0


SLICE = """
%slice (p: f32[9,100], i: s32[]) -> f32[1,100] {
  %i = s32[] parameter(1)
  %p = f32[9,100]{1,0} parameter(0)
  %again = f32[9,100]{1,0} bitcast(%p)
  %zero = s32[] constant(0)
  %part = f32[1,100]{1,0} dynamic-slice(%again, %i, %zero), dynamic_slice_sizes={1,100}
  ROOT %twice = f32[1,100]{1,0} add(%part, %part)
}
"""
UPDATE = """
%update (p: f32[9,100], q: f32[1,100], i: s32[]) -> (f32[9,100], f32[1,100]) {
  %p = f32[9,100]{1,0} parameter(0)
  %q = f32[1,100]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %new = f32[9,100]{1,0} dynamic-update-slice(%p, %q, %i, %zero)
  ROOT %both = (f32[9,100]{1,0}, f32[1,100]{1,0}) tuple(%new, %q)
}
"""
READ_TOO = """
%read_too (p: f32[9,100], q: f32[1,100], i: s32[]) -> f32[9,100] {
  %p = f32[9,100]{1,0} parameter(0)
  %q = f32[1,100]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %new = f32[9,100]{1,0} dynamic-update-slice(%p, %q, %i, %i)
  ROOT %sum = f32[9,100]{1,0} add(%new, %new)
}
"""


@pytest.mark.parametrize(
    ('entry', 'size'),
    [
        ('f32[1,100]{1,0} fusion(%a, %i), kind=kLoop, calls=%slice', 400 + 4 + 400),
        (
            '(f32[9,100]{1,0}, f32[1,100]{1,0}) fusion(%a, %b, %i), kind=kLoop, calls=%update',
            400 + 4 + 400 + 400,
        ),
        (
            'f32[1,100]{1,0} dynamic-slice(%a, %i, %i), dynamic_slice_sizes={1,100}',
            400 + 4 + 4 + 400,
        ),
        ('f32[9,100]{1,0} dynamic-update-slice(%a, %b, %i, %i)', 400 + 4 + 4 + 400),
        ('f32[9,100]{1,0} scatter(%a, %i, %b), to_apply=%add', 400 + 4 + 400 + 400),
        (
            'f32[9,100]{1,0} fusion(%a, %b, %i), kind=kLoop, calls=%read_too',
            3600 + 400 + 4 + 3600,
        ),
        ('f32[9,100]{1,0} add(%a, %a)', 3 * 3600),
    ],
    ids=['fused slice', 'fused update', 'slice', 'update', 'scatter', 'read too', 'whole'],
)
def test_of_an_array_that_is_sliced_or_written_into_the_slice_moves(entry, size):
    """Loops over boxes would read a feature map in whole for each of them."""
    before = [
        '%a = f32[9,100]{1,0} parameter(0)',
        '%b = f32[1,100]{1,0} parameter(1)',
        '%i = s32[] parameter(2)',
    ]
    assert traffic([*before, f'ROOT %r = {entry}'], SLICE, UPDATE, READ_TOO).hbm_bytes == size
