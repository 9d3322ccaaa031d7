"""Runs on images that are not square, from the command line to the evaluation of what is stored."""

import io

import jax
import numpy as np
import pytest
from PIL import Image

from gcnet_jax import Classifier
from gcnet_jax.data import sources
from gcnet_jax.errors import ConfigError
from gcnet_jax.inference.evaluation import evaluate
from gcnet_jax.stored import read_model_description
from gcnet_jax.training import experiment
from gcnet_jax.training.config import default_config
from gcnet_jax.training.loop import train
from gcnet_jax.training.overrides import override


class Pictures:
    """Pictures of several shapes, whose brightness tells their class."""

    label_names = ('black', 'grey', 'white')
    num_classes, is_multilabel, no_label = 3, False, 0

    def __init__(self, name, split, data_dir=None, purpose='evaluation'):
        self.name, self.split = name, split or 'test'
        rng = np.random.default_rng(len(self.split))
        self.images = []
        for index in range({'train': 24, 'test': 11}[self.split]):
            shape = (9 + index % 4, 9 + index % 7, 3)
            pixels = 40 + 80 * (index % 3) + rng.integers(-30, 31, shape)
            file = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(file, 'PNG')
            self.images.append(file.getvalue())

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {'image': self.images[index], 'label': index % 3}

    def describe(self, index):
        return f'picture {index}'


def make_config(*flags):
    config = default_config()
    config.model.name = 'gccnn'
    config.model.stage_sizes, config.model.widths = (1,), (4,)
    config.model.context = {'stages': (1,), 'position': 'after_conv2', 'ratio': 0.5}
    config.data.image_size = 8
    config.data.num_threads = 0
    config.training.batch_size = 8
    config.training.total_steps = config.training.evaluation_steps = 4
    config.training.checkpoint_steps = config.training.log_steps = 4
    config.runtime.progress = 'lines'
    config.runtime.tensorboard = False
    return override(config, flags)


@pytest.fixture(autouse=True)
def pictures(monkeypatch):
    monkeypatch.setattr(sources, 'load_source', Pictures)


@pytest.mark.parametrize('augmentation', ['resized_crop', 'pad_crop'])
def test_a_run_on_images_that_are_not_square(tmp_path, augmentation):
    config = make_config(
        '--config.data.image_size=(6,10)',
        '--config.data.evaluation_image_size=(8,12)',
        f'--config.data.augmentation={augmentation}',
        '--config.mesh.data=4',
        '--config.mesh.spatial=2',
    )
    built = experiment.assemble(config)
    with built.train_batches(start_step=0) as batches:
        assert next(batches)['image'].shape == (8, 6, 10, 3)
    final = train(config, tmp_path / 'run')
    preprocessing = read_model_description(tmp_path / 'run').preprocessing
    assert (preprocessing.train_size, preprocessing.test_size) == ((6, 10), (8, 12))
    classifier = Classifier.load(
        tmp_path / 'run', fold=False, batch_size=8, devices=jax.devices()[:1]
    )
    evaluation = evaluate(classifier, Pictures('pictures', 'test'))
    assert evaluation.metrics['accuracy'] == pytest.approx(final['eval/accuracy'])
    assert evaluation.metrics['loss'] == pytest.approx(final['eval/loss'], rel=1e-4)
    assert train(config, tmp_path / 'run')['eval/loss'] == final['eval/loss']  # Found complete.


def test_evaluation_has_the_size_of_training_unless_it_has_its_own():
    preprocessing = experiment.assemble(
        make_config('--config.data.image_size=(6,10)')
    ).description.preprocessing
    assert preprocessing.train_size == preprocessing.test_size == (6, 10)


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['image_size=(6,0)'], r'image_size is \(6, 0\); it must be .* two of them: \(height, wid'),
        (['image_size=(6,7,8)'], r'image_size is \(6, 7, 8\)'),
        (['image_size=large'], "image_size is 'large'; it must be a whole number from 1"),
        (['image_size=(6,8)'], r'image_size is \(6, 8\); the height must divide by'),
        (['image_size=(8,5000)'], 'train_size must be a whole number from 1 to 4096 or a pair'),
    ],
)
def test_sizes_that_cannot_be_are_refused(flags, message):
    config = make_config(
        '--config.mesh.data=2',
        '--config.mesh.spatial=4',
        *(f'--config.data.{flag}' for flag in flags),
    )
    with pytest.raises(ConfigError, match=message):
        experiment.assemble(config)
