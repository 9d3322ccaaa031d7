"""Loads a stored network of any kind."""

import os
from typing import Any

from gcnet_jax.errors import ConfigError, unknown_name
from gcnet_jax.inference.classifier import Classifier
from gcnet_jax.inference.detector import Detector
from gcnet_jax.inference.segmenter import Segmenter
from gcnet_jax.inference.stored_network import CHOICES, StoredNetwork
from gcnet_jax.stored import read_model_description

# By the task of the description; all others are tasks on labels.
KINDS: dict[str, type[StoredNetwork]] = {'detection': Detector, 'segmentation': Segmenter}


def load_network(
    checkpoint: str | os.PathLike,
    *,
    choose: str = 'best',
    batch_size: int | None = None,
    **options: Any,
) -> Classifier | Detector | Segmenter:
    """Loads a checkpoint as what it was made for.

    Args:
      checkpoint, choose: See `StoredNetwork.load`.
      batch_size: Most images at once; None for the default of the kind.
      **options: See `Classifier`, `Detector` and `Segmenter`.

    Raises:
      CheckpointError: There is none, it is damaged, or of a newer format.
      ConfigError: An option that cannot be.
    """
    if choose not in CHOICES:
        raise ConfigError(unknown_name('choice of a checkpoint', choose, CHOICES))
    kind = KINDS.get(read_model_description(checkpoint, choose).task, Classifier)
    if batch_size is not None:
        options['batch_size'] = batch_size
    return kind.load(checkpoint, choose=choose, **options)
