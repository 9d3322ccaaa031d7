"""Runs a detector over a set in COCO's format and evaluates what it finds."""

import contextlib

from gcnet_jax.data.coco import CocoSet
from gcnet_jax.errors import DataError
from gcnet_jax.inference.detector import Detector
from gcnet_jax.tasks.coco_evaluator import CocoEvaluation, CocoEvaluator


def evaluate_detector(
    detector: Detector,
    data: CocoSet,
    *,
    num_threads: int | None = None,
    skip_damaged: bool = False,
    progress: bool = False,
) -> CocoEvaluation:
    """Evaluates a detector, every image once.

    Args:
      detector: Its `batch_size` images are computed at once.
      data: As `load_coco` gives it; images that are missing are left out, counted.
      num_threads: Threads that decode; None for one per processor, at most 16.
      skip_damaged: Leave damaged images out, counted, instead of stopping at the first.
      progress: Show a bar on stderr.

    Raises:
      DataError: No category is a label of the detector, an image is damaged or of another size than
        its annotations say, or all are.
      ConfigError: The detector's labels have no names.
    """
    from tqdm import tqdm

    evaluator = CocoEvaluator(data, detector.description.label_names)
    paths = [image.path for image in data.images]
    count = 0
    with contextlib.closing(detector.stream(paths, num_threads=num_threads)) as results:
        shown = tqdm(results, total=len(paths), unit='image', disable=not progress)
        for image, (_, found) in zip(data.images, shown, strict=True):
            if isinstance(found, DataError):
                if not skip_damaged:
                    raise found
                continue
            evaluator.add(image.id, found)
            count += 1
    if not count:
        raise DataError(f'every image of {data.name!r} is missing or damaged')
    return evaluator.evaluation()
