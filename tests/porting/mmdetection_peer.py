"""mmdetection's own detectors, with every stage recorded; needs requirements-mmdetection.txt."""

import warnings
from pathlib import Path

import numpy as np
import torch

from tests.porting.mmcv_operators import stand_in


def _import_mmdet():
    stand_in()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        import mmdet.apis
        import mmdet.models
    return mmdet


mmdet = _import_mmdet()
from mmcv.transforms import Compose  # noqa: E402
from mmdet.models.dense_heads import rpn_head  # noqa: E402
from mmdet.models.layers import bbox_nms  # noqa: E402
from mmdet.registry import MODELS  # noqa: E402
from mmdet.utils import get_test_pipeline_cfg  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.model import revert_sync_batchnorm  # noqa: E402
from mmengine.registry import init_default_scope  # noqa: E402


def build(config: str, *, train: bool = False) -> torch.nn.Module:
    """mmdetection's network of a configuration in evaluation mode, with `cfg` as an attribute.

    With `train` it also has what training needs; without, that would only be in the way.
    """
    init_default_scope('mmdet')
    path = Path(mmdet.__file__).parent / '.mim/configs/gcnet' / f'{config}.py'
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        settings = Config.fromfile(path)
        if not train:
            settings.model.train_cfg = None
        # What SyncBN does in evaluation; it would ask for a GPU.
        model = revert_sync_batchnorm(MODELS.build(settings.model)).eval()
    model.cfg = settings
    return model


def load(model: torch.nn.Module, weights: dict[str, np.ndarray]) -> None:
    """Sets every tensor of the network."""
    state = {name: torch.from_numpy(np.asarray(value)) for name, value in weights.items()}
    model.load_state_dict(state, strict=True)


def run(
    model: torch.nn.Module, image: np.ndarray, limits: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Finds the objects in an RGB image and returns every stage by the names and layouts here.

    Args:
      model: Of `build`.
      image: uint8, RGB.
      limits: Of the long and the short side.

    Returns:
      'input', 'c2'.., 'p2'.. (channels last); 'rpn_logits0'.., 'rpn_deltas0'..; 'rois0'.. of the
      box heads with 'box_logits0'.. and 'box_deltas0'..; 'boxes', 'scores' and 'labels' of the
      detections, 'masks' on 28 x 28 cells; 'original_boxes' and 'original_masks' in the image;
      'size' of the input without padding; 'rpn_nms' and 'last_nms', what went into suppression:
      boxes, scores, groups and the indices that are kept.
    """
    steps = get_test_pipeline_cfg(model.cfg)
    steps[0].type = 'mmdet.LoadImageFromNDArray'
    for step in steps:
        if step.type == 'Resize':
            step.scale = limits
    recorder = Recorder(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            found = mmdet.apis.inference_detector(model, image[..., ::-1].copy(), Compose(steps))
    finally:
        recorder.close()
    instances, kept = found.pred_instances, recorder.kept
    labels = instances.labels.numpy()
    kept |= {
        'original_boxes': instances.bboxes.numpy(),
        'scores': instances.scores.numpy(),
        'labels': labels,
        'original_masks': instances.masks.numpy(),
        'size': np.array(found.img_shape, np.float32),
    }
    heads = [kept.pop(name) for name in sorted(kept) if name.startswith('mask_logits')]
    each = np.arange(len(labels))
    kept['masks'] = np.zeros((0, 28, 28), np.float32)
    if len(labels):
        kept['masks'] = np.mean([torch.sigmoid(h).numpy()[each, labels] for h in heads], axis=0)
    kept.setdefault('boxes', np.zeros((0, 4), np.float32))
    return kept


class Recorder:
    """Keeps what passes between the parts of a detector while it runs."""

    def __init__(self, model: torch.nn.Module):
        self.kept = {}
        head = model.roi_head
        parts = [
            (model.backbone, self._backbone),
            (model.neck, self._maps('p')),
            (model.rpn_head, self._proposal_head),
        ]
        for number, (extractor, box_head) in enumerate(
            zip(_listed(head.bbox_roi_extractor), _listed(head.bbox_head), strict=True)
        ):
            parts += [(extractor, self._rois(f'rois{number}')), (box_head, self._boxes(number))]
        for number, (extractor, mask_head) in enumerate(
            zip(_listed(head.mask_roi_extractor), _listed(head.mask_head), strict=True)
        ):
            parts += [(extractor, self._rois('boxes')), (mask_head, self._mask_logits(number))]
        self._handles = [module.register_forward_hook(hook) for module, hook in parts]
        self._originals = [(module, module.batched_nms) for module in (rpn_head, bbox_nms)]
        rpn_head.batched_nms = self._suppression('rpn_nms', rpn_head.batched_nms)
        bbox_nms.batched_nms = self._suppression('last_nms', bbox_nms.batched_nms)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        for module, original in self._originals:
            module.batched_nms = original

    def _backbone(self, module, inputs, outputs):
        self.kept['input'] = _channels_last(inputs[0])
        self._maps('c')(module, inputs, outputs)

    def _maps(self, letter):
        def hook(module, inputs, outputs):
            for level, values in enumerate(outputs, start=2):
                self.kept[f'{letter}{level}'] = _channels_last(values)

        return hook

    def _proposal_head(self, module, inputs, outputs):
        for level, (logits, deltas) in enumerate(zip(*outputs, strict=True)):
            self.kept[f'rpn_logits{level}'] = _channels_last(logits).reshape(1, -1)
            self.kept[f'rpn_deltas{level}'] = _channels_last(deltas).reshape(1, -1, 4)

    def _rois(self, name):
        def hook(module, inputs, outputs):
            self.kept[name] = inputs[1][:, 1:].numpy().copy()

        return hook

    def _boxes(self, number):
        def hook(module, inputs, outputs):
            logits, deltas = (values.numpy().copy() for values in outputs)
            self.kept[f'box_logits{number}'] = logits
            self.kept[f'box_deltas{number}'] = deltas.reshape(len(deltas), -1, 4)

        return hook

    def _mask_logits(self, number):
        def hook(module, inputs, outputs):
            self.kept[f'mask_logits{number}'] = outputs.clone()

        return hook

    def _suppression(self, name, original):
        def wrapped(boxes, scores, groups, *rest):
            detections, keep = original(boxes, scores, groups, *rest)
            given = (boxes, scores, groups, keep)
            self.kept[name] = tuple(value.numpy().copy() for value in given)
            return detections, keep

        return wrapped


def _listed(modules):
    return modules if isinstance(modules, torch.nn.ModuleList) else [modules]


def _channels_last(values: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(values.numpy().transpose(0, 2, 3, 1))


# How near each decision came to going the other way --------------------------------------------


def margins(kept: dict[str, np.ndarray]) -> dict[str, float]:
    """The least distance of every kind of decision of a run from its threshold.

    'rpn_overlap' and 'overlap': of the overlap that decides about a candidate, its largest with a
    better one that is kept; 'order' and 'rpn_order': of two scores in order, the latter where the
    order counts, at the last proposal; 'score': of a score from 0.05; 'level': of a box from the
    size where it is read from another map, in octaves.
    """
    found = {'rpn_overlap': _overlap_margin(*kept['rpn_nms'], 0.7)}
    scores = kept['rpn_nms'][1][kept['rpn_nms'][3]]
    found['rpn_order'] = float(scores[999] - scores[1000]) if len(scores) > 1000 else 1.0
    sizes = [kept[name] for name in kept if name.startswith('rois')] + [kept['boxes']]
    octaves = [np.log2(np.sqrt(np.prod(b[:, 2:] - b[:, :2], axis=1)) / 56 + 1e-6) for b in sizes]
    found['level'] = min(np.abs(o[:, None] - [1, 2, 3]).min(initial=1) for o in octaves)
    logits = [kept[name].astype(np.float64) for name in kept if name.startswith('box_logits')]
    found['score'] = np.abs(probabilities(logits) - 0.05).min()
    found['overlap'] = found['order'] = 1.0
    if 'last_nms' in kept:
        found['overlap'] = _overlap_margin(*kept['last_nms'], 0.5)
        scores = kept['last_nms'][1][kept['last_nms'][3]][:101]
        found['order'] = float((scores[:-1] - scores[1:]).min(initial=1))
    return {name: float(value) for name, value in found.items()}


def probabilities(logits: list[np.ndarray], background: float = 0.0) -> np.ndarray:
    """Of the classes without the background, from the logits of every stage."""
    mean = sum(logits) / len(logits)
    mean[:, -1] += background
    powers = np.exp(mean - mean.max(axis=1, keepdims=True))
    return (powers / powers.sum(axis=1, keepdims=True))[:, :-1]


def _overlap_margin(boxes, scores, groups, keep, threshold):
    boxes, least = boxes.astype(np.float64), 1.0
    rank = np.empty(len(boxes), int)
    rank[np.argsort(-scores, kind='stable')] = np.arange(len(boxes))
    is_kept = np.zeros(len(boxes), bool)
    is_kept[keep] = True
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        best = members[is_kept[members]]
        overlap = np.where(
            rank[best][:, None] < rank[members], _overlaps(boxes[best], boxes[members]), 0
        )
        least = min(least, np.abs(overlap.max(axis=0) - threshold).min(initial=1))
    return least


def _overlaps(a, b):
    sides = np.minimum(a[:, None, 2:], b[:, 2:]) - np.maximum(a[:, None, :2], b[:, :2])
    common = sides.clip(0).prod(axis=-1)
    areas = [np.prod(c[:, 2:] - c[:, :2], axis=1) for c in (a, b)]
    return common / np.maximum(areas[0][:, None] + areas[1] - common, 1e-12)


def choose_background(kept: dict[str, np.ndarray], candidates: int = 300) -> float:
    """What to add to the background's bias for about so many scores above the threshold."""
    logits = [kept[name].astype(np.float64) for name in kept if name.startswith('box_logits')]
    counts = {
        more: (probabilities(logits, more) > 0.05).sum() for more in np.arange(0.0, 60.0, 0.5)
    }
    return float(min(counts, key=lambda more: abs(counts[more] - candidates)))
