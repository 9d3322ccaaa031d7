"""The command features: images' feature vectors or maps, in a file."""

import argparse

from gcnet_jax.commands.images import (
    IMAGES_HELP,
    ImageStream,
    add_checkpoint_flags,
    load_network,
)
from gcnet_jax.errors import one_line


def add_features(commands: argparse._SubParsersAction) -> None:
    features = commands.add_parser('features', help="images' feature vectors or maps, in a file")
    add_checkpoint_flags(features)
    features.add_argument('images', nargs='+', metavar='IMAGE_OR_FOLDER', help=IMAGES_HELP)
    features.add_argument(
        '--layer',
        default='pooled',
        help="'pooled', 'logits', or a map: such as 'stage4', for a detector 'p2' to 'p6', for a "
        "segmenter 'head_logits'",
    )
    features.add_argument('--out', required=True, metavar='FILE', help='.npz or .safetensors')
    features.add_argument('--overwrite', action='store_true', help='replace that file')
    features.set_defaults(run=_features)


def _features(options: argparse.Namespace) -> int:
    from gcnet_jax.inference.feature_files import check_feature_file, write_features
    from gcnet_jax.inference.images import LeftOut

    check_feature_file(options.out, overwrite=options.overwrite)
    network = load_network(options)
    left_out = LeftOut()
    results = network.stream_features(options.images, options.layer, left_out=left_out)
    stream = ImageStream(options.command, results, left_out)
    name = network.description.name
    shape = write_features(
        options.out, stream, layer=options.layer, source=name, overwrite=options.overwrite
    )
    print(f'wrote {list(shape)} of {options.layer} of {one_line(name)} to {one_line(options.out)}')
    return stream.exit_code()
