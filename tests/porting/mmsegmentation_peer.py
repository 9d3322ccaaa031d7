"""mmsegmentation's own segmenters, with every stage recorded; needs the packages of
requirements-mmsegmentation.txt."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from tests.porting.mmcv_operators import stand_in


def _import_mmseg():
    stand_in()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        import mmseg.apis
        import mmseg.evaluation
        import mmseg.models
    return mmseg


mmseg = _import_mmseg()
from mmengine.config import Config  # noqa: E402
from mmengine.model import revert_sync_batchnorm  # noqa: E402
from mmengine.registry import init_default_scope  # noqa: E402
from mmseg.registry import MODELS  # noqa: E402


def build(config: str) -> torch.nn.Module:
    """mmsegmentation's network of a configuration in evaluation mode, with `cfg` as an attribute.

    Args:
      config: The name of a file in `configs/gcnet`, or a folder and a file in `configs`.
    """
    init_default_scope('mmseg')
    place = config if '/' in config else f'gcnet/{config}'
    return _built(Config.fromfile(Path(mmseg.__file__).parent / '.mim/configs' / f'{place}.py'))


def build_text(text: str, pipeline: object) -> torch.nn.Module:
    """Does as `build` with a config that is text; the pipeline prepares images."""
    settings = Config.fromstring(text, '.py')
    settings.test_pipeline = pipeline
    return _built(settings)


def _built(settings: Config) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        settings.model.train_cfg = None
        # What SyncBN does in evaluation; it would ask for a GPU.
        model = revert_sync_batchnorm(MODELS.build(settings.model)).eval()
    model.cfg = settings
    return model


def load(model: torch.nn.Module, weights: dict[str, np.ndarray]) -> None:
    """Sets every tensor of the network."""
    state = {name: torch.from_numpy(np.asarray(value)) for name, value in weights.items()}
    model.load_state_dict(state, strict=True)


def dataset_meta(config: Config, path: Path) -> dict:
    """What mmsegmentation takes for the classes and the colours of a file, as its users load it."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return mmseg.apis.init_model(config.copy(), str(path), device='cpu').dataset_meta


def run(
    model: torch.nn.Module,
    image: np.ndarray,
    limits: tuple[int, int],
    windows: tuple[int, int] | None,
) -> dict[str, np.ndarray | list[dict[str, np.ndarray]]]:
    """Labels an RGB image and returns every stage, channels last.

    Args:
      model: Of `build`.
      image: uint8, RGB.
      limits: Of the long and the short side.
      windows: Their side and stride; None for the whole image.

    Returns:
      'input'; 'windows', for each of them (one without windows) 'input', 'c2'.. 'c5', 'context'
      (what the context block reads, if there is one) and 'context_output', 'head_logits' and
      'logits'; 'logits' of the whole input; 'original_logits' and 'labels' of the image.
    """
    for step in model.cfg.test_pipeline:
        if step.type == 'Resize':
            step.scale = limits
    model.test_cfg.mode = 'whole' if windows is None else 'slide'
    if windows is not None:
        model.test_cfg.crop_size, model.test_cfg.stride = ((side, side) for side in windows)
    recorder = Recorder(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            found = mmseg.apis.inference_model(model, image[..., ::-1].copy())
    finally:
        recorder.close()
    return recorder.kept | {
        'windows': recorder.windows,
        'original_logits': found.seg_logits.data.numpy().transpose(1, 2, 0).copy(),
        'labels': found.pred_sem_seg.data[0].numpy().astype(np.uint8),
    }


class Recorder:
    """Keeps what passes between the parts of a segmenter while it runs."""

    def __init__(self, model: torch.nn.Module):
        self.model, self.head = model, model.decode_head
        self.kept, self.windows = {}, []
        parts = [(model.backbone, self._backbone), (self.head.conv_seg, self._logits)]
        if hasattr(self.head, 'gc_block'):
            parts.append((self.head.gc_block, self._context))
        self._handles = [module.register_forward_hook(hook) for module, hook in parts]
        self._originals = model.inference, self.head.predict_by_feat
        model.inference, self.head.predict_by_feat = self._inference, self._enlarged

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self.model.inference, self.head.predict_by_feat = self._originals

    def _backbone(self, module, inputs, outputs):
        maps = {f'c{level}': _channels_last(m) for level, m in enumerate(outputs, start=2)}
        self.windows.append({'input': _channels_last(inputs[0])} | maps)

    def _context(self, module, inputs, output):
        both = {'context': inputs[0], 'context_output': output}
        self.windows[-1] |= {name: _channels_last(value) for name, value in both.items()}

    def _logits(self, module, inputs, output):
        # A hook of the head's own would never be called.
        self.windows[-1]['head_logits'] = _channels_last(output)

    def _enlarged(self, *arguments):
        logits = self._originals[1](*arguments)
        self.windows[-1]['logits'] = _channels_last(logits)
        return logits

    def _inference(self, inputs, metas):
        logits = self._originals[0](inputs, metas)
        self.kept |= {'input': _channels_last(inputs), 'logits': _channels_last(logits)}
        return logits


def _channels_last(values: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(values.detach().numpy().transpose(0, 2, 3, 1))


def mean_iou(
    labels: Sequence[np.ndarray], predictions: Sequence[np.ndarray], names: Sequence[str]
) -> dict[str, float | np.ndarray]:
    """mmsegmentation's `IoUMetric` of label maps, 255 ignored: its figures, in percent.

    Returns:
      'aAcc', 'mIoU' and 'mAcc' rounded as it rounds them, and 'IoU' of each class.
    """
    metric = mmseg.evaluation.IoUMetric(ignore_index=255, iou_metrics=['mIoU'])
    metric.dataset_meta = {'classes': list(names)}
    for label, prediction in zip(labels, predictions, strict=True):
        sample = {
            'pred_sem_seg': {'data': torch.from_numpy(prediction.astype(np.int64))[None]},
            'gt_sem_seg': {'data': torch.from_numpy(label.astype(np.int64))[None]},
        }
        metric.process({}, [sample])
    areas = [sum(area) for area in zip(*metric.results, strict=True)]
    each = metric.total_area_to_metrics(*areas, ['mIoU'])
    return metric.compute_metrics(metric.results) | {'IoU': each['IoU']}
