"""The conversion of tensors and what is reported of it, on modules of a few values."""

import re

import flax.traverse_util
import numpy as np
import pytest

from gcnet_jax.context import GlobalContext
from gcnet_jax.errors import CheckpointError
from gcnet_jax.models import create_model
from gcnet_jax.porting.convert import (
    Difference,
    Report,
    from_torch,
    to_torch_arrays,
    variable_shapes,
)
from gcnet_jax.porting.families import FAMILIES, is_classifier, mmsegmentation
from tests.porting.seeded import in_memory, seeded_tensors

FAMILY = {family.library: family for family in FAMILIES}
BLOCK = GlobalContext(ratio=1 / 4)
BLOCK_SHAPES = {
    'conv_mask.weight': (1, 8, 1, 1),
    'conv_mask.bias': (1,),
    'channel_add_conv.0.weight': (2, 8, 1, 1),
    'channel_add_conv.0.bias': (2,),
    'channel_add_conv.1.weight': (2, 1, 1),
    'channel_add_conv.1.bias': (2, 1, 1),
    'channel_add_conv.3.weight': (8, 2, 1, 1),
    'channel_add_conv.3.bias': (8,),
}
BLOCK_VALUES = 8 + 1 + 16 + 2 + 2 + 2 + 16 + 8


def convert_block(tensors, **options):
    return from_torch(in_memory(tensors), mmsegmentation.FAMILY, BLOCK, channels=8, **options)


def network(**options):
    small = {'widths': (4,), 'stage_sizes': (1,), 'num_classes': 3, 'context': None}
    return create_model('resnet18', **small | options)


def arrays_of(model, library):
    """Variables of a network, counted up, and the tensors that they are there."""
    shapes = variable_shapes(model)
    flat = {
        path: 1 + np.arange(np.prod(leaf.shape), dtype=np.float32).reshape(leaf.shape)
        for path, leaf in shapes.items()
    }
    variables = flax.traverse_util.unflatten_dict(flat, sep='/')
    return variables, *to_torch_arrays(variables, FAMILY[library])


def test_every_value_is_counted_and_copied():
    tensors = seeded_tensors(BLOCK_SHAPES)
    variables, report = convert_block(tensors)
    assert (report.ported, report.values, report.left) == (8, BLOCK_VALUES, {})
    assert report.lines() == [f'mmsegmentation: 8 tensors, {BLOCK_VALUES} values, ported']
    kernel = variables['params']['add']['reduce']['kernel']
    source = tensors['channel_add_conv.0.weight']
    np.testing.assert_array_equal(kernel, source[:, :, 0, 0].T)
    assert kernel.flags['C_CONTIGUOUS']
    assert not any(
        np.shares_memory(leaf, tensor)
        for leaf in flax.traverse_util.flatten_dict(variables).values()
        for tensor in tensors.values()
    )


def test_what_lies_around_a_block_is_left_and_listed():
    head = {f'decode_head.gc_block.{name}': shape for name, shape in BLOCK_SHAPES.items()}
    around = {f'backbone.conv{index}.weight': (2, 2) for index in range(3)}
    _, report = convert_block(seeded_tensors(head | around | {'neck.bias': (1,)}))
    assert report.left == {
        "the segmenter's backbone": tuple(around),
        'other parts of the segmenter': ('neck.bias',),
    }
    assert report.lines()[1:] == [
        "left 3: the segmenter's backbone (backbone.conv0.weight, backbone.conv1.weight and 1 "
        'more)',
        'left 1: other parts of the segmenter (neck.bias)',
    ]


def test_a_report_names_the_modules_that_are_new():
    paths = [f'params/{module}/{leaf}' for module in 'hgfedcba' for leaf in ('bias', 'kernel')]
    report = Report('timm', 5, 12345, {}, tuple(paths), ('beware',), 'state_dict_ema')
    assert report.lines() == [
        'timm: 5 tensors of state_dict_ema, 12,345 values, ported',
        'newly initialised 16: a, b, c, d, e, f and 2 more',
        'warning: beware',
    ]


def test_a_variance_may_be_zero_but_not_negative():
    model = network()
    _, arrays, _ = arrays_of(model, 'torchvision')
    arrays['bn1.running_var'][:2] = 0
    arrays['bn1.running_mean'][:] = -1
    variables, report = from_torch(in_memory(arrays), FAMILY['torchvision'], model)
    assert report.warnings == ()
    np.testing.assert_array_equal(variables['batch_stats']['stem_norm']['var'], [0, 0, 3, 4])
    arrays['bn1.running_var'][:2] = -0.5
    arrays['bn1.weight'][3] = np.nan
    _, report = from_torch(in_memory(arrays), FAMILY['torchvision'], model, allow_nonfinite=True)
    (warning,) = report.warnings
    counted, _, names = warning.partition(', in 2 tensors: ')
    assert counted == '3 values are NaN, infinite or negative variances'
    assert sorted(names.split(', ')) == ['bn1.running_var', 'bn1.weight']


def test_there_and_back_is_the_same():
    model = network()
    variables, arrays, report = arrays_of(model, 'torchvision')
    flat = flax.traverse_util.flatten_dict(variables, sep='/')
    assert (report.ported, report.left) == (len(flat), {})
    assert report.values == sum(leaf.size for leaf in flat.values())
    counters = {name for name in arrays if name.endswith('num_batches_tracked')}
    assert counters == {
        f'{norm}.num_batches_tracked' for norm in ('bn1', 'layer1.0.bn1', 'layer1.0.bn2')
    }
    assert {(arrays[name].dtype, arrays[name].shape) for name in counters} == {
        (np.dtype('int64'), ())
    }
    back, report = from_torch(in_memory(arrays), FAMILY['torchvision'], model)
    assert list(report.left.values()) == [tuple(name for name in arrays if name in counters)]
    for path, value in flax.traverse_util.flatten_dict(back, sep='/').items():
        np.testing.assert_array_equal(value, flat[path])


def test_a_classifier_is_dropped_where_asked():
    _, arrays, _ = arrays_of(network(), 'torchvision')
    weights = {name: value for name, value in arrays.items() if 'tracked' not in name}
    for classes in (0, 5):
        variables, report = from_torch(
            in_memory(weights), FAMILY['torchvision'], network(num_classes=classes),
            drop_classifier=True,
        )  # fmt: skip
        (dropped,) = report.left.values()
        assert sorted(dropped) == ['fc.bias', 'fc.weight']
        assert report.ported == len(weights) - 2
        assert ('classifier' in variables['params']) == (classes > 0)
        new = ('params/classifier/bias', 'params/classifier/kernel') if classes else ()
        assert report.initialised == new


def test_what_the_library_has_no_place_for_is_lost_or_refused():
    context = {'position': 'after_conv2', 'stages': 1}
    gc = network(context=context)
    _, arrays, report = arrays_of(gc, 'mmdetection')
    ((reason, lost),) = report.left.items()
    assert reason == 'mmdetection has no place for it'
    assert sorted(lost) == ['params/classifier/bias', 'params/classifier/kernel']
    assert not any('fc' in name for name in arrays)
    with pytest.raises(CheckpointError, match=r'no names for 8 leaves .*and 2 more; .*mmdetection'):
        arrays_of(gc, 'torchvision')
    with pytest.raises(CheckpointError, match=r'no names .*choose the library that'):
        arrays_of(network(), 'timm')
    two = network(context=[context, context | {'position': 'after_conv1'}])
    with pytest.raises(CheckpointError, match='one name for two context blocks'):
        from_torch(in_memory(arrays), FAMILY['mmdetection'], two)


def difference(missing=(), extra=(), misshapen=(), nameless=()):
    return Difference(missing, extra, misshapen, nameless)


@pytest.mark.parametrize(
    ('found', 'reason'),
    [
        (difference(misshapen=[('fc.bias', (10,), (3,))]), 'give num_classes=10 .* one of 3'),
        (
            difference(misshapen=[('conv1.weight', (8, 1, 3, 3), (8, 3, 3, 3))]),
            'images of 1 channels; networks here read 3',
        ),
        (
            # A linear layer of another size has not to do with the colours.
            difference(misshapen=[('x.weight', (8, 1), (8, 3))]),
            'changed or is incomplete',
        ),
        (difference(extra=['layer1.0.se.fc1.weight']), 'SE ResNet'),
        (difference(extra=['layer1.0.conv2_offset.weight']), 'deformable'),
        (difference(misshapen=[('a.attn.conv.bias', (1,), (2,))]), 'ratio differs'),
        (difference(missing=['fc.weight']), 'a backbone: drop the classifier'),
        (difference(missing=['fc.weight', 'a.attn.b']), 'changed or is incomplete'),
        (difference(missing=['fc.weight'], misshapen=[('a', (1,), (2,))]), 'changed or is'),
        (difference(extra=['fc.weight', 'fc.bias']), 'has num_classes=0: drop'),
        (difference(extra=['fc.weight', 'b']), 'changed or is incomplete'),
        (difference(extra=['fc.weight'], misshapen=[('a', (1,), (2,))]), 'changed or is'),
        (difference(extra=['a.context_block.b']), 'name a GC network'),
        (difference(missing=['a.context_block.b']), 'name the plain network'),
        (difference(extra=['a.gc_block.b'], missing=['a.gc_block.c']), 'name the plain network'),
        (difference(missing=['a', 'b', 'c'], extra=['d', 'e', 'f']), 'changed or is incomplete'),
        (difference(missing=['a', 'b', 'c'], extra=['d', 'e', 'f', 'g']), 'of another network'),
        (difference(nameless=['params/a']), 'of another network'),
    ],
)
def test_the_likeliest_reason_is_given(found, reason):
    assert re.search(f'Most likely .*{reason}', found.message(FAMILY['timm']))


def test_a_difference_counts_everything_and_shows_six():
    assert not difference()
    names = [f'n{index}' for index in range(7)]
    found = difference(names, names[:6], [('a', (1, 2), (3,))], ['params/b'])
    assert found
    message = found.message(FAMILY['timm'])
    assert message.startswith(
        'the file does not fit the network: 1 of another shape: a is [1, 2], not [3]; '
        '7 missing in the file: n0, n1, n2, n3, n4, n5 and 1 more; '
        '6 without a place: n0, n1, n2, n3, n4, n5; '
        '1 of the network that timm does not have: params/b. Most likely'
    )
    for field in ('missing', 'extra', 'misshapen', 'nameless'):
        assert difference(**{field: ['x']})


def test_names_of_classifiers():
    for name in ('fc.weight', 'head.fc.bias', 'classifier.weight'):
        assert is_classifier(name)
    for name in ('fc1.weight', 'layer1.fc.conv.weight', 'afc.weight', 'fc.weights'):
        assert not is_classifier(name)
