"""A folder in COCO's format of bright rectangles and triangles, and a tiny detector's config."""

import json

import numpy as np
from PIL import Image, ImageDraw

from gcnet_jax.data.detection_folder import prepare_detection
from gcnet_jax.training.config import default_config, name_task

COLORS = {'box': (230, 60, 50), 'tent': (60, 90, 240)}
BACKBONE = {
    'widths': (4, 4, 8, 8),
    'stage_sizes': (1, 1, 1, 1),
    'context': {
        'block': 'global_context',
        'stages': (3,),
        'position': 'after_conv2',
        'ratio': 1 / 2,
    },
}
DETECTOR = {'backbone': 'gc_resnet18', 'channels': 8, 'box_channels': 16, **BACKBONE}


def draw(rng, size):
    """One image, and the polygon of each of its objects by category; some images have none."""
    height, width = size
    image = Image.fromarray(rng.integers(0, 60, (height, width, 3), dtype=np.uint8))
    objects = []
    for place in range(rng.integers(0, 3)):
        name = tuple(COLORS)[rng.integers(len(COLORS))]
        side = int(rng.integers(14, 24))
        left = place * (width // 2) + int(rng.integers(0, width // 2 - side))
        top = int(rng.integers(0, height - side))
        right, bottom = left + side, top + side
        polygon = [left, top, right, top, right, bottom, left, bottom]
        if name == 'tent':
            polygon = [left + side / 2, top, right, bottom, left, bottom]
        ImageDraw.Draw(image).polygon(polygon, fill=COLORS[name])
        objects.append((name, (left, top, side, side), polygon))
    return image, objects


def write_folder(root, splits, names=tuple(COLORS)):
    """Writes images of two shapes with their annotations; objects of other names are left out."""
    for split, count in splits.items():
        (root / split).mkdir(parents=True)
        (root / 'annotations').mkdir(exist_ok=True)
        images, annotations = [], []
        for number in range(count):
            size = (48, 64) if number % 4 else (64, 48)
            image, objects = draw(np.random.default_rng([number, len(split)]), size)
            image.save(root / split / f'{number}.png')
            entry = {'id': number, 'file_name': f'{number}.png'}
            images.append(entry | {'height': size[0], 'width': size[1]})
            annotations += [
                {
                    'id': 10 * number + place + 1,
                    'image_id': number,
                    'category_id': names.index(name) + 1,
                    'bbox': list(box),
                    'area': box[2] * box[3],
                    'iscrowd': 0,
                    'segmentation': [polygon],
                }
                for place, (name, box, polygon) in enumerate(objects)
                if name in names
            ]
        categories = [{'id': index + 1, 'name': name} for index, name in enumerate(names)]
        contents = {'images': images, 'annotations': annotations, 'categories': categories}
        (root / f'annotations/instances_{split}.json').write_text(json.dumps(contents))
    return root


def prepare(root, name='shapes', names=tuple(COLORS), train=16, val=4):
    """Prepares such a folder; returns where the set is."""
    folder = write_folder(root / name, {'train': train, 'val': val}, names)
    prepare_detection(str(folder), name, str(root / 'prepared'))
    return root / 'prepared'


def tiny_config(data_dir, name='shapes', **training):
    """A few steps on images of up to 64 x 64 pixels, landscapes and portraits on one canvas."""
    config = default_config()
    name_task(config, 'detection')
    config.model.name = 'mask_rcnn_resnet50_fpn'
    config.model.norm.kind = 'group'
    config.model.norm.channel_groups = 2
    config.model.update(DETECTOR)
    config.task.max_boxes = 4
    config.task.mask_size = 32
    config.data.name = name
    config.data.data_dir = str(data_dir)
    config.data.image_size = (64, 64)
    config.data.num_threads = 0
    config.optimizer.clip_norm = 10.0
    config.schedule.peak_learning_rate = 0.02
    config.training.batch_size = 8
    config.training.total_steps = 8
    config.training.log_steps = 2
    config.training.evaluation_steps = 4
    config.training.checkpoint_steps = 4
    config.training.keep_checkpoints = 9
    config.runtime.progress = 'lines'
    config.runtime.tensorboard = False
    config.training.update(training)
    return config
