"""Average precision and recall by pycocotools' COCOeval, without its prints and as plain values."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

# pycocotools' names of what is compared, by ours.
KINDS = {'box': 'bbox', 'mask': 'segm'}
# In the order of COCOeval.stats.
METRICS = (
    *('AP', 'AP50', 'AP75', 'AP_small', 'AP_medium', 'AP_large'),
    *('AR1', 'AR10', 'AR100', 'AR_small', 'AR_medium', 'AR_large'),
)
# The curves of precision over recall: at two overlaps, and the mean over all ten.
CURVES = ('IoU 0.50', 'IoU 0.75', 'mean of 0.50 to 0.95')
# Where two of them are among COCOeval's ten overlaps.
IOU_50, IOU_75 = 0, 5
# Of COCOeval's ranges of areas and limits of detections an image: all areas, the best 100.
ALL_AREAS, LARGEST_LIMIT = 0, 2


class AveragePrecision(NamedTuple):
    """What COCOeval says, with NaN in place of its -1 where there was nothing to find.

    Attributes:
      metrics: By the names in `METRICS`, from 0 to 1.
      by_category: 'AP' and 'AP50' of each category, by its id.
      precision: The mean over categories of the precision at recalls from 0 to 1 in steps of a
        hundredth, for each of `CURVES`.
    """

    metrics: dict[str, float]
    by_category: dict[int, dict[str, float]]
    precision: Float[np.ndarray, 'curves recalls']


def average_precision(
    kind: str,
    images: Mapping[int, tuple[int, int]],
    categories: Sequence[int],
    objects: Sequence[Mapping[str, Any]],
    results: Sequence[Mapping[str, Any]],
) -> AveragePrecision:
    """Runs COCOeval on checked annotations and on results.

    Args:
      kind: 'box' or 'mask'.
      images: Height and width of the images that count, by id.
      categories: Ids of those that count.
      objects: Annotations of these images and categories, as `coco_annotations` gives them.
      results: Likewise: 'image_id', 'category_id', 'score', and 'bbox' or 'segmentation', of which
        the latter is run lengths.
    """
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        run = COCOeval(
            _index(images, categories, [dict(item) for item in objects]),
            _index(images, categories, _detections(kind, results)),
            KINDS[kind],
        )
        run.evaluate()
        run.accumulate()
        run.summarize()
    # Overlap, recall, category.
    precision = run.eval['precision'][:, :, :, ALL_AREAS, LARGEST_LIMIT]
    precision = np.where(precision < 0, np.nan, precision)
    stats = np.where(run.stats < 0, np.nan, run.stats).tolist()
    return AveragePrecision(
        metrics=dict(zip(METRICS, stats, strict=True)),
        by_category={
            int(number): {
                'AP': float(precision[:, :, index].mean()),
                'AP50': float(precision[IOU_50, :, index].mean()),
            }
            for index, number in enumerate(run.params.catIds)
        },
        precision=_curves(precision),
    )


def _curves(
    precision: Float[np.ndarray, 'overlaps recalls categories'],
) -> Float[np.ndarray, 'curves recalls']:
    found = precision[:, :, ~np.isnan(precision).any(axis=(0, 1))]
    if not found.shape[-1]:
        return np.full((len(CURVES), precision.shape[1]), np.nan)
    mean = found.mean(axis=-1)
    return np.stack([mean[IOU_50], mean[IOU_75], mean.mean(axis=0)])


def _detections(kind: str, results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns results as `COCO.loadRes` would make them, which takes no empty list."""
    from pycocotools import mask as coco_masks

    detections = []
    for number, result in enumerate(results, start=1):
        box = result['bbox']
        detection = {key: result[key] for key in ('image_id', 'category_id', 'score', 'bbox')}
        detection |= {'id': number, 'iscrowd': 0, 'area': box[2] * box[3]}
        if kind == 'mask':
            # By the mask, not the box: an unmatched detection counts within its range of areas.
            mask = result['segmentation']
            detection |= {'segmentation': mask, 'area': int(coco_masks.area(mask))}
        detections.append(detection)
    return detections


def _index(
    images: Mapping[int, tuple[int, int]],
    categories: Sequence[int],
    annotations: list[dict[str, Any]],
) -> Any:
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = {
        'images': [
            {'id': number, 'height': size[0], 'width': size[1]} for number, size in images.items()
        ],
        'categories': [{'id': number} for number in categories],
        'annotations': annotations,
    }
    coco.createIndex()
    return coco
