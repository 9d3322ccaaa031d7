"""What mmdetection's own detectors find with drawn weights, against what is found here.

From the image on: the maps to 1e-5 of their largest value, the same proposals in the same order,
the same detections with the same labels, and the same masks. The golden files hold results and
names, not weights: see make_detector_golden.py.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcnet_jax.data import keep_ratio
from gcnet_jax.data.on_device import normalize
from gcnet_jax.data.preprocessing import KeepRatio
from gcnet_jax.models import create_model
from gcnet_jax.porting.convert import from_torch
from gcnet_jax.porting.recognise import recognise_family, recognise_model
from tests.porting.detector_checks import masks_differ, near, same_boxes, summary
from tests.porting.detector_weights import detector_image, detector_weights, with_background
from tests.porting.seeded import in_memory

GOLDEN = Path(__file__).parent / 'golden'
R50 = ('r50_r16_landscape', 'r50_r16_nothing', 'r50_r16_portrait')
# The first has nearly all that the others have.
OTHERS = (
    'cascade_x101_dcn_r16',
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in ('r101_r4', 'x101', 'cascade_x101_r4')
    ),
)
MAPS = {f'stage{k - 1}': f'c{k}' for k in range(2, 6)} | {f'p{k}': f'p{k}' for k in range(2, 7)}


def read(case):
    golden = dict(np.load(GOLDEN / f'detector_{case}.npz'))
    return json.loads(golden.pop('told').tobytes()), golden


@functools.lru_cache(maxsize=1)
def network(names_and_shapes, seed):
    """(the name of what is recognised, the network, its variables, the biases of its logits)."""
    shapes = json.loads(names_and_shapes)
    weights = detector_weights(shapes, seed)
    tensors = in_memory(weights)
    family = recognise_family(tensors)
    name, options = recognise_model(tensors.shapes, family)
    model = create_model(name, **options)
    variables, report = from_torch(tensors, family, model)
    counters = [name for name in weights if name.endswith('num_batches_tracked')]
    assert report.ported == len(weights) - len(counters)
    biases = {key: value for key, value in weights.items() if key.endswith('fc_cls.bias')}
    return name, model, variables, biases


@functools.lru_cache(maxsize=1)
def compiled(names_and_shapes, seed, padded):
    """The whole network for images of one padded size, compiled for a short compilation."""
    _, model, variables, _ = network(names_and_shapes, seed)

    def outputs(variables, images, sizes):
        return model.apply(variables, images, sizes, train=False, method='outputs')

    arguments = variables, jnp.zeros((1, *padded, 3)), jnp.zeros((1, 2))
    options = {'xla_backend_optimization_level': 0}
    return jax.jit(outputs).lower(*arguments).compile(compiler_options=options)


def run(told):
    """(the network's name, its input, its outputs, height and width of the original)."""
    key = json.dumps(told['state_dict']), told['seed']
    name, _, variables, biases = network(*key)
    params = dict(variables['params'])
    for number, bias in enumerate(with_background(biases, told['background']).values()):
        head = dict(params[f'box_head_{number}'])
        params[f'box_head_{number}'] = head | {'logits': head['logits'] | {'bias': bias}}
    height, width, image_seed = told['image']
    preprocessing = KeepRatio(short_side=told['limits'][1], long_side=told['limits'][0])
    size = keep_ratio.resized_shape(height, width, preprocessing)
    resized = keep_ratio.resize(detector_image(height, width, image_seed), size)
    images = np.zeros((1, *preprocessing.padded(*size), 3), np.float32)
    images[0, : size[0], : size[1]] = normalize(
        jnp.asarray(resized)[None], preprocessing.mean, preprocessing.std
    )[0]
    function = compiled(*key, images.shape[1:3])
    outputs = function(variables | {'params': params}, images, np.array([size], np.float32))
    return name, images, {key: np.asarray(value) for key, value in outputs.items()}, size


def check(case):
    told, golden = read(case)
    name, images, outputs, size = run(told)
    # Without a name or a config in the file, its norms may be of either kind.
    assert told['model'] in (name, f'{name}_syncbn')
    assert size == tuple(golden['size'])
    differences = {
        theirs: near(summary(value), golden[theirs])
        for theirs, value in [('input', images)] + [(MAPS[k], outputs[k]) for k in MAPS]
    }
    print({key: f'{value:.1e}' for key, value in differences.items()})
    assert max(differences.values()) < 1e-5, differences
    proposals = golden['proposals']
    count = len(proposals)
    assert outputs['proposals'].shape == (1, 1000, 4)
    assert not outputs['proposals'][0, count:].any()
    largest = max(images.shape)
    same_boxes(
        outputs['proposals'][0, :count], proposals, golden['proposal_scores'], 1e-5 * largest, 1e-5
    )
    found = outputs['valid'][0].nonzero()[0]
    assert len(found) == len(golden['labels'])
    np.testing.assert_array_equal(found, np.arange(len(found)))
    np.testing.assert_array_equal(outputs['labels'][0, found], golden['labels'])
    if not len(found):
        return
    boxes, scores = outputs['boxes'][0, found], outputs['scores'][0, found]
    assert np.abs(boxes - golden['boxes']).max() < 2e-5 * largest
    assert np.abs(scores - golden['scores']).max() < 1e-4
    check_masks(outputs['masks'][0, found], boxes, size, told, golden)


def check_masks(masks, boxes, size, told, golden):
    original = told['image'][:2]
    # Random masks are steep.
    assert np.abs(masks[:5] - golden['masks']).max() < 3e-4
    assert np.abs(masks.mean(axis=(1, 2)) - golden['mask_means']).max() < 1e-5
    scale = np.array([new / old for new, old in zip(size, original, strict=True)], np.float32)
    boxes = boxes / np.tile(scale[::-1], 2)
    np.testing.assert_allclose(boxes, golden['original_boxes'], atol=2e-5 * max(original))
    count = len(boxes) * original[0] * original[1]
    expected = np.unpackbits(golden['original_masks'], count=count).reshape(-1, *original)
    assert not masks_differ(boxes, masks, expected.astype(bool), doubt=3e-4)


def test_r50_with_padding_in_portrait_and_without_a_detection():
    """One test: the three share a program."""
    for case in R50:
        check(case)
        told, golden = read(case)
        height, width = told['image'][:2]
        assert (height > width) == (case == 'r50_r16_portrait')
        assert (len(golden['labels']) == 0) == (case == 'r50_r16_nothing')


@pytest.mark.parametrize('case', OTHERS)
def test_deeper_wider_cascaded_and_deformable(case):
    check(case)
