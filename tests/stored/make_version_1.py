"""Wrote tests/stored/version_1 with the last code of format version 1; kept to say what is in it.

python -m tests.stored.make_version_1 DIRECTORY
"""

import math
import sys
from pathlib import Path

import jax
import numpy as np

from gcnet_jax.data.preprocessing import Preprocessing
from gcnet_jax.stored import ModelDescription, write_ported

PLACE = {'stages': (1,), 'position': 'after_conv2', 'ratio': 1 / 2}
DESCRIPTION = ModelDescription(
    'gccnn',
    {
        'num_classes': 3,
        'widths': [4],
        'stage_sizes': [1],
        'context': [{'block': 'global_context', **PLACE}, {'block': 'squeeze_excite', **PLACE}],
    },
    ('ant', 'bee', 'cat'),
    Preprocessing(
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.3, 0.25),
        interpolation='bicubic',
        crop_fraction=0.8,
        train_size=10,
        test_size=12,
    ),
    'written by format version 1',
)


def images():
    """The images whose logits are in logits.npy."""
    return np.random.default_rng(1).integers(0, 256, (2, 12, 12, 3), np.uint8)


def normalized():
    preprocessing = DESCRIPTION.preprocessing
    values = (images() / 255 - np.array(preprocessing.mean)) / np.array(preprocessing.std)
    return values.astype(np.float32)


def main(directory):
    model, generator = DESCRIPTION.build(), np.random.default_rng(0)
    shapes = jax.eval_shape(
        lambda values: model.init(jax.random.key(0), values, train=False), normalized()
    )

    def draw(path, leaf):
        name, values = path[-1].key, generator.normal(size=leaf.shape)
        if name == 'kernel':
            values /= math.sqrt(math.prod(leaf.shape[:-1]))
        elif name in ('scale', 'var'):
            values = 1 + 0.2 * np.abs(values)
        else:
            values *= 0.2
        return values.astype(leaf.dtype)

    variables = jax.tree_util.tree_map_with_path(draw, shapes)
    write_ported(directory / 'network', DESCRIPTION, variables)
    np.save(directory / 'logits.npy', model.apply(variables, normalized(), train=False))


if __name__ == '__main__':
    main(Path(sys.argv[1]))
