"""Every published configuration against mmdetection's own network, with fresh weights every run.

GCNET_SEED repeats a run; pytest prints the seed of one that fails. Each part gets what the previous
one of mmdetection gave, and then all parts run one after the other. Images in which a decision is
so close that rounding could change it are left out.
"""

import os
import secrets

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcnet_jax.data import keep_ratio
from gcnet_jax.data.on_device import normalize
from gcnet_jax.data.preprocessing import KeepRatio
from gcnet_jax.models.mask_rcnn import STDS, STRIDES
from gcnet_jax.models.roi_heads import BOX_SIZE, MAX_DETECTIONS, Detections, detect
from gcnet_jax.models.rpn import PROPOSALS, anchor_boxes, propose
from gcnet_jax.ops.boxes import decode_deltas
from gcnet_jax.porting import port, port_reverse
from gcnet_jax.stored import load_variables
from tests.porting.detector_checks import masks_differ, same_boxes
from tests.porting.detector_configs import CONFIGS
from tests.porting.detector_weights import detector_image, detector_weights, with_background

pytestmark = pytest.mark.mmdetection

SEED = int(os.environ.get('GCNET_SEED', secrets.randbelow(10**6)))
SIZE, LIMITS = (75, 91), (121, 100)
# The closest decisions that a part may have to make, and those of all parts together.
CLOSE = {
    'rpn_overlap': (2e-6, 3e-5),
    'rpn_order': (1e-7, 5e-6),
    'level': (2e-6, 1e-4),
    'score': (1e-6, 5e-5),
    'overlap': (1e-5, 3e-4),
    'order': (1e-6, 4e-5),
}
LEVELS = range(2, 7)


class Parts:
    """The parts of a detector, each compiled once for a short compilation."""

    def __init__(self, model, variables, size):
        self.model, self.compiled = model, {}
        self.variables = jax.tree.map(jnp.asarray, variables)
        self.size = jnp.asarray([size])

    def __call__(self, part, *arguments):
        if part not in self.compiled:

            def apply(variables, *arguments):
                return self.model.apply(variables, *arguments, method=part)

            lowered = jax.jit(apply).lower(self.variables, *arguments)
            options = {'xla_backend_optimization_level': 0}
            self.compiled[part] = lowered.compile(compiler_options=options)
        return self.compiled[part](self.variables, *arguments)


def backbone(module, images):
    outputs = module.backbone.outputs(images, train=False)
    return [outputs[f'stage{number}'] for number in range(1, 5)]


def neck(module, maps):
    return module.neck(maps)


def rpn_head(module, pyramid):
    return module.rpn_head(pyramid)


def proposals(module, logits, deltas, size):
    shapes = [(-(-128 // stride), -(-128 // stride)) for stride in STRIDES]
    anchors = [anchor_boxes(*shape, s) for shape, s in zip(shapes, STRIDES, strict=True)]
    return propose(logits, deltas, anchors, size)


def box_heads(module, pyramid, rois):
    return [
        head(module.sample(pyramid, boxes, size=BOX_SIZE))
        for head, boxes in zip(module.box_head, rois, strict=True)
    ]


def moved_boxes(module, rois, deltas, size):
    return [
        decode_deltas(boxes[0], values[:, 0], stds, size[0])[None]
        for boxes, values, stds in zip(rois, deltas, STDS, strict=False)
    ]


def detections(module, boxes, valid, logits, deltas, size):
    stds = STDS[len(module.box_head) - 1]
    mean = sum(logits) / len(logits)
    return detect(boxes, valid, mean[None], deltas[None], stds, size)


def masks(module, pyramid, found):
    return module.masks(pyramid, found)


@pytest.fixture(scope='module', params=CONFIGS)
def pair(request, tmp_path_factory):
    """(mmdetection's network, its stages, the image, our parts, the directory with our network)."""
    import torch

    from tests.porting import mmdetection_peer as peer

    print(f'GCNET_SEED={SEED}')
    model = peer.build(request.param)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    weights = detector_weights(shapes, SEED)
    chosen = None
    for number in range(20):
        image = detector_image(*SIZE, SEED + number)
        peer.load(model, weights)
        # Few candidates: then it is rare that two of them are nearly alike.
        more = peer.choose_background(peer.run(model, image, LIMITS), candidates=100)
        peer.load(model, weights | with_background(weights, more))
        kept = peer.run(model, image, LIMITS)
        margins = peer.margins(kept)
        for_parts, for_all = (
            all(value > CLOSE[name][limit] for name, value in margins.items()) for limit in (0, 1)
        )
        if for_all or (for_parts and chosen is None):
            chosen = image, more, kept | {'is_clear': for_all}
        if for_all or (chosen and number >= 11):
            break
    image, more, kept = chosen
    peer.load(model, weights | with_background(weights, more))
    directory = tmp_path_factory.mktemp(request.param)
    path = directory / f'{request.param}.pth'
    torch.save({'meta': {'epoch': 12}, 'state_dict': model.state_dict()}, path)
    description, report = port(path, directory / 'ours')
    path.unlink()
    assert description.name == CONFIGS[request.param]
    assert not report.initialised
    assert not report.warnings
    variables = load_variables(directory / 'ours')[1]
    parts = Parts(description.build(), variables, kept['size'])
    yield model, kept, image, parts, directory
    parts.compiled.clear()


def close(ours, theirs):
    """The largest difference over the largest value."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def filled(values, count):
    """Zeros behind the values."""
    values = np.asarray(values)
    return np.concatenate(
        [values, np.zeros((count - len(values), *values.shape[1:]), values.dtype)]
    )


def prepared(image):
    preprocessing = KeepRatio(short_side=LIMITS[1], long_side=LIMITS[0])
    size = keep_ratio.resized_shape(*image.shape[:2], preprocessing)
    images = np.zeros((1, *preprocessing.padded(*size), 3), np.float32)
    resized = jnp.asarray(keep_ratio.resize(image, size))[None]
    images[0, : size[0], : size[1]] = normalize(resized, preprocessing.mean, preprocessing.std)[0]
    return images


def test_each_part_given_what_the_one_before_gave_there(pair):
    _, kept, image, parts, _ = pair
    found = {'input': prepared(image)}
    found |= zip([f'c{k}' for k in range(2, 6)], parts(backbone, kept['input']), strict=True)
    maps = [kept[f'c{k}'] for k in range(2, 6)]
    found |= zip([f'p{k}' for k in LEVELS], parts(neck, maps), strict=True)
    pyramid = [kept[f'p{k}'] for k in LEVELS]
    logits, deltas = parts(rpn_head, pyramid)
    for level in range(5):
        found[f'rpn_logits{level}'], found[f'rpn_deltas{level}'] = logits[level], deltas[level]
    stages = [name.removeprefix('rois') for name in kept if name.startswith('rois')]
    rois = [jnp.asarray(filled(kept[f'rois{s}'], PROPOSALS))[None] for s in stages]
    count = len(kept['rois0'])
    for stage, (logits, deltas) in zip(stages, parts(box_heads, pyramid, rois), strict=True):
        found |= {f'box_logits{stage}': logits[:count], f'box_deltas{stage}': deltas[:count]}
    deltas = [jnp.asarray(filled(kept[f'box_deltas{s}'], PROPOSALS)) for s in stages]
    for stage, boxes in enumerate(parts(moved_boxes, rois, deltas, parts.size)[:-1], start=1):
        found[f'rois{stage}'] = boxes[0, :count]
    differences = {name: close(value, kept[name]) for name, value in found.items()}
    print({name: f'{value:.1e}' for name, value in differences.items()})
    assert max(differences.values()) < 1e-5, differences


def test_the_same_proposals_and_detections(pair):
    _, kept, _, parts, _ = pair
    given = ([kept[f'rpn_{kind}{level}'] for level in range(5)] for kind in ('logits', 'deltas'))
    chosen = parts(proposals, *given, parts.size)
    count = int(chosen.valid.sum())
    scores = kept['rpn_nms'][1][kept['rpn_nms'][3]][:count]
    same_boxes(np.asarray(chosen.boxes[0, :count]), kept['rois0'], scores, 1e-5 * 128, 1e-6)
    stages = [name.removeprefix('rois') for name in kept if name.startswith('rois')]
    last = stages[-1]
    boxes = jnp.asarray(filled(kept[f'rois{last}'], PROPOSALS))[None]
    logits = [jnp.asarray(filled(kept[f'box_logits{s}'], PROPOSALS)) for s in stages]
    deltas = jnp.asarray(filled(kept[f'box_deltas{last}'], PROPOSALS))
    found = parts(detections, boxes, chosen.valid, logits, deltas, parts.size)
    check_detections(found, kept, 1e-5)
    pyramid = [kept[f'p{k}'] for k in LEVELS]
    count = len(kept['labels'])
    theirs = Detections(
        *(filled(kept[name], MAX_DETECTIONS)[None] for name in ('boxes', 'scores', 'labels')),
        valid=(np.arange(MAX_DETECTIONS) < count)[None],
        finite=np.array([True]),
    )
    values = np.asarray(parts(masks, pyramid, theirs)[0, :count])
    assert close(values, kept['masks']) < 1e-5
    assert not masks_differ(kept['original_boxes'], values, kept['original_masks'])


def check_detections(found, kept, tolerance):
    count = int(found.valid.sum())
    np.testing.assert_array_equal(found.labels[0, :count], kept['labels'])
    assert np.abs(found.scores[0, :count] - kept['scores']).max() < tolerance
    assert np.abs(found.boxes[0, :count] - kept['boxes']).max() < tolerance * 128


def test_the_same_from_the_image_to_the_masks(pair):
    _, kept, image, parts, _ = pair
    if not kept['is_clear']:
        pytest.skip(f'every image had a decision that is too close (GCNET_SEED={SEED})')
    pyramid = parts(neck, parts(backbone, prepared(image)))
    chosen = parts(proposals, *parts(rpn_head, pyramid), parts.size)
    stages = len([name for name in kept if name.startswith('rois')])
    boxes, logits = chosen.boxes, []
    for stage in range(stages):
        each = parts(box_heads, pyramid, [boxes] * stages)
        logits.append(each[stage][0])
        deltas = [each[stage][1]] * stages
        if stage + 1 < stages:
            boxes = parts(moved_boxes, [boxes] * stages, deltas, parts.size)[stage]
    found = parts(detections, boxes, chosen.valid, logits, deltas[0], parts.size)
    values = np.asarray(parts(masks, pyramid, found))
    # A hundred layers: with its other kernels mmdetection's own scores move by 3e-5, its masks by
    # 1e-4 (R101 r4).
    check_detections(found, kept, 3e-4)
    count = len(kept['labels'])
    assert np.abs(values[0, :count] - kept['masks']).max() < 5e-4
    scale = np.tile((kept['size'] / SIZE)[::-1], 2).astype(np.float32)
    boxes = np.asarray(found.boxes[0, :count]) / scale
    assert np.abs(boxes - kept['original_boxes']).max() < 1e-4 * 128
    assert not masks_differ(boxes, values[0, :count], kept['original_masks'], doubt=5e-4)


def test_the_way_back(pair):
    import torch

    model, _, _, parts, directory = pair
    parts.compiled.clear()
    port_reverse(directory / 'ours', 'mmdetection', directory / 'back.pth')
    loaded = torch.load(directory / 'back.pth', weights_only=True)
    (directory / 'back.pth').unlink()
    assert len(loaded['meta']['CLASSES']) == 80
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for value in model.state_dict().values():
        value.zero_()
    model.load_state_dict(loaded['state_dict'], strict=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
