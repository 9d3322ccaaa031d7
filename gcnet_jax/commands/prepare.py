"""The command prepare: a data set of a folder of images, with classes, label maps or objects."""

import argparse
import shlex
import sys
from typing import TYPE_CHECKING

from gcnet_jax.commands.common import print_lines, refuse_flags
from gcnet_jax.errors import one_line

if TYPE_CHECKING:
    from gcnet_jax.data.detection_folder import PreparedDetection
    from gcnet_jax.data.prepared import PreparedSet
    from gcnet_jax.data.segmentation_folder import PreparedSegmentation

TASKS = ('classification', 'segmentation', 'detection')
SEGMENTATION_FLAGS = ('classes', 'labels', 'reduce_zero_label')
SPLIT_FLAGS = ('test_fraction', 'seed')
# Label names that come with the package, see `data.segmentation_labels`.
LABEL_SETS = ('ade20k', 'cityscapes', 'voc')
TEST_FRACTION = 0.1


def add_prepare(commands: argparse._SubParsersAction) -> None:
    prepare = commands.add_parser('prepare', help='make a data set of a folder of images')
    prepare.add_argument(
        'directory',
        help='holds train/CLASS/IMAGE (and val, test) or CLASS/IMAGE; for segmentation '
        'images/train/NAME.jpg and labels/train/NAME.png (and val, test); for detection '
        'annotations/instances_train.json (and val, test) and train/NAME.jpg, as COCO does',
    )
    prepare.add_argument('--name', required=True, help='what config.data.name will say')
    prepare.add_argument('--data-dir', help="where data sets live; default: TFDS's directory")
    prepare.add_argument(
        '--task',
        choices=TASKS,
        default=TASKS[0],
        help="what the folder is for: one folder a class, images and label maps, or COCO's format",
    )
    prepare.add_argument(
        '--test-fraction',
        type=float,
        help='share of each class for the split test, where the folder has no splits; '
        f'default: {TEST_FRACTION}',
    )
    prepare.add_argument('--seed', type=int, help='of that draw; default: 0')
    names = prepare.add_mutually_exclusive_group()
    names.add_argument(
        '--classes',
        metavar='NAME,NAME,...',
        help='of segmentation, in the order of the labels; default: DIRECTORY/classes.txt',
    )
    names.add_argument(
        '--labels', choices=LABEL_SETS, help='the classes of segmentation are those of this set'
    )
    prepare.add_argument(
        '--reduce-zero-label',
        action='store_true',
        help="of segmentation: 0 is no class, and every other label one more than its class's "
        'number (as in ADE20K)',
    )
    prepare.add_argument(
        '--skip-damaged', action='store_true', help='leave damaged images out, and list them'
    )
    prepare.add_argument('--overwrite', action='store_true', help='replace a set of that name')
    prepare.set_defaults(run=_prepare)


def _prepare(options: argparse.Namespace) -> None:
    if options.task == 'segmentation':
        refuse_flags(options, '--task segmentation', SPLIT_FLAGS)
        _prepare_segmentation(options)
    elif options.task == 'detection':
        refuse_flags(options, '--task detection', (*SPLIT_FLAGS, *SEGMENTATION_FLAGS))
        _prepare_detection(options)
    else:
        refuse_flags(options, '--task classification', SEGMENTATION_FLAGS)
        _prepare_classification(options)


def _prepare_classification(options: argparse.Namespace) -> None:
    from gcnet_jax.data.folder import prepare_folder

    fraction = TEST_FRACTION if options.test_fraction is None else options.test_fraction
    prepared = prepare_folder(
        options.directory,
        options.name,
        options.data_dir,
        test_fraction=fraction,
        seed=options.seed or 0,
        skip_damaged=options.skip_damaged,
        overwrite=options.overwrite,
        progress=sys.stderr.isatty(),
    )
    print_lines(f'left out: {problem}' for problem in prepared.damaged)
    print_lines(f'no class: {folder} (an empty folder)' for folder in prepared.empty)
    _print_set(prepared)
    command = _training_command(prepared, 'folder', options.data_dir, f'runs/{prepared.name}')
    print(f'train on it: {command}')
    command = _training_command(
        prepared, 'finetune', options.data_dir, f'runs/{prepared.name}_tuned', 'DIR'
    )
    print(f'or fine-tune a trained network: {command}')


def _prepare_segmentation(options: argparse.Namespace) -> None:
    from gcnet_jax.data import segmentation_labels
    from gcnet_jax.data.segmentation_folder import prepare_segmentation

    names = None
    if options.labels is not None:
        names = segmentation_labels.LABEL_SETS[options.labels].names
    elif options.classes is not None:
        names = options.classes.split(',')
    prepared = prepare_segmentation(
        options.directory,
        options.name,
        options.data_dir,
        label_names=names,
        reduce_zero_label=options.reduce_zero_label,
        skip_damaged=options.skip_damaged,
        overwrite=options.overwrite,
        progress=sys.stderr.isatty(),
    )
    _print_left_out(prepared)
    if prepared.unlabelled:
        print(f'left out: {prepared.unlabelled:,} images of the split test, without label maps')
    _print_set(prepared)
    _print_shares(prepared)
    command = _training_command(prepared, 'segmentation', options.data_dir, f'runs/{prepared.name}')
    print(f'train on it: {command}')


def _prepare_detection(options: argparse.Namespace) -> None:
    from gcnet_jax.data.detection_folder import prepare_detection

    prepared = prepare_detection(
        options.directory,
        options.name,
        options.data_dir,
        skip_damaged=options.skip_damaged,
        overwrite=options.overwrite,
        progress=sys.stderr.isatty(),
    )
    _print_left_out(prepared)
    _print_set(prepared)
    _print_objects(prepared)
    command = _training_command(
        prepared, 'detection', options.data_dir, f'runs/{prepared.name}', 'DIR'
    )
    print(f'fine-tune a ported detector: {command}')


def _print_left_out(prepared: 'PreparedSet') -> None:
    print_lines(f'left out: {problem}' for problem in prepared.damaged)
    if prepared.damaged:
        print(f'left out: {len(prepared.damaged):,} in all')


def _print_objects(prepared: 'PreparedDetection') -> None:
    for split, found in prepared.objects.items():
        masks = 'with masks' if found.has_masks else 'boxes only'
        print(
            f'{split}: objects to train on: {found.targets:,} ({masks}), up to {found.most:,} in '
            f'one image; others: {found.crowds:,} crowds, {found.degenerate:,} degenerate; images '
            f'without objects: {found.backgrounds:,}'
        )
    print_lines(f'note: {note}' for note in prepared.notes)
    counts = zip(prepared.label_names, prepared.label_counts, strict=True)
    absent = [name for name, count in counts if not count]
    if absent:
        print_lines([f'not in any training image: {", ".join(absent)}'])


def _print_set(prepared: 'PreparedSet') -> None:
    splits = ', '.join(f'{split} {size:,}' for split, size in prepared.split_sizes.items())
    count = len(prepared.label_names)
    print(f'{prepared.name}: {count} {"class" if count == 1 else "classes"}, images: {splits}')
    print(f'in {one_line(prepared.path)}')


def _print_shares(prepared: 'PreparedSegmentation') -> None:
    shares, ignored = prepared.shares()
    print('share of the pixels of the training images:')
    rows = [*zip(shares, prepared.label_names, strict=True), (ignored, '255, which does not count')]
    print_lines(f'{share:8.2%}  {name}' for share, name in rows)
    absent = [name for share, name in zip(shares, prepared.label_names, strict=True) if not share]
    if absent:
        print_lines([f'not in any training image: {", ".join(absent)}'])
    if not prepared.are_named:
        print(
            'the classes are numbered up to the largest label: for names put them into '
            'classes.txt in that folder, one a line, or give --classes'
        )


def _training_command(
    prepared: 'PreparedSet',
    config: str,
    data_dir: str | None,
    workdir: str,
    init_from: str | None = None,
) -> str:
    """Returns the command that trains on a set by a config that comes with the package."""
    from gcnet_jax.commands.config_files import load_config

    name, *others = prepared.train_settings(load_config(config).training.batch_size)
    settings = [
        *([f'training.init_from={init_from}'] if init_from else []),
        name,
        *([f'data.data_dir={data_dir}'] if data_dir else []),
        *others,
    ]
    flags = ' '.join(shlex.quote(f'--config.{setting}') for setting in settings)
    return f'python -m gcnet_jax train {config} {flags} --workdir {workdir}'
