"""Reads metrics.jsonl, which a training run writes: one JSON object a line."""

import json
from pathlib import Path
from typing import Any

from gcnet_jax.errors import CheckpointError

METRICS_FILE = 'metrics.jsonl'


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's metrics.jsonl; a last line that was cut off is left out.

    No such file is no line. Each line has at least its `step`.

    Raises:
      CheckpointError: The file cannot be read, or another line is damaged.
    """
    path = workdir / METRICS_FILE
    try:
        texts = path.read_bytes().decode(errors='replace').splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f'{path} cannot be read: {error.strerror or error}') from error
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            if number == len(texts):
                break
            line = None
        if not isinstance(line, dict) or not isinstance(line.get('step'), int):
            raise CheckpointError(
                f'{path}, line {number} is not JSON with a step; repair or remove that line'
            )
        lines.append(line)
    return lines
