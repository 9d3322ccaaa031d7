"""What a row of the registry holds."""

import dataclasses
from functools import partial

import flax.linen as nn

from gcnet_jax.data.preprocessing import KeepRatio, Preprocessing


@dataclasses.dataclass(frozen=True)
class ModelEntry:
    """A row of the registry.

    Attributes:
      name: What `create_model` knows it by.
      module: Its class and the options that make it; a backbone in it is a name.
      preprocessing: What it expects of its images.
      description: A line for people.
      task: What it is for: 'classification', 'detection' or 'segmentation'.
    """

    name: str
    module: partial[nn.Module]
    preprocessing: Preprocessing | KeepRatio
    description: str
    task: str = 'classification'
