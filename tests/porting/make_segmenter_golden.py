"""Writes tests/porting/golden/segmenter_*.npz: what mmsegmentation's segmenters give.

    pip install -r requirements-mmsegmentation.txt    # It says how.
    OMP_NUM_THREADS=1 python -m tests.porting.make_segmenter_golden [CASE ...]

Weights and images are drawn again by the tests. A file holds the names and shapes of the state
dict, a summary of every map (without windows), and the label of every pixel.
"""

import json
import sys
from pathlib import Path

import numpy as np

from tests.porting import mmsegmentation_peer as peer
from tests.porting.detector_checks import summary
from tests.porting.detector_weights import detector_image, detector_weights
from tests.porting.segmenter_configs import CONFIGS

GOLDEN = Path(__file__).parent / 'golden'
SEED = 0
LIMITS = (97, 65)  # Of the long and the short side.
SMALL, LARGE = (49, 73), (91, 137)
# The configuration, the image's size, and side and stride of the windows.
CASES = {
    'r50_cityscapes': ('gcnet_r50-d8_4xb2-40k_cityscapes-512x1024', SMALL, None),
    'r50_cityscapes_769': ('gcnet_r50-d8_4xb2-80k_cityscapes-769x769', LARGE, (49, 33)),
    'r50_voc': ('gcnet_r50-d8_4xb4-20k_voc12aug-512x512', LARGE, None),
    'r101_ade20k': ('gcnet_r101-d8_4xb4-160k_ade20k-512x512', SMALL, None),
}
MAPS = ('c2', 'c3', 'c4', 'c5', 'head_logits')


def write(case: str) -> None:
    config, size, windows = CASES[case]
    model = peer.build(config)
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    peer.load(model, detector_weights(shapes, SEED))
    kept = peer.run(model, detector_image(*size, SEED), LIMITS, windows)
    told = {
        'model': CONFIGS[config],
        'seed': SEED,
        'image': [*size, SEED],
        'limits': LIMITS,
        'windows': windows,
        'state_dict': shapes,
    }
    maps = {name: kept[name] for name in ('input', 'logits', 'original_logits')}
    if windows is None:
        maps |= {name: kept['windows'][0][name] for name in MAPS}
    best = np.sort(kept['original_logits'], axis=-1)[..., -2:]
    print(case, kept['input'].shape, f'{len(kept["windows"])} windows')
    print('classes', len(np.unique(kept['labels'])), 'margins', np.sort(np.diff(best).ravel())[:5])
    np.savez_compressed(
        GOLDEN / f'segmenter_{case}.npz',
        told=np.frombuffer(json.dumps(told).encode(), np.uint8),
        **{name: summary(value) for name, value in maps.items()},
        labels=kept['labels'],
    )


if __name__ == '__main__':
    for chosen in sys.argv[1:] or CASES:
        write(chosen)
