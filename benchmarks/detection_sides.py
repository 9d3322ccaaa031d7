"""The two sides of `benchmarks.detection`, each in a process of its own, and their weights.

    python -m benchmarks.detection_sides SIDE OPTIONS

OPTIONS are what `benchmarks.detection` was called with, as JSON. Only one side needs jax, and only
the other torch.
"""

import argparse
import functools
import hashlib
import importlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.settings import Setting, peak_bytes

WHOLE = 'whole'
OURS, OURS_BY_PART, THEIRS = 'gcnet_jax', 'gcnet_jax by part', 'mmdetection'
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
# With them maps keep their size from layer to layer, and there are 1000 proposals and 100
# detections of several classes, as there are in photographs of a street. By mmdetection's names,
# the first that fits: the gain of a kernel; and the mean and the spread of biases.
GAINS = {
    r'conv_mask\.': 5.0,
    r'channel_add_conv\.3\.': 0.4,
    r'conv_offset\.': 0.9,
    r'lateral_convs\.': 0.4,
    r'fpn_convs\.': 1.0,
    r'rpn_cls\.': 2.0,
    r'rpn_reg\.': 0.25,
    r'bbox_head\.\d\.fc_cls\.': 8.0,
    r'fc_cls\.': 5.0,
    r'fc_reg\.': 1.0,
    r'conv_logits\.': 4.0,
    '': 1.5,
}
BIASES = {
    r'rpn_cls\.': (-1.0, 0.5),
    r'fc_cls\.': (0, 0.5),
    r'conv_offset\.': (0, 0.7),
    '': (0, 0.2),
}
# Added to the background's logit, so that there are fifty to a hundred detections.
BACKGROUND = {r'bbox_head\.\d': 13.0, '': 17.0}


def draw(name: str, shape: Sequence[int]) -> np.ndarray:
    """Draws one of mmdetection's tensors, by its name."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], 'little')
    values = np.random.default_rng(seed).standard_normal(shape)

    def choose(table: Mapping[str, Any]) -> Any:
        return next(value for pattern, value in table.items() if re.search(pattern, name))

    if name.endswith('running_mean'):
        values *= 0.2
    elif name.endswith('running_var'):
        values = np.exp(0.3 * values)
    elif name.endswith('bias'):
        mean, spread = choose(BIASES)
        values = mean + spread * values
        if name.endswith('fc_cls.bias'):
            values[-1] += choose(BACKGROUND)
    elif len(shape) in (1, 3):  # Norms; the third one of a bottleneck is added to the shortcut.
        values = (0.2 if name.endswith('bn3.weight') else 1.0) * (1 + 0.2 * values)
    else:
        axes = (0,) if 'upsample' in name else tuple(range(1, len(shape)))
        # Less their mean, because random layers with ReLU become constant otherwise.
        values -= values.mean(axes, keepdims=True)
        values *= choose(GAINS) / np.sqrt(np.prod([shape[axis] for axis in axes]))
    return values.astype(np.float32)


def write_weights(model_name: str, directory: Path, *, folded: bool) -> None:
    """Draws weights, and writes them in both sides' names; in ours with folded norms if asked."""
    import jax
    from flax.traverse_util import flatten_dict, unflatten_dict

    from gcnet_jax.inference.fold import fold_batch_norms
    from gcnet_jax.models import create_model
    from gcnet_jax.porting.families.mmdetection_detector import FAMILY
    from gcnet_jax.porting.names import pair_names

    model, images = create_model(model_name), np.zeros((1, 64, 64, 3), np.float32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    shapes = flatten_dict(dict(shapes), sep='/')
    pairings, _ = pair_names(FAMILY, shapes)
    ours, theirs = {}, {}
    for pairing in pairings:
        shape = pairing.leaf.to_theirs(np.zeros(shapes[pairing.ours].shape, np.float32)).shape
        theirs[pairing.theirs] = draw(pairing.theirs, shape)
        ours[pairing.ours] = pairing.leaf.to_ours(theirs[pairing.theirs])
    if folded:
        ours = fold_batch_norms(model, unflatten_dict(ours, sep='/'), images, train=False)
        ours = flatten_dict(ours, sep='/')
    np.savez(directory / 'ours.npz', **ours)
    np.savez(directory / 'theirs.npz', **theirs)


def image(height: int, width: int) -> np.ndarray:
    """Returns blobs and noise, normalised and padded to multiples of 32: `[1, h, w, 3]`."""
    generator = np.random.default_rng(0)
    blobs = generator.uniform(0, 255, (-(-height // 40), -(-width // 40), 3))
    pixels = blobs.repeat(40, axis=0).repeat(40, axis=1)[:height, :width]
    pixels = np.clip(pixels + 20 * generator.standard_normal(pixels.shape), 0, 255)
    values = ((pixels - MEAN) / STD).astype(np.float32)
    return np.pad(values, ((0, -height % 32), (0, -width % 32), (0, 0)))[None]


class Clock:
    """Seconds and processor seconds of parts, in the order in which they are timed.

    Args:
      wait: Returns when what was asked of the device is done.
    """

    def __init__(self, wait: Callable[[], None]) -> None:
        self.seconds: dict[str, tuple[float, float]] = {}
        self._wait = wait

    def __call__(self, name: str, function: Callable, *arguments: Any, **options: Any) -> Any:
        """Calls the function and notes how long it took."""
        wall, processor = time.perf_counter(), time.process_time()
        result = function(*arguments, **options)
        self._wait()
        self.seconds[name] = (time.perf_counter() - wall, time.process_time() - processor)
        return result


def ours(flags: argparse.Namespace, *, by_part: bool) -> Callable[[Clock], int]:
    """Sets up our detector; the function returns the number of detections."""
    import jax
    from flax.traverse_util import unflatten_dict

    from gcnet_jax.inference.fold import folded_batch_norm
    from gcnet_jax.models import create_model
    from gcnet_jax.models.mask_rcnn import maps_by_stride
    from gcnet_jax.models.roi_heads import Detections

    model = create_model(flags.model)
    with np.load(flags.directory / 'ours.npz') as file:
        variables = {name: jax.numpy.asarray(file[name]) for name in file.files}
    variables = unflatten_dict(variables, sep='/')
    pixels = jax.numpy.asarray(image(*flags.size))
    sizes = jax.numpy.asarray([flags.size], jax.numpy.float32)

    def jit(function: Callable) -> Callable:
        def compute(variables, *inputs):
            with folded_batch_norm():
                return model.apply(variables, *inputs, method=function)

        compiled = jax.jit(compute)
        return lambda *inputs: jax.block_until_ready(compiled(variables, *inputs))

    def maps(module, images):
        outputs = module.backbone.outputs(images, train=False)
        return maps_by_stride(outputs, images.shape[1:3])

    steps = {
        'backbone': jit(maps),
        'neck': jit(lambda module, found: module.neck(found)),
        'proposals': jit(lambda module, pyramid: module.propose(pyramid, sizes)),
        'boxes': jit(lambda module, *inputs: module.detect(*inputs, sizes)),
        'masks': jit(lambda module, *inputs: module.masks(*inputs)),
    }
    program = jit(lambda module, images: module(images, sizes, train=False))

    def run_parts(clock: Clock) -> int:
        pyramid = clock('neck', steps['neck'], clock('backbone', steps['backbone'], pixels))
        proposals = clock('proposals', steps['proposals'], pyramid)
        detections = clock('boxes', steps['boxes'], pyramid, proposals)
        masks = clock('masks', steps['masks'], pyramid, detections)
        return len(clock('paste', _paste, detections, masks, flags.size))

    def run_program() -> int:
        detections, masks = program(pixels)
        assert isinstance(detections, Detections)
        return len(_paste(detections, masks, flags.size))

    return run_parts if by_part else lambda clock: clock(WHOLE, run_program)


def _paste(detections: Any, masks: Any, size: tuple[int, int]) -> np.ndarray:
    from gcnet_jax.tasks.instances import Instances

    found = np.flatnonzero(detections.valid[0])
    boxes, scores, classes = (
        np.asarray(values[0])[found]
        for values in (detections.boxes, detections.scores, detections.labels)
    )
    names = tuple(map(str, classes))
    return Instances(boxes, scores, names, classes, tuple(size), np.asarray(masks[0])[found]).masks


def load_mmdetection(flags: argparse.Namespace, *, train: bool) -> tuple[Any, Any, Any]:
    """Returns mmdetection's network with the weights, the image and the sample that goes with it.

    With `train` it is in its training mode, and without it has nothing that training needs.
    """
    if flags.mmdetection_setup:
        importlib.import_module(flags.mmdetection_setup)
    import torch
    from mmdet.registry import MODELS
    from mmdet.structures import DetDataSample
    from mmengine.config import Config
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import init_default_scope

    importlib.import_module('mmdet.models')  # Fills the registry.
    torch.set_num_threads(flags.threads)
    device = Setting(flags.device).start_torch()
    init_default_scope('mmdet')
    config = Config.fromfile(flags.mmdetection_config)
    if not train:
        config.model.train_cfg = None
    config.model.backbone.init_cfg = None
    model = revert_sync_batchnorm(MODELS.build(config.model)).train(train)
    with np.load(flags.directory / 'theirs.npz') as file:
        state = {name: torch.from_numpy(file[name]) for name in file.files}
    counters = [name for name in model.state_dict() if name.endswith('num_batches_tracked')]
    model.load_state_dict({**state, **{name: torch.tensor(0) for name in counters}})
    model.to(device)
    pixels = torch.from_numpy(image(*flags.size)).permute(0, 3, 1, 2).contiguous().to(device)
    shape, padded = tuple(flags.size), tuple(pixels.shape[2:])
    sample = DetDataSample(
        metainfo={
            'img_shape': shape,
            'ori_shape': shape,
            'pad_shape': padded,
            'batch_input_shape': padded,
            'scale_factor': (1.0, 1.0),
        }
    )
    return model, pixels, sample


def theirs(flags: argparse.Namespace) -> Callable[[Clock], int]:
    """Sets up mmdetection's; needs its interpreter."""
    model, pixels, sample = load_mmdetection(flags, train=False)
    import torch

    clocks = []

    def timed(part, function, *inputs, **options):
        return clocks[-1](part, function, *inputs, **options)

    heads = model.roi_head.mask_head
    pasting = heads[-1] if isinstance(heads, torch.nn.ModuleList) else heads
    for part, owner, method in (
        ('backbone', model.backbone, 'forward'),
        ('neck', model.neck, 'forward'),
        ('proposals', model.rpn_head, 'predict'),
        ('boxes', model.roi_head, 'predict_bbox'),
        ('masks', model.roi_head, 'predict_mask'),
        ('paste', pasting, 'predict_by_feat'),
    ):
        setattr(owner, method, functools.partial(timed, part, getattr(owner, method)))

    def run(clock: Clock) -> int:
        clocks.append(clock)
        with torch.inference_mode():
            found = clock(WHOLE, model.predict, pixels, [sample])[0].pred_instances
        paste = clock.seconds['paste']
        clock.seconds['masks'] = tuple(
            both - last for both, last in zip(clock.seconds['masks'], paste, strict=True)
        )
        return len(found.masks)

    return run


def serve(side: str, flags: argparse.Namespace) -> None:
    """Runs one side: a line of JSON for each line that comes in."""
    # Before a library starts its threads.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: flags.threads])
    if flags.train:
        steps = importlib.import_module('benchmarks.detection_steps')
        setups = {OURS: lambda: steps.ours(flags), THEIRS: lambda: steps.theirs(flags)}
    else:
        setups = {
            OURS: lambda: ours(flags, by_part=False),
            OURS_BY_PART: lambda: ours(flags, by_part=True),
            THEIRS: lambda: theirs(flags),
        }
    setting = Setting(flags.device)
    if side != THEIRS:
        setting.start_jax()  # Its results are waited for by themselves.
    run = setups[side]()
    for _ in sys.stdin:
        clock = Clock(setting.wait_for_torch if side == THEIRS else lambda: None)
        found = run(clock)
        answer = {'seconds': clock.seconds, 'boxes': found, 'peak_bytes': peak_bytes()}
        print(json.dumps(answer), flush=True)


def main(side: str, options: str) -> None:
    """Writes the weights, or is a side."""
    flags = argparse.Namespace(**json.loads(options))
    flags.directory = Path(flags.directory)
    if side == 'weights':
        Setting().start_jax()
        write_weights(flags.model, flags.directory, folded=not flags.train)
    else:
        serve(side, flags)


if __name__ == '__main__':
    main(*sys.argv[1:])
