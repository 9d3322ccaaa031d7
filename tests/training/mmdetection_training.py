"""A training step of mmdetection's own detectors: every loss, the gradient, and what was chosen."""

import dataclasses

import numpy as np
import torch
from mmengine.structures import InstanceData

from tests.porting import mmdetection_peer as peer

structures = peer.mmdet.structures
anchor_head = peer.mmdet.models.dense_heads.anchor_head
RandomSampler = peer.mmdet.models.task_modules.samplers.RandomSampler


@dataclasses.dataclass
class Choice:
    """What one call of a sampler chose, in its own numbers.

    Attributes:
      positive, negative: Indices of the boxes; those of the objects come first.
      is_truth: Which of the positive ones are an object's own box.
      objects: Number of objects that were put before the other boxes.
      boxes: All boxes, with the objects' own.
    """

    positive: np.ndarray
    negative: np.ndarray
    is_truth: np.ndarray
    objects: int
    boxes: np.ndarray


@dataclasses.dataclass
class Step:
    """Losses by name, gradients by name, choices in order of the calls, and allowed anchors."""

    losses: dict[str, float]
    gradients: dict[str, torch.Tensor]
    choices: list[Choice]
    allowed: list[np.ndarray]


def step(model, images, sizes, boxes, labels, masks, monkeypatch) -> Step:
    """Computes losses and gradients of a training step in float64.

    Args:
      model: Of `mmdetection_peer.build(..., train=True)`.
      images: Normalised, [batch, height, width, 3].
      sizes: Height and width of each image without padding.
      boxes, labels, masks: Lists, of each image; masks are whole bitmaps.
      monkeypatch: Undoes what records the choices.
    """
    choices, allowed = [], []
    original, inside = RandomSampler.sample, anchor_head.anchor_inside_flags

    def sample(self, assigned, given, objects, **options):
        found = original(self, assigned, given, objects, **options)
        own = len(objects.bboxes) if self.add_gt_as_proposals else 0
        every = torch.cat([objects.bboxes[:own], given.priors])
        choices.append(
            Choice(
                found.pos_inds.numpy(),
                found.neg_inds.numpy(),
                found.pos_is_gt.numpy().astype(bool),
                own,
                every.detach().numpy(),
            )
        )
        return found

    def flags(*arguments):
        allowed.append(inside(*arguments).numpy())
        return torch.from_numpy(allowed[-1])

    monkeypatch.setattr(RandomSampler, 'sample', sample)
    monkeypatch.setattr(anchor_head, 'anchor_inside_flags', flags)
    samples = [
        _sample(images.shape[1:3], *each) for each in zip(sizes, boxes, labels, masks, strict=True)
    ]
    model.double().train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    inputs = torch.from_numpy(np.asarray(images, np.float64).transpose(0, 3, 1, 2).copy())
    losses = model.loss(inputs, samples)
    total, found = model.parse_losses(losses)
    total.backward()
    gradients = {
        name: torch.zeros_like(value) if value.grad is None else value.grad
        for name, value in model.named_parameters()
    }
    losses = {name: float(value.detach()) for name, value in found.items()}
    return Step(losses, gradients, choices, allowed)


def _sample(shape, size, boxes, labels, masks) -> structures.DetDataSample:
    padded = tuple(-(-int(side) // 32) * 32 for side in size)
    sample = structures.DetDataSample(
        metainfo={
            'img_shape': tuple(int(side) for side in size),
            'pad_shape': padded,
            'batch_input_shape': tuple(shape),
            'scale_factor': (1.0, 1.0),
        }
    )
    sample.gt_instances = InstanceData(
        bboxes=torch.from_numpy(boxes),
        labels=torch.from_numpy(labels.astype(np.int64)),
        masks=structures.mask.BitmapMasks(masks, *shape),
    )
    sample.ignored_instances = InstanceData(
        bboxes=torch.zeros((0, 4)), labels=torch.zeros(0, dtype=torch.int64)
    )
    return sample
