"""The same weights in timm's network and in ours, compared on the same images."""

import os

import jax
import numpy as np

from gcnet_jax.errors import CheckpointError, import_optional
from gcnet_jax.models.registry import model_entry
from gcnet_jax.porting.files import read_checkpoint
from gcnet_jax.porting.load import find_pretrained, load_named

FAMILY = 'timm'


def compare_with_timm(
    source: str | os.PathLike[str], *, batch: int = 2, size: int | None = None, seed: int = 0
) -> float:
    """Loads weights into timm's network and into ours, and compares their logits.

    Args:
      source: See `load_pretrained`; the weights of one of timm's GC networks.
      batch: Number of images, of noise.
      size: Their height and width in pixels; None for the network's own.
      seed: Of the noise.

    Returns:
      The largest difference of a logit over the largest logit.

    Raises:
      ConfigError: torch or timm is not installed.
      CheckpointError: The weights cannot be read, or are not of a network of timm's.
    """
    torch, timm = (
        import_optional(name, 'the comparison', f'pip install {name}') for name in ('torch', 'timm')
    )
    found = find_pretrained(source)
    path, name = found.path, found.name
    loaded = load_named(path, name)
    if loaded.report.family != FAMILY or loaded.name is None:
        raise CheckpointError(
            f'{source} has the names of {loaded.report.family}, not of {FAMILY}: there is nothing '
            'to compare with'
        )
    tensors = read_checkpoint(path).tensors
    theirs = timm.create_model(loaded.name, num_classes=loaded.options.get('num_classes', 1000))
    theirs.load_state_dict({key: torch.tensor(tensors[key]) for key in tensors.shapes})
    shape = model_entry(loaded.name).preprocessing.test_shape if size is None else (size, size)
    images = np.random.default_rng(seed).normal(size=(batch, *shape, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(images.transpose(0, 3, 1, 2).copy())).numpy()
    apply = jax.jit(lambda variables, images: loaded.network.apply(variables, images, train=False))
    found = np.asarray(apply(loaded.variables, images))
    return float(np.abs(found - expected).max() / np.abs(expected).max())
