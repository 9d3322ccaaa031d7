"""Eight CPU devices for every test, variables, a small stored network, pictures of all forms."""

import errno
import io
import os
import types
from pathlib import Path

# The tests compile a lot and compute little: without LLVM's optimisations they take a fifth.
os.environ['XLA_FLAGS'] = ' '.join(
    (
        os.environ.get('XLA_FLAGS', ''),
        '--xla_force_host_platform_device_count=8',
        '--xla_backend_optimization_level=0',
    )
)
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# What one test compiled must not help another; those about the cache turn it on.
os.environ['JAX_ENABLE_COMPILATION_CACHE'] = 'false'

import functools
import math

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from PIL import Image

LABELS = ('ant', 'bee', 'cat', 'dog', 'elk', 'fox')
PLACE = {'stages': (1,), 'position': 'after_conv2', 'ratio': 1 / 2}
OPTIONS = {
    'num_classes': len(LABELS),
    'widths': [8],
    'stage_sizes': [1],
    'context': [{'block': 'global_context', **PLACE}, {'block': 'squeeze_excite', **PLACE}],
}


@pytest.fixture
def float64():
    """JAX computes in float64 for one test; the setting's name that every JAX from 0.7.2 on has."""
    jax.config.update('jax_enable_x64', True)
    yield
    jax.config.update('jax_enable_x64', False)


@pytest.fixture(scope='module')
def quick_compilation():
    """Compiles without optimising: for large programs that run a few times, half the work."""
    options = {'xla_backend_optimization_level': 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, 'jit', functools.partial(jax.jit, compiler_options=options))
        yield


@pytest.fixture(scope='session')
def programs(tmp_path_factory):
    """Where one process of pytest keeps what tests with `compile_once` compiled."""
    return tmp_path_factory.mktemp('programs')


@pytest.fixture(scope='module')
def compile_once(programs):
    """Lets the tests of a module share compiled programs, among them and with other such modules.

    For runs and commands, each of which makes its network anew and would compile it again.
    """
    settings = {
        'jax_enable_compilation_cache': True,
        'jax_compilation_cache_dir': str(programs),
        'jax_persistent_cache_min_compile_time_secs': 0,
        'jax_persistent_cache_min_entry_size_bytes': -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    _set_up_cache(settings)
    yield
    _set_up_cache(before)


def _set_up_cache(settings):
    for name, value in settings.items():
        jax.config.update(name, value)
    reset_cache()  # JAX reads the settings once, when the first program is compiled.


@pytest.fixture(scope='session')
def random_variables():
    """A function `(model, *inputs, seed=0, **options) -> variables` of numpy arrays.

    Kernels have unit gain, statistics and biases are not trivial, and nothing is zero: what an
    initialisation would hide (a zero kernel, a unit scale) shows. It compiles nothing.
    """

    def draw(model, *inputs, seed=0, **options):
        shapes = jax.eval_shape(
            lambda *values: model.init(jax.random.key(0), *values, **options), *inputs
        )
        shapes = {name: shapes[name] for name in shapes if name in ('params', 'batch_stats')}
        generator = np.random.default_rng(seed)

        def leaf(path, shape):
            name = path[-1].key
            values = generator.normal(size=shape.shape)
            if name == 'kernel':
                values /= math.sqrt(math.prod(shape.shape[:-1]))
            elif name in ('scale', 'var'):
                values = 1 + 0.2 * np.abs(values)
            else:
                values *= 0.2
            return values.astype(shape.dtype)

        return jax.tree_util.tree_map_with_path(leaf, shapes)

    return draw


@pytest.fixture(scope='session')
def stored(tmp_path_factory, random_variables):
    """A checkpoint of a small network with context blocks."""
    # Here, because most tests need neither.
    from gcnet_jax.data.preprocessing import Preprocessing
    from gcnet_jax.stored import ModelDescription

    preprocessing = Preprocessing(
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.3, 0.25),
        interpolation='bicubic',
        crop_fraction=0.8,
        test_size=12,
    )
    description = ModelDescription('gccnn', OPTIONS, LABELS, preprocessing, 'a test')
    return _write(description, (12, 12), tmp_path_factory, random_variables)


@pytest.fixture(scope='session')
def stored_detector(tmp_path_factory, random_variables):
    """A checkpoint of a small detector with context blocks, for images up to 64 x 96 pixels."""
    from gcnet_jax.data.preprocessing import KeepRatio
    from gcnet_jax.stored import ModelDescription

    options = {
        'backbone': 'gc_resnet18',
        'norm': None,
        'widths': [8, 8, 16, 16],
        'channels': 16,
        'box_channels': 32,
        'num_classes': 3,
    }
    preprocessing = KeepRatio(
        mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25), short_side=64, long_side=96
    )
    name, labels = 'mask_rcnn_resnet50_fpn', ('ant', 'bee', 'cat')
    description = ModelDescription(name, options, labels, preprocessing, 'a test', 'detection')
    return _write(description, (64, 96), tmp_path_factory, random_variables)


@pytest.fixture(scope='session')
def certain_detector(tmp_path_factory, random_variables):
    """A smaller one with large logits: of random ones none is certain enough for an object."""
    from gcnet_jax.data.preprocessing import KeepRatio
    from gcnet_jax.stored import ModelDescription

    options = {
        'backbone': 'gc_resnet18',
        'norm': None,
        'widths': (4, 4, 8, 8),
        'context': {'block': 'global_context', 'stages': (3,), 'position': 'after_conv2'},
        'channels': 8,
        'box_channels': 16,
        'num_classes': 3,
    }
    description = ModelDescription(
        *('mask_rcnn_resnet50_fpn', options, ('ant', 'bee', 'cat')),
        KeepRatio(short_side=64, long_side=96),
        task='detection',
    )

    def variables_of(*inputs, **named):
        variables = random_variables(*inputs, **named)
        logits = variables['params']['box_head_0']['logits']
        logits['kernel'] = 20 * np.asarray(logits['kernel'])
        return variables

    return _write(description, (64, 64), tmp_path_factory, variables_of)


@pytest.fixture(scope='session')
def stored_segmenter(tmp_path_factory, random_variables):
    """A checkpoint of a small segmenter with context in its head, for images up to 32 x 64."""
    from gcnet_jax.data.preprocessing import KeepRatio
    from gcnet_jax.stored import ModelDescription

    options = {
        'backbone': 'resnet18',
        'widths': (8, 8, 8, 8),
        'stage_sizes': (1, 1, 1, 1),
        'output_stride': 16,
        'channels': 8,
        'auxiliary_channels': 4,
        'num_classes': 3,
    }
    description = ModelDescription(
        *('gc_resnet50_d8_cityscapes', options, ('ant', 'bee', 'cat')),
        KeepRatio((0.4, 0.5, 0.6), (0.2, 0.3, 0.25), short_side=32, long_side=64, multiple_of=1),
        *('a test', 'segmentation'),
    )

    def variables_of(*inputs, **named):
        variables = random_variables(*inputs, **named)
        # Of random logits one class is the largest nearly everywhere: each gets a mean of zero.
        logits = variables['params']['head']['logits']
        logits['kernel'] = 5 * logits['kernel']
        image = picture(0, 32, 64)[None] / np.float32(64) - 2
        apply = jax.jit(functools.partial(description.build().apply, train=False))
        logits['bias'] = logits['bias'] - np.mean(apply(variables, image), axis=(0, 1, 2))
        return variables

    return _write(description, (32, 64), tmp_path_factory, variables_of)


def _write(description, size, tmp_path_factory, random_variables):
    from gcnet_jax.stored import write_ported

    directory = tmp_path_factory.mktemp('stored') / 'network'
    images = np.zeros((1, *size, 3), np.float32)
    variables = random_variables(description.build(), images, train=False)
    write_ported(directory, description, variables)
    return types.SimpleNamespace(
        directory=directory,
        description=description,
        variables=variables,
        one_device=jax.devices()[:1],
    )


def encode(image, image_format='PNG', **options):
    """Encodes an array or a Pillow image as the bytes of a file."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    data = io.BytesIO()
    image.save(data, image_format, **options)
    return data.getvalue()


def picture(seed, height=20, width=30):
    """A smooth picture that differs much from that of another seed, `[height, width, 3]`."""
    small = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height)))


@pytest.fixture
def make():
    """The two helpers above, because test modules cannot import this file."""
    return types.SimpleNamespace(encode=encode, picture=picture)


@pytest.fixture
def reordered(monkeypatch):
    """Training steps have the order of layers that a TPU gets."""
    from gcnet_jax.models.reorder import reorder
    from gcnet_jax.training import steps

    monkeypatch.setattr(steps, 'reorder', lambda model, platform: reorder(model, 'tpu'))


@pytest.fixture
def read_only(monkeypatch):
    """A file system that lets nothing be put in place, and nothing be removed either."""

    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, 'Read-only file system')

    monkeypatch.setattr(os, 'replace', refuse)
    monkeypatch.setattr(Path, 'unlink', refuse)
    return 'cannot write .*: Read-only file system$'
