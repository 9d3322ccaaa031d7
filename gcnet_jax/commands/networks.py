"""Commands that show networks: models, summary."""

import argparse

from gcnet_jax.commands.common import image_size
from gcnet_jax.errors import UserError


def add_models(commands: argparse._SubParsersAction) -> None:
    models = commands.add_parser('models', help='list the networks')
    models.add_argument('pattern', nargs='?', default='*', help="a glob such as 'gc_*'")
    models.set_defaults(run=_models)


def add_summary(commands: argparse._SubParsersAction) -> None:
    summary = commands.add_parser(
        'summary', help="a network's parameters, multiply-adds, and what its context costs"
    )
    summary.add_argument('name', help='a name that the command models lists')
    summary.add_argument(
        '--size',
        type=image_size,
        metavar='PIXELS',
        help="of the images, such as 224 or 96x160 (height first); default: the network's",
    )
    summary.set_defaults(run=_summary)


def _models(options: argparse.Namespace) -> None:
    from gcnet_jax.models import list_models, model_entry

    names = list_models(options.pattern)
    if not names:
        raise UserError(f'no network matches {options.pattern!r}; leave the pattern out for all')
    width = max(map(len, names))
    for name in names:
        print(f'{name:<{width}}  {model_entry(name).description}')


def _summary(options: argparse.Namespace) -> None:
    import jax
    import jax.numpy as jnp

    from gcnet_jax.data.sizes import format_size, height_and_width
    from gcnet_jax.models import create_model, model_entry
    from gcnet_jax.models.summary import format_summary, summarize

    model = create_model(options.name)
    shape = model_entry(options.name).preprocessing.test_shape
    if options.size is not None:
        shape = height_and_width(options.size)
    if min(shape) < 1:
        raise UserError(f'--size must be 1 or more, got {format_size(options.size)}')
    images = jax.ShapeDtypeStruct((1, *shape, 3), jnp.float32)
    print(format_summary(options.name, images.shape, summarize(model, images, train=False)))
