"""Plans as a table for people and as plain values for programs."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from gcnet_jax.planning.chips import GIB
from gcnet_jax.planning.plan import Plan
from gcnet_jax.planning.program import Program

NOTE = """\
Bounds from the TPU compiler, not measurements: no TPU was used. A step takes at least the time of
its FLOPs, and that of its HBM bytes, at the peaks of the chip; the longer one is the bound.
Collectives and reading the data come on top."""
ABSENT = '-'


def format_plans(plans: Sequence[Plan]) -> str:
    """Lays the plans of a config out as a table, and what the context adds below."""
    title = f'{plans[0].network}: {plans[0].parameters:,} parameters'
    rows = [('', [plan.topology for plan in plans])]
    rows += [(label, [_cell(tell, plan) for plan in plans]) for label, tell in _ROWS]
    kinds = sorted({kind for plan in plans if plan.program for kind in _collectives(plan)})
    for kind in kinds:
        rows.append((f'{kind}, count and MB', [_collective(plan, kind) for plan in plans]))
    if not kinds:
        rows.append(('collectives', ['none'] * len(plans)))
    lines = [title, NOTE, '', *_align(rows)]
    for plan in plans:
        if plan.twin is not None:
            lines += ['', *_context_lines(plan)]
        if plan.program is not None and plan.program.traffic.unknown_loops:
            lines.append(
                f'{plan.topology}: {plan.program.traffic.unknown_loops} loops with an unknown '
                'number of turns were counted once'
            )
    return '\n'.join(lines)


def format_progress(plan: Plan) -> str:
    """Says in a line what was just tried."""
    memory = f'{_needed_gib(plan)} of {plan.chip.hbm_bytes / GIB:.2f} GiB'
    result = ': DOES NOT FIT'
    if plan.program is not None:
        result = f', compiled in {plan.program.compile_seconds:.0f} s'
    return f'{plan.topology}, {plan.batch_per_chip:g} images a chip: {memory}{result}'


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """Returns a plan as plain values: bytes, FLOPs and seconds, per chip unless noted."""
    values = {
        'network': plan.network,
        'topology': plan.topology,
        'chips': plan.chips,
        'batch_size': plan.batch_size,
        'batch_per_chip': plan.batch_per_chip,
        'parameters': plan.parameters,
        'fits': plan.program is not None,
        'hbm_needed_bytes': plan.needed_bytes,
        'hbm_available_bytes': round(plan.chip.hbm_bytes),
    }
    if plan.program is not None:
        values |= _program_to_dict(plan.program) | plan.bounds()
    if plan.twin is not None:
        values['without_context'] = {
            'parameters': plan.twin_parameters,
            **_program_to_dict(plan.twin),
            **plan.without_context().bounds(),
        }
    return values


def _program_to_dict(program: Program) -> dict[str, Any]:
    values = dataclasses.asdict(program)
    traffic = values.pop('traffic')
    return values | {'memory': program.memory} | traffic


def _cell(tell: Callable[[Plan], str], plan: Plan) -> str:
    return tell(plan) if plan.program is not None or tell in _ALWAYS else ABSENT


def _needed_gib(plan: Plan) -> str:
    return '?' if plan.needed_bytes is None else f'{plan.needed_bytes / GIB:.2f}'


def _needed(plan: Plan) -> str:
    fits = '' if plan.program is not None else ' DOES NOT FIT'
    return f'{_needed_gib(plan)} of {plan.chip.hbm_bytes / GIB:.2f}{fits}'


def _batch(plan: Plan) -> str:
    return f'{plan.batch_per_chip:,.6g} x {plan.chips:,} = {plan.batch_size:,}'


def _collectives(plan: Plan) -> dict:
    return plan.program.traffic.collectives


def _collective(plan: Plan, kind: str) -> str:
    found = _collectives(plan).get(kind) if plan.program is not None else None
    return f'{found.count} x, {found.bytes / 1e6:.2f}' if found else ABSENT


def _images_per_chip(value: float, plan: Plan) -> float:
    return value / plan.batch_per_chip


_ROWS: tuple[tuple[str, Callable[[Plan], str]], ...] = (
    ('images a step: a chip x chips', _batch),
    ('HBM needed of a chip, GiB', _needed),
    ('  arguments', lambda plan: f'{plan.program.arguments / GIB:.2f}'),
    ('  outputs', lambda plan: f'{plan.program.outputs / GIB:.2f}'),
    ('  of them in the place of arguments', lambda plan: f'{-plan.program.aliased / GIB:.2f}'),
    ('  temporaries', lambda plan: f'{plan.program.temporaries / GIB:.2f}'),
    ('  program', lambda plan: f'{plan.program.code / GIB:.2f}'),
    ('TFLOP of a chip, a step', lambda plan: f'{plan.program.flops / 1e12:.3f}'),
    (
        'GFLOP an image',
        lambda plan: f'{_images_per_chip(plan.program.flops, plan) / 1e9:.2f}',
    ),
    ('HBM GB of a chip, a step', lambda plan: f'{plan.program.traffic.hbm_bytes / 1e9:.2f}'),
    (
        'HBM MB an image',
        lambda plan: f'{_images_per_chip(plan.program.traffic.hbm_bytes, plan) / 1e6:.1f}',
    ),
    ('ms for the FLOPs', lambda plan: f'{plan.bounds()["arithmetic_seconds"] * 1e3:.1f}'),
    ('ms for the HBM bytes', lambda plan: f'{plan.bounds()["memory_seconds"] * 1e3:.1f}'),
    ('bound by', lambda plan: plan.bounds()['bound_by']),
    ('images/s, at most', lambda plan: f'{plan.bounds()["images_per_second"]:,.0f}'),
    ('MFU, at most', lambda plan: f'{plan.bounds()["mfu"]:.1%}'),
    (
        'gradients in float32, MB',
        lambda plan: f'{4 * plan.parameters / 1e6:.2f}',
    ),
)
_ALWAYS = {_batch, _needed}


def _context_lines(plan: Plan) -> list[str]:
    twin, program = plan.twin, plan.program
    before, after = plan.without_context().bounds(), plan.bounds()
    changes = (
        ('parameters', plan.twin_parameters, plan.parameters, 1e6, 'M'),
        ('HBM needed', twin.memory, program.memory, GIB, 'GiB'),
        ('FLOPs', twin.flops, program.flops, 1e12, 'T'),
        ('HBM bytes', twin.traffic.hbm_bytes, program.traffic.hbm_bytes, 1e9, 'GB'),
        (
            'images/s, at most',
            before['images_per_second'],
            after['images_per_second'],
            1,
            '',
        ),
    )
    rows = [
        (f'  {label}', [f'{old / unit:,.2f}', f'{new / unit:,.2f} {name}', f'{new / old - 1:+.1%}'])
        for label, old, new, unit, name in changes
    ]
    title = f'What the context adds, on {plan.topology}, to the same network without it:'
    return [title, *_align([('', ['without', 'with', '']), *rows])]


def _align(rows: Sequence[tuple[str, list[str]]]) -> list[str]:
    first = max(len(label) for label, _ in rows)
    widths = [max(len(cells[i]) for _, cells in rows) for i in range(len(rows[0][1]))]
    return [
        '  '.join(
            [f'{label:<{first}}'] + [f'{c:>{w}}' for c, w in zip(cells, widths, strict=True)]
        ).rstrip()
        for label, cells in rows
    ]
