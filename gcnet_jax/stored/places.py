"""Where a checkpoint is: the newest or best one of a run, and its items of JSON."""

import math
import os
import re
from pathlib import Path
from typing import Any

from gcnet_jax.errors import CheckpointError
from gcnet_jax.files import as_place, explain_bucket, is_bucket, read_json
from gcnet_jax.tasks import TASKS

CHECKPOINTS = 'checkpoints'
METRICS = 'metrics'
# In a bucket: the file that Orbax writes into a checkpoint when all else is there.
COMMITTED = 'commit_success.txt'


def step_directories(directory: str | os.PathLike) -> dict[int, Path]:
    """Returns the checkpoints under a workdir or its `checkpoints` by step, oldest first."""
    root = as_place(directory, 'checkpoint')
    root = root / CHECKPOINTS if (root / CHECKPOINTS).is_dir() else root
    if not root.is_dir():
        return {}
    steps = (path for path in root.iterdir() if re.fullmatch('[0-9]{1,18}', path.name))
    found = {int(path.name): path for path in steps}
    if is_bucket(root):
        # Nothing can be renamed there: Orbax marks what it has written completely.
        found = {step: path for step, path in found.items() if (path / COMMITTED).exists()}
    return dict(sorted(found.items()))


def find_checkpoint(directory: str | os.PathLike, choose: str = 'newest') -> Path:
    """Returns the directory of one checkpoint.

    Args:
      directory: A workdir, its `checkpoints`, a single checkpoint, or a ported directory.
      choose: 'newest', or 'best': by the task's metric where any was evaluated, else the newest.

    Raises:
      CheckpointError: There is no checkpoint.
    """
    path = as_place(directory, 'checkpoint')
    with explain_bucket(path, CheckpointError):
        if (path / 'variables').is_dir():
            return path
        found = step_directories(path)
    if not found:
        missing = 'no such directory' if not path.is_dir() else 'no checkpoint in it'
        raise CheckpointError(
            f'{directory}: {missing}; name a workdir of train.py, one of its checkpoints, '
            'or a ported directory'
        )
    if choose == 'best':
        return max(found.items(), key=lambda item: (_score(item[1]), item[0]))[1]
    return found[max(found)]


def _score(checkpoint: Path) -> float:
    """Returns the value of the metric that is best where it is highest; -inf if none."""
    try:
        metrics = read_item(checkpoint, METRICS)
    except CheckpointError:
        return -math.inf
    score = metrics.get(f'eval/{_best_metric(checkpoint)}')
    is_number = isinstance(score, (int, float)) and math.isfinite(score)
    return float(score) if is_number else -math.inf


def _best_metric(checkpoint: Path) -> str:
    """Returns the metric that the task of a checkpoint is judged by."""
    try:
        task = read_item(checkpoint, 'description').get('task')
    except CheckpointError:
        task = None
    return TASKS.get(task, TASKS['classification']).best  # Of version 1, or damaged.


def read_item(checkpoint: Path, name: str) -> dict[str, Any]:
    """Reads a JSON item of one checkpoint.

    Raises:
      CheckpointError: It is missing or damaged, or no JSON object.
    """
    # The manager itself writes the metrics, under another name than that of other items.
    value = read_json(
        checkpoint / name / (METRICS if name == METRICS else 'metadata'), CheckpointError
    )
    if not isinstance(value, dict):
        raise CheckpointError(f'{checkpoint}: damaged: {name} is {type(value).__name__}')
    return value
