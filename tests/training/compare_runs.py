"""What two runs have in common, for tests that compare a run with another or with its start."""

from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from gcnet_jax.stored import load_variables
from gcnet_jax.training.metrics import TIMING, read_metrics


def without_timing(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the machine."""
    return [
        {name: value for name, value in line.items() if name not in TIMING}
        for line in read_metrics(workdir)
    ]


def assert_the_same(workdir: Path, other: Path) -> None:
    """The same weights and statistics, bit for bit, and the same metrics on the way."""
    jax.tree.map(
        np.testing.assert_array_equal, load_variables(workdir)[1], load_variables(other)[1]
    )
    assert without_timing(workdir) == without_timing(other)


def one_step(config: ConfigDict, place: Path) -> ConfigDict:
    """One step from a checkpoint, at a rate so low that float32 loses every update."""
    config.training.init_from = str(place)
    config.training.total_steps = 1
    config.schedule.peak_learning_rate = 1e-30
    return config
