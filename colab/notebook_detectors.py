"""What only the notebook on detectors needs: published files, and small things to try it on."""

import json
import os
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any


def fetch(address: str) -> Path:
    """Downloads a file into this directory, unless it is here already; returns its path."""
    file = Path(address.rpartition('/')[2])
    if not address.startswith('https://'):
        return Path(address)
    if not file.exists():
        print(f'fetching {address}')
        begun = file.with_name(f'.{file.name}.part')
        urllib.request.urlretrieve(address, begun)
        begun.replace(file)
    return file


def write_random_detector(directory: str | os.PathLike) -> Path:
    """Writes a small detector that was never trained, where there is no model zoo to load from."""
    import jax
    import numpy as np

    from gcnet_jax.data.preprocessing import KeepRatio
    from gcnet_jax.stored import ModelDescription, write_ported

    options = {
        'backbone': 'gc_resnet18',
        'norm': None,
        'widths': [8, 8, 16, 16],
        'channels': 16,
        'box_channels': 32,
        'num_classes': 3,
    }
    description = ModelDescription(
        'mask_rcnn_resnet50_fpn',
        options,
        ('person', 'boat', 'bench'),
        KeepRatio(short_side=64, long_side=96),
        'drawn at random',
        'detection',
    )
    init = jax.jit(partial(description.build().init, train=False))
    variables = jax.device_get(init(jax.random.key(0), np.zeros((1, 64, 96, 3), np.float32)))
    # Of random logits none is certain; certain ones make objects.
    logits = variables['params']['box_head_0']['logits']
    logits['kernel'] = 40 * logits['kernel']
    write_ported(directory, description, variables)
    return Path(directory)


def write_coco(directory: str | os.PathLike, detector: Any, images: Any, most: int = 20) -> Path:
    """Writes a set in COCO's format, of images with what a detector finds in each: the best of it.

    It shows what such a set looks like. To judge a detector takes what people have seen.
    """
    from PIL import Image

    from gcnet_jax.inference.images import load_upright

    place = Path(directory)
    (place / 'images').mkdir(parents=True, exist_ok=True)
    contents: dict[str, list] = {'images': [], 'annotations': []}
    contents['categories'] = [
        {'id': number, 'name': name} for number, name in enumerate(detector.label_names, start=1)
    ]
    for number, (path, found) in enumerate(detector.stream(images), start=1):
        Image.fromarray(load_upright(path)).save(place / 'images' / f'{number}.png')
        height, width = found.size
        contents['images'].append(
            {'id': number, 'file_name': f'{number}.png', 'height': height, 'width': width}
        )
        best = found.take(range(min(most, len(found))))
        for item, mask in zip(best.to_json(), best.masks, strict=True):
            if not mask.any():
                continue  # Less than a pixel.
            left, top, right, bottom = item['box']
            contents['annotations'].append(
                {
                    'id': len(contents['annotations']) + 1,
                    'image_id': number,
                    'category_id': item['class'] + 1,
                    'bbox': [left, top, right - left, bottom - top],
                    'area': int(mask.sum()),
                    'iscrowd': 0,
                    'segmentation': item['mask'],
                }
            )
    (place / 'instances.json').write_text(json.dumps(contents))
    return place
