"""Writes tests/porting/golden/detector_*.npz: what mmdetection's detectors find with drawn weights.

    pip install -r requirements-mmdetection.txt    # It says how.
    OMP_NUM_THREADS=1 python -m tests.porting.make_detector_golden [CASE ...]

Weights and images are drawn again by the tests. A file holds the names and shapes of the state
dict, a summary of every map, and the proposals and detections. Images are taken in which no
decision is close: each of `LEAST` is many times what rounding moves.
"""

import json
import sys
from pathlib import Path

import numpy as np

from tests.porting import mmdetection_peer as peer
from tests.porting.detector_checks import summary
from tests.porting.detector_configs import CONFIGS
from tests.porting.detector_weights import detector_image, detector_weights, with_background

GOLDEN = Path(__file__).parent / 'golden'
SEED = 0
# Both are padded to 128x128, so that the tests compile one program for them.
LANDSCAPE, PORTRAIT = (75, 91), (91, 75)
LIMITS = (121, 100)  # Of the long and the short side.
X101 = 'mask-rcnn_x101-32x4d-syncbn'
R50 = 'mask-rcnn_r50-gcb-r16-c3-c5_fpn_1x_coco'
# The configuration, the image's size, and what is added to the background (None: what suits it).
CASES = {
    'r50_r16_landscape': (R50, LANDSCAPE, None),
    'r50_r16_portrait': (R50, PORTRAIT, None),
    'r50_r16_nothing': (R50, LANDSCAPE, 99.0),
    'r101_r4': ('mask-rcnn_r101-syncbn-gcb-r4-c3-c5_fpn_1x_coco', LANDSCAPE, None),
    'x101': (f'{X101}_fpn_1x_coco', LANDSCAPE, None),
    'cascade_x101_r4': (f'cascade-{X101}-r4-gcb-c3-c5_fpn_1x_coco', LANDSCAPE, None),
    'cascade_x101_dcn_r16': (
        *(f'cascade-{X101}-dconv-c3-c5-r16-gcb-c3-c5_fpn_1x_coco', LANDSCAPE),
        None,
    ),
}
LEAST = {
    'rpn_overlap': 4e-5,
    'rpn_order': 5e-6,
    'level': 1e-4,
    'score': 5e-5,
    'overlap': 3e-4,
    'order': 4e-5,
}


def choose(model, weights, size, background):
    """(seed of the image, background, its stages) of the first image without close decisions."""
    for seed in range(100):
        image, more = detector_image(*size, seed), background
        if more is None:
            peer.load(model, weights)
            more = peer.choose_background(peer.run(model, image, LIMITS), candidates=60)
        peer.load(model, weights | with_background(weights, more))
        kept = peer.run(model, image, LIMITS)
        found = peer.margins(kept)
        close = {name: value for name, value in found.items() if value < LEAST[name]}
        count = len(kept['labels'])
        print(seed, more, len(kept['rois0']), count, close, flush=True)
        if not close and (count > 20 or background is not None):
            return seed, more, kept
    raise SystemExit('every image has a close decision')


def write(case: str) -> None:
    config, size, background = CASES[case]
    model = peer.build(config)
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    weights = detector_weights(shapes, SEED)
    image_seed, background, kept = choose(model, weights, size, background)
    told = {
        'model': CONFIGS[config],
        'seed': SEED,
        'background': background,
        'image': [*size, image_seed],
        'limits': LIMITS,
        'state_dict': shapes,
    }
    maps = {name: summary(kept[name]) for name in kept if name[0] in 'cp' or name == 'input'}
    np.savez_compressed(
        GOLDEN / f'detector_{case}.npz',
        told=np.frombuffer(json.dumps(told).encode(), np.uint8),
        **maps,
        proposals=kept['rois0'],
        proposal_scores=kept['rpn_nms'][1][kept['rpn_nms'][3]][: len(kept['rois0'])],
        **{name: kept[name] for name in ('boxes', 'original_boxes', 'scores', 'size')},
        labels=kept['labels'].astype(np.uint8),
        masks=kept['masks'][:5],
        mask_means=kept['masks'].mean(axis=(1, 2)),
        original_masks=np.packbits(kept['original_masks']),
    )


if __name__ == '__main__':
    for chosen in sys.argv[1:] or CASES:
        print(chosen, flush=True)
        write(chosen)
