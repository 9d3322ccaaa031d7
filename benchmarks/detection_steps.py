"""A detector's training step on the two sides of `benchmarks.detection --train`.

Both have the same weights, image and objects, and draw the boxes that they train themselves. A step
is forward, backward and SGD with momentum, with the stem, stage 1 and all norms frozen as
mmdetection's configurations have them; reading and resizing the image are left out.
"""

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.detection_sides import MEAN, STD, WHOLE, Clock, image, load_mmdetection

OBJECTS, CLASSES = 8, 80
LEARNING_RATE = 1e-4  # Random weights stay what they are.
FROZEN = ('backbone/stem*', 'backbone/stage1*')


def objects(height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns boxes of whole pixels, labels, and masks of the image's size: an ellipse in each."""
    generator = np.random.default_rng(1)
    size = np.array([width, height])
    low = np.floor(generator.uniform(0, 0.6, (OBJECTS, 2)) * size)
    high = np.floor(low + generator.uniform(0.06, 0.4, (OBJECTS, 2)) * size)
    boxes = np.concatenate([low, high], axis=1).astype(np.float32)
    rows, columns = np.mgrid[:height, :width] + 0.5
    centre, half = (low + high) / 2, (high - low) / 2
    masks = [
        ((columns - x) / across) ** 2 + ((rows - y) / down) ** 2 < 1
        for (x, y), (across, down) in zip(centre, half, strict=True)
    ]
    return boxes, generator.integers(0, CLASSES, OBJECTS), np.array(masks, np.uint8)


def ours(flags: argparse.Namespace) -> Callable[[Clock], int]:
    """Sets up our step; the function returns the number of boxes of objects that were trained."""
    from flax.traverse_util import unflatten_dict

    from benchmarks import common
    from gcnet_jax.data.detection_masks import crop_mask, resized_grid
    from gcnet_jax.data.detection_ranges import MASK_SIZE
    from gcnet_jax.models import create_model
    from gcnet_jax.tasks.detection import Detection

    with np.load(flags.directory / 'ours.npz') as file:
        variables = unflatten_dict({name: file[name] for name in file.files}, sep='/')
    task = Detection(CLASSES, MEAN, STD, max_boxes=OBJECTS)
    pixels = image(*flags.size)
    boxes, labels, masks = objects(*flags.size)
    grid, canvas = resized_grid(flags.size, flags.size, False), pixels.shape[1:3]
    crops = [
        crop_mask(mask, box, grid, canvas, MASK_SIZE)
        for mask, box in zip(masks, boxes, strict=True)
    ]
    batch = {
        'image': np.round(pixels * STD + MEAN).astype(np.uint8),
        'size': np.array([flags.size], np.int32),
        'boxes': boxes[None],
        'labels': labels[None].astype(np.int32),
        'masks': np.array([[crop for crop, _ in crops]]),
        'mask_boxes': np.array([[region for _, region in crops]]),
    }
    model = create_model(flags.model, norm={'kind': 'frozen'})
    step = common.training_step(
        model, task, variables, batch, learning_rate=LEARNING_RATE, frozen=FROZEN
    )
    return lambda clock: int(clock(WHOLE, step)['positives'])


def theirs(flags: argparse.Namespace) -> Callable[[Clock], int]:
    """Sets up mmdetection's step; needs its interpreter."""
    model, pixels, sample = load_mmdetection(flags, train=True)
    import torch
    from mmdet.models.task_modules.samplers import RandomSampler
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    boxes, labels, masks = objects(*flags.size)
    padded = np.pad(masks, [(0, 0)] + [(0, -side % 32) for side in flags.size])
    device = pixels.device
    sample.gt_instances = InstanceData(
        bboxes=torch.from_numpy(boxes).to(device),
        labels=torch.from_numpy(labels).to(device),
        masks=BitmapMasks(padded, *padded.shape[1:]),
    )
    sample.ignored_instances = InstanceData(
        bboxes=torch.zeros((0, 4), device=device), labels=torch.zeros(0, device=device).long()
    )
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=LEARNING_RATE, momentum=0.9)
    counts = []
    original = RandomSampler.sample

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        found = original(self, *arguments, **options)
        if self.add_gt_as_proposals:
            counts.append(len(found.pos_inds))
        return found

    RandomSampler.sample = counted

    def step() -> None:
        optimizer.zero_grad()
        total, _ = model.parse_losses(model.loss(pixels, [sample]))
        total.backward()
        optimizer.step()

    def run(clock: Clock) -> int:
        counts.clear()
        clock(WHOLE, step)
        return counts[0]

    return run
