import dataclasses
import json

import pytest

from gcnet_jax.planning.chips import CHIPS
from gcnet_jax.planning.hlo import Traffic
from gcnet_jax.planning.report import format_plans, format_progress, plan_to_dict


def rows(text):
    """The cells of every line, by its label."""
    lines = [line.split('  ') for line in text.splitlines() if '  ' in line]
    return {
        label: cells
        for label, *cells in (
            [cell.strip() for cell in line if cell.strip()] for line in lines if any(line)
        )
    }


def test_the_table_says_what_it_is(example_plan):
    text = format_plans([example_plan])
    assert text.splitlines()[0] == 'net, 8 pixels, float32: 1,000,000 parameters'
    assert 'not measurements' in text
    assert all(len(line) <= 100 for line in text.splitlines())


def test_the_table_has_every_number(example_plan):
    table = rows(format_plans([example_plan]))
    assert table['images a step: a chip x chips'] == ['100 x 4 = 400']
    assert table['HBM needed of a chip, GiB'] == ['13.00 of 15.75']
    assert table['arguments'] == ['5.00']
    assert table['of them in the place of arguments'] == ['-1.00']
    assert table['TFLOP of a chip, a step'] == ['49.250']
    assert table['GFLOP an image'] == ['492.50']
    assert table['HBM GB of a chip, a step'] == ['409.50']
    assert table['HBM MB an image'] == ['4095.0']
    assert table['ms for the FLOPs'] == ['250.0']
    assert table['ms for the HBM bytes'] == ['500.0']
    assert table['bound by'] == ['memory']
    assert table['images/s, at most'] == ['800']
    assert table['MFU, at most'] == ['50.0%']
    assert table['gradients in float32, MB'] == ['4.00']
    assert table['all-reduce, count and MB'] == ['3 x, 2.50']


def test_topologies_stand_side_by_side(example_plan, make_program):
    other = dataclasses.replace(
        example_plan,
        topology='v6e:4x4',
        chip=CHIPS['v6e'],
        chips=16,
        batch_size=1600,
        program=make_program(collectives={}),
    )
    too_large = dataclasses.replace(
        example_plan, topology='v5e:1x1', chips=1, program=None, needed_bytes=20 * 2**30
    )
    text = format_plans([example_plan, other, too_large])
    header = next(line for line in text.splitlines() if 'v5e' in line)
    assert header.split() == ['v5e:2x2', 'v6e:4x4', 'v5e:1x1']
    table = rows(text)
    assert table['images/s, at most'] == ['800', '6,400', '-']
    assert table['all-reduce, count and MB'] == ['3 x, 2.50', '-', '-']
    assert table['HBM needed of a chip, GiB'][2] == '20.00 of 15.75 DOES NOT FIT'


def test_a_need_that_is_not_known(example_plan):
    plan = dataclasses.replace(example_plan, program=None, needed_bytes=None)
    text = format_plans([plan])
    assert '? of 15.75 DOES NOT FIT' in text
    assert rows(text)['collectives'] == ['none']


def test_what_the_context_adds(example_plan, make_program):
    twin = make_program(flops=197e12 / 8, hbm_bytes=round(819e9 / 4), temporaries=2**31)
    plan = dataclasses.replace(example_plan, twin=twin, twin_parameters=800_000)
    table = rows(format_plans([plan]).split('What the context adds')[1])
    assert table['parameters'] == ['0.80', '1.00 M', '+25.0%']
    assert table['HBM needed'] == ['12.00', '13.00 GiB', '+8.3%']
    assert table['FLOPs'] == ['24.62', '49.25 T', '+100.0%']
    assert table['HBM bytes'] == ['204.75', '409.50 GB', '+100.0%']
    assert table['images/s, at most'] == ['1,600.00', '800.00', '-50.0%']


def test_loops_that_are_not_understood_are_told(example_plan, make_program):
    program = make_program(traffic=Traffic({}, 10, unknown_loops=2))
    text = format_plans([dataclasses.replace(example_plan, program=program)])
    assert 'v5e:2x2: 2 loops with an unknown number of turns' in text


def test_progress_is_one_line(example_plan):
    assert format_progress(example_plan) == (
        'v5e:2x2, 100 images a chip: 13.00 of 15.75 GiB, compiled in 12 s'
    )
    plan = dataclasses.replace(example_plan, program=None, needed_bytes=20 * 2**30)
    assert format_progress(plan) == 'v5e:2x2, 100 images a chip: 20.00 of 15.75 GiB: DOES NOT FIT'


def test_plain_values(example_plan, make_program):
    plan = dataclasses.replace(example_plan, twin=make_program(), twin_parameters=800_000)
    values = json.loads(json.dumps(plan_to_dict(plan)))
    assert values['fits'] is True
    assert values['hbm_needed_bytes'] == 13 * 2**30
    assert values['hbm_available_bytes'] == round(15.75 * 2**30)
    assert values['collectives'] == {'all-reduce': {'count': 3, 'bytes': 2_500_000}}
    assert values['hbm_bytes'] == 409.5e9
    assert values['images_per_second'] == pytest.approx(800)
    assert values['without_context']['parameters'] == 800_000
    assert values['without_context']['bound_by'] == 'memory'


def test_plain_values_of_what_does_not_fit(example_plan):
    values = plan_to_dict(dataclasses.replace(example_plan, program=None, needed_bytes=None))
    assert values['fits'] is False
    assert 'flops' not in values
    assert json.loads(json.dumps(values))['hbm_needed_bytes'] is None
