"""What only the notebook's part on segmentation needs: a small set to try it on, and settings."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

CLASSES = ('ground', 'disc', 'square')
SIZE = (48, 64)


def write_shapes(directory: str | os.PathLike, train: int = 32, val: int = 8) -> Path:
    """Writes images of discs and squares with their label maps, as `prepare` wants them."""
    import numpy as np
    from PIL import Image

    place, generator = Path(directory), np.random.default_rng(0)
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    for split, count in (('train', train), ('val', val)):
        for kind in ('images', 'labels'):
            (place / kind / split).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            labels = np.zeros(SIZE, np.uint8)
            for label in (1, 2):
                radius = generator.integers(6, 11)
                row, column = (generator.integers(radius, side - radius) for side in SIZE)
                away = np.abs(rows - row), np.abs(columns - column)
                inside = np.hypot(*away) <= radius if label == 1 else np.maximum(*away) <= radius
                labels[inside] = label
            colors = generator.uniform(0, 255, (len(CLASSES), 3))
            pixels = colors[labels] + generator.normal(0, 12, (*SIZE, 3))
            image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
            image.save(place / 'images' / split / f'{number}.png')
            Image.fromarray(labels).save(place / 'labels' / split / f'{number}.png')
    (place / 'classes.txt').write_text('\n'.join(CLASSES) + '\n')
    return place


def training_config(
    setup: SimpleNamespace,
    folder: str | os.PathLike,
    *,
    backbone: str,
    crop: tuple[int, int],
    limits: tuple[int, int],
    epochs: float,
    batch_size: int,
    init_from: str = '',
) -> Any:
    """Prepares a folder and returns the settings of a run on it: those of configs/segmentation.py.

    Args:
      setup: What `notebook_setup.prepare` returned; in a short run everything is small.
      folder: Holds images/train, images/val, labels/train and labels/val.
      backbone: A classifier's name.
      crop: Height and width of training crops in pixels.
      limits: Short and long side of the images that are cropped, in pixels.
      epochs, batch_size: How long, and how many images at once.
      init_from: A run or a ported directory to start from; '' for random weights.
    """
    from gcnet_jax.commands.config_files import load_config, shipped_configs
    from gcnet_jax.data.segmentation_folder import prepare_segmentation

    config = load_config(str(shipped_configs() / 'segmentation.py'))
    config.data.name = prepare_segmentation(folder, 'my_scenes', overwrite=True).name
    if setup.smoke:
        config.model.widths = (8, 8, 16, 16)
        config.model.channels = 16
        config.model.auxiliary_channels = 0
        crop, limits, epochs = (48, 48), SIZE, 2
    config.model.backbone = backbone
    config.data.image_size = crop
    config.data.evaluation_image_size = limits
    config.training.total_epochs = float(epochs)
    config.training.evaluation_epochs = max(1.0, epochs / 10)
    config.training.batch_size = batch_size
    config.training.init_from = init_from or None
    config.runtime.progress = 'lines'
    return config
