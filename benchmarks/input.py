"""JPEG files to augmented batches: images a second on one core.

    python -m benchmarks.input --images FOLDER [--json]

FOLDER holds one folder of JPEGs a class (or `train/` with those). It is measured as it is, and once
more with every image resized to 500 pixels. Every candidate reads the same files, takes a random
crop (8% to 100% of the area, 3:4 to 4:3), resizes it bilinearly to 224 pixels, mirrors half of them
and gives batches of 32 in uint8; each is bound to the same one core and makes its batches in one
thread. `gcnet_jax` reads the files as a prepared data set, as in training; `timm` is
`create_loader(is_training=True)` on torch's DataLoader, collated by timm's fast_collate, without
the normalisation; `tf.data` is `decode_and_crop_jpeg` and `tf.image.resize`, which does not
antialias unless it is told to, as the others do.
"""

import argparse
import functools
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import Setup, argument_parser, compare, report

BATCH = 32
SIZE = 224
LARGE = 500
NAME = 'benchmark_images'


def main(arguments: list[str] | None = None) -> None:
    """Measures both sets of images and prints the table."""
    parser = argument_parser(__doc__)
    parser.add_argument(
        '--images', required=True, type=Path, help='folder with one folder of JPEGs a class'
    )
    parser.add_argument('--rounds', type=int, default=15, help='timed runs of each candidate')
    parser.add_argument('--batches', type=int, default=16, help='batches of 32 in a run')
    options = parser.parse_args(arguments)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for name, large in (('as they are', False), (f'{LARGE} px', True)):
            folder = Path(place) / ('large' if large else 'plain')
            _copy_images(options.images, folder, large)
            rows += _measure(name, folder, options)
    report(rows, as_json=options.json)


def _copy_images(source: Path, target: Path, large: bool) -> None:
    source = source / 'train' if (source / 'train').is_dir() else source
    files = sorted(path for path in source.glob('*/*') if path.suffix.lower() in ('.jpg', '.jpeg'))
    if not files:
        raise SystemExit(f'--images {source}: no folder in it has a .jpg or .jpeg file')
    for path in files:
        copy = target / path.parent.name / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if large:
            _write_large(path, copy)
        else:
            shutil.copyfile(path, copy)


def _write_large(source: Path, target: Path) -> None:
    from PIL import Image

    with Image.open(source) as image:
        factor = LARGE / max(image.size)
        size = [round(edge * factor) for edge in image.size]
        image.convert('RGB').resize(size, Image.Resampling.BICUBIC).save(target, quality=90)


def _measure(images: str, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    from gcnet_jax.data.folder import prepare_folder

    # timm and tf.data read the files themselves. Half of the set would be a test split: both are
    # read.
    prepare_folder(folder, NAME, str(folder.parent / f'{folder.name}_prepared'), test_fraction=0.5)
    core = max(os.sched_getaffinity(0))
    makers = {'gcnet_jax': (our_batches, 'grain'), 'timm': (timm_batches, 'timm')}
    makers['tf.data'] = (tensorflow_batches, 'tensorflow')
    antialiased = functools.partial(tensorflow_batches, antialias=True)
    makers['tf.data, antialiased'] = (antialiased, 'tensorflow')
    missing = [
        name for name, (_, module) in makers.items() if importlib.util.find_spec(module) is None
    ]
    candidates: dict[str, Setup] = {
        name: functools.partial(_on_one_core, make, folder, core, options.batches)
        for name, (make, _) in makers.items()
        if name not in missing
    }
    timings = compare(candidates, rounds=options.rounds)
    rates = {name: options.batches * BATCH / timing.median for name, timing in timings.items()}
    rows = []
    for name in makers:
        found = name in timings
        row = {'images': images, 'candidate': name if found else f'{name} (not installed)'}
        row['images/s/core'] = rates[name] if found else None
        row['spread'] = timings[name].spread if found else None
        row['ours / this'] = rates['gcnet_jax'] / rates[name] if found else None
        rows.append(row)
    return rows


def _on_one_core(
    make: Callable[[Path], Iterator], folder: Path, core: int, batches: int
) -> Callable[[], None]:
    os.sched_setaffinity(0, {core})  # Before any library counts the cores.
    iterator = make(folder)

    def run() -> None:
        for _ in range(batches):
            images = next(iterator)
            assert tuple(sorted(images.shape)) == tuple(sorted((BATCH, SIZE, SIZE, 3)))
            assert str(images.dtype).endswith('uint8')

    return run


def our_batches(folder: Path) -> Iterator:
    """Yields uint8 images `[batch, height, width, channel]`, as our training loop gets them."""
    from gcnet_jax.data.loader import train_batches
    from gcnet_jax.data.sources import load_source

    source = load_source(NAME, 'train+test', str(folder.parent / f'{folder.name}_prepared'))
    batches = train_batches(source, global_batch_size=BATCH, image_size=SIZE, seed=0, num_threads=1)
    for batch in batches:
        yield batch['image']


def timm_batches(folder: Path) -> Iterator:
    """Yields uint8 images `[batch, channel, height, width]` of timm's training loader."""
    import torch
    from timm.data import create_dataset, create_loader

    torch.set_num_threads(1)
    loader = create_loader(
        create_dataset('', root=str(folder)),
        input_size=(3, SIZE, SIZE),
        batch_size=BATCH,
        is_training=True,
        color_jitter=None,
        interpolation='bilinear',
        num_workers=0,
        persistent_workers=False,
        device=torch.device('cpu'),
    )
    while True:
        for images, _ in loader.loader:  # Before the prefetcher normalises on the device.
            yield images


def tensorflow_batches(folder: Path, antialias: bool = False) -> Iterator:
    """Yields uint8 images `[batch, height, width, channel]` of the pipeline usual on TPUs."""
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
    import tensorflow as tf

    def load(path: Any) -> Any:
        data = tf.io.read_file(path)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.image.extract_jpeg_shape(data),
            tf.zeros([1, 0, 4]),
            min_object_covered=0.0,
            area_range=(0.08, 1.0),
            aspect_ratio_range=(3 / 4, 4 / 3),
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.concat([begin[:2], size[:2]], axis=0)
        image = tf.image.decode_and_crop_jpeg(data, window, channels=3)
        image = tf.image.resize(image, [SIZE, SIZE], method='bilinear', antialias=antialias)
        return tf.cast(tf.image.random_flip_left_right(image), tf.uint8)

    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    paths = sorted(str(path) for path in folder.glob('*/*'))
    dataset = tf.data.Dataset.from_tensor_slices(paths).shuffle(len(paths)).repeat()
    dataset = dataset.map(load, num_parallel_calls=1).batch(BATCH, drop_remainder=True)
    for images in dataset.with_options(options):
        yield images.numpy()


if __name__ == '__main__':
    main()
