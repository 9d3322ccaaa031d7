"""What mmsegmentation's own segmenters give with drawn weights, against what is computed here.

From the image on: every map to 1e-5 of its largest value, and the same label for
every pixel of the original image. The golden files hold results and names, not weights: see
make_segmenter_golden.py.
"""

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
from gcnet_jax.ops.resize import resize_bilinear
from gcnet_jax.porting.convert import from_torch
from gcnet_jax.porting.recognise import recognise_family, recognise_model
from tests.porting.detector_checks import near, summary
from tests.porting.detector_weights import detector_image, detector_weights
from tests.porting.seeded import in_memory

GOLDEN = Path(__file__).parent / 'golden'
CASES = ('r50_cityscapes', 'r50_cityscapes_769', 'r50_voc', 'r101_ade20k')
MAPS = {f'stage{k - 1}': f'c{k}' for k in range(2, 6)} | {'head_logits': 'head_logits'}


def read(case):
    golden = dict(np.load(GOLDEN / f'segmenter_{case}.npz'))
    return json.loads(golden.pop('told').tobytes()), golden


def network(told):
    """The network that the file's tensors are recognised as, with its windows, and variables."""
    weights = detector_weights(told['state_dict'], told['seed'])
    tensors = in_memory(weights)
    family = recognise_family(tensors)
    name, options = recognise_model(tensors.shapes, family)
    # Whether windows are used is not in the tensors.
    assert name == told['model'].removesuffix('_769')
    if told['windows']:
        options |= dict(zip(('window', 'window_stride'), told['windows'], strict=True))
    model = create_model(told['model'], **options)
    variables, report = from_torch(tensors, family, model)
    counters = [name for name in weights if name.endswith('num_batches_tracked')]
    assert report.ported == len(weights) - len(counters)
    assert not report.initialised
    return model, variables


def prepared(told):
    """The image that the network reads."""
    height, width, image_seed = told['image']
    preprocessing = KeepRatio(
        short_side=told['limits'][1], long_side=told['limits'][0], multiple_of=1
    )
    size = keep_ratio.resized_shape(height, width, preprocessing)
    resized = keep_ratio.resize(detector_image(height, width, image_seed), size)
    return normalize(jnp.asarray(resized)[None], preprocessing.mean, preprocessing.std)


def run(function, *arguments):
    """Compiles for a short compilation."""
    options = {'xla_backend_optimization_level': 0}
    return jax.jit(function).lower(*arguments).compile(compiler_options=options)(*arguments)


@pytest.mark.parametrize('case', CASES)
def test_the_same_maps_and_labels(case):
    told, golden = read(case)
    model, variables = network(told)
    images = prepared(told)
    # The maps of the whole image are not those of windows.
    maps = {} if told['windows'] else MAPS

    def outputs(variables, images):
        found = model.apply(variables, images, train=False, method='outputs')
        kept = {theirs: found[name] for name, theirs in maps.items()}
        size, align = told['image'][:2], model.align_corners
        resized = resize_bilinear(found['logits'], size, align_corners=align)
        return kept | {'input': images, 'logits': found['logits'], 'original_logits': resized}

    found = run(outputs, variables, images)
    differences = {name: near(summary(value), golden[name]) for name, value in found.items()}
    print({key: f'{value:.1e}' for key, value in differences.items()})
    assert max(differences.values()) < 1e-5, differences
    original = np.asarray(found['original_logits'][0])
    labels = original.argmax(-1)
    best = np.sort(original, axis=-1)
    is_clear = best[..., -1] - best[..., -2] > 1e-4
    assert labels.shape == golden['labels'].shape == tuple(told['image'][:2])
    np.testing.assert_array_equal(labels[is_clear], golden['labels'][is_clear])
    assert is_clear.mean() > 0.99
    assert len(np.unique(labels)) > 10
