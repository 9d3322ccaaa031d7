"""How good a detector is while it is trained: COCO's average precision, computed on the host."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from gcnet_jax.errors import DataError
from gcnet_jax.tasks.instances import Instances

# What of `average_precision.METRICS` is followed, of boxes and of masks.
FOLLOWED = ('AP', 'AP50', 'AP75', 'AP_small', 'AP_medium', 'AP_large')
METRICS = tuple(f'{kind}_{name.lower()}' for kind in ('box', 'mask') for name in FOLLOWED)


class DetectionEvaluation:
    """COCO's average precision of all images, on the host.

    Attributes:
      examples: Images, each once.
    """

    def __init__(self, source: Any) -> None:
        from gcnet_jax.data.detection_sources import as_coco  # Slow to import.
        from gcnet_jax.tasks.coco_evaluator import CocoEvaluator

        self.examples = 0
        self._label_names = source.label_names
        self._evaluator = CocoEvaluator(as_coco(source), source.label_names)
        self._finite = True

    def add(self, results: Mapping[str, np.ndarray]) -> None:
        for place in np.flatnonzero(results['mask']):
            row = {name: values[place] for name, values in results.items()}
            self.examples += 1
            self._finite &= bool(row['finite'])
            self._evaluator.add(int(row['index']), self._instances(row))

    def _instances(self, row: Mapping[str, np.ndarray]) -> Instances:
        found = np.flatnonzero(row['valid'])
        labels, masks = row['labels'][found], None
        if 'masks' in row:
            masks = row['masks'][found].astype(np.float32) / 255
        return Instances(
            boxes=row['boxes'][found],
            scores=row['scores'][found],
            labels=tuple(self._label_names[label] for label in labels),
            classes=labels,
            size=tuple(map(int, row['original_size'])),
            mask_probabilities=masks,
        )

    def metrics(self) -> dict[str, float]:
        """Returns 'ap', that of masks where there are masks, else of boxes; and 'examples'.

        And of both kinds what `FOLLOWED` names, such as 'mask_ap50', where there is any such
        object. Where the network has computed what is not finite, 'ap' is not a number.

        Raises:
          DataError: No image has an object to find.
        """
        found = self._evaluator.evaluation()
        kinds = found.metrics
        values = {
            f'{kind}_{name.lower()}': metrics[name]
            for kind, metrics in kinds.items()
            for name in FOLLOWED
            if not np.isnan(metrics[name])
        }
        best = kinds.get('mask', kinds['box'])['AP']
        if np.isnan(best):
            raise DataError(
                f'none of the {self.examples} images to evaluate on has an object; choose another '
                'config.data.evaluation_split'
            )
        best = best if self._finite else float('nan')
        return {'ap': best, **values, 'examples': self.examples}
