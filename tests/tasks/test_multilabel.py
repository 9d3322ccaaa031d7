"""Multi-label classification against its definition, and a whole run of it from files to mAP."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from gcnet_jax.data.sources import load_source
from gcnet_jax.errors import ConfigError, DataError
from gcnet_jax.stored import find_checkpoint
from gcnet_jax.tasks import Classification, MultiLabel
from gcnet_jax.tasks.multilabel import MultiLabelEvaluation
from gcnet_jax.training.config import default_config, name_task
from gcnet_jax.training.loop import train
from gcnet_jax.training.metrics import read_metrics

TASK = MultiLabel(3, mean=(0.5,) * 3, std=(0.25,) * 3)
NAMES = ('top', 'left', 'bottom')


def test_the_loss_is_the_mean_over_the_classes_of_the_binary_cross_entropy():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(5, 3)) * 3, rng.integers(0, 2, (5, 3))
    probabilities = 1 / (1 + np.exp(-logits))
    expected = -np.where(labels, np.log(probabilities), np.log(1 - probabilities)).mean(axis=1)
    batch = {'image': jnp.zeros((5, 2, 2, 3)), 'label': jnp.asarray(labels, jnp.float32)}
    sums = TASK.loss({'logits': jnp.asarray(logits)}, batch)
    np.testing.assert_allclose(sums['loss'], expected.sum(), rtol=1e-5)
    assert TASK.weight(batch) == 5
    evaluation = MultiLabelEvaluation()
    mask = np.array([True, True, False, True, True])
    evaluation.add({'logits': logits, 'label': labels, 'mask': mask})
    np.testing.assert_allclose(evaluation.metrics()['loss'], expected[mask].mean(), rtol=1e-6)
    assert evaluation.metrics()['examples'] == 4


def average_precision(scores, labels):
    """The mean, over the images that have the class, of the precision down to that image."""
    order = np.argsort(-scores)
    right = labels[order].cumsum() / np.arange(1, len(scores) + 1)
    return right[labels[order] == 1].mean()


def test_map_is_the_mean_of_the_classes_average_precision_in_any_batches():
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(40, 3)), rng.integers(0, 2, (40, 3))
    labels[:, 2] = 0  # A class that is in no image does not count.
    expected = np.mean([average_precision(logits[:, i], labels[:, i]) for i in (0, 1)])
    for size in (40, 7):
        evaluation = MultiLabelEvaluation()
        for start in range(0, 40, size):
            rows = slice(start, start + size)
            mask = np.ones(len(labels[rows]), bool)
            evaluation.add({'logits': logits[rows], 'label': labels[rows], 'mask': mask})
        assert evaluation.metrics()['mAP'] == pytest.approx(expected)


def test_logits_that_are_not_finite_give_no_map():
    evaluation = MultiLabelEvaluation()
    logits = np.array([[np.nan, 0, 0], [0, 0, 0]], np.float32)
    evaluation.add({'logits': logits, 'label': np.ones((2, 3), int), 'mask': np.ones(2, bool)})
    assert np.isnan(evaluation.metrics()['mAP'])


class Bars(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Grey images with a bright bar along each edge that a label names."""

    VERSION = tfds.core.Version('1.0.0')

    def __init__(self, data_dir):
        self.name = 'bars'
        super().__init__(data_dir=str(data_dir), version='1.0.0', file_format='array_record')

    def _info(self):
        features = {
            'image': tfds.features.Image(shape=(8, 8, 3)),
            'labels': tfds.features.Sequence(tfds.features.ClassLabel(names=NAMES)),
            'labels_no_difficult': tfds.features.Sequence(tfds.features.ClassLabel(names=NAMES)),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {
            'train': self._examples(64, 0),
            'validation': self._examples(21, 1),
            'test': self._examples(5, 2, annotated=False),
        }

    def _examples(self, count, seed, annotated=True):
        rng = np.random.default_rng(seed)
        for index in range(count):
            pixels = rng.integers(60, 120, (8, 8, 3), dtype=np.uint8)
            present = [label for label in range(3) if rng.random() < 0.4]
            for label in present:
                (pixels[:2], pixels[:, :2], pixels[-2:])[label][...] = 250
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, 'PNG')
            names = [NAMES[label] for label in present if annotated]
            yield index, {'image': file.getvalue(), 'labels': names, 'labels_no_difficult': []}

    def _generate_examples(self):
        raise NotImplementedError


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    place = tmp_path_factory.mktemp('tfds')
    Bars(place).download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
    return str(place)


def small_config(data_dir):
    config = default_config()
    name_task(config, 'multilabel')
    config.model.stage_sizes, config.model.widths = (1,), (16,)
    config.model.context = {'stages': (1,), 'position': 'after_conv2', 'ratio': 0.25}
    config.data.update({'name': 'bars', 'data_dir': data_dir, 'image_size': 8})
    config.data.update({'augmentation': 'none', 'flip': False})
    config.training.update({'total_epochs': 12.0, 'batch_size': 16, 'evaluation_epochs': 6.0})
    config.runtime.update({'progress': 'lines', 'tensorboard': False})
    return config


def test_a_network_learns_several_labels_by_the_same_loop(data_dir, tmp_path, capsys):
    final = train(small_config(data_dir), tmp_path / 'run')
    assert final['eval/mAP'] > 0.9
    assert final['eval/examples'] == 21
    evaluations = [line for line in read_metrics(tmp_path / 'run') if 'eval/mAP' in line]
    assert evaluations[0]['eval/loss'] > final['eval/loss']
    out = capsys.readouterr().out
    assert f'eval/mAP {final["eval/mAP"]:.2%}' in out
    best = max(evaluations, key=lambda line: (line['eval/mAP'], -line['step']))
    assert f'(best {best["eval/mAP"]:.2%} at step {best["step"]})' in out or best['step'] == 48
    assert train(small_config(data_dir), tmp_path / 'run')['step'] == 48  # It was complete.


def test_the_best_checkpoint_is_that_of_the_highest_map(tmp_path):
    for step, score in ((1, 0.5), (2, 0.75), (3, 0.25)):
        place = tmp_path / 'checkpoints' / str(step)
        for item, file, content in (
            ('metrics', 'metrics', {'eval/mAP': score, 'eval/accuracy': step / 10}),
            ('description', 'metadata', {'task': 'multilabel'}),
        ):
            (place / item).mkdir(parents=True)
            (place / item / file).write_text(json.dumps(content))
    assert find_checkpoint(tmp_path, 'best').name == '2'


def test_a_task_refuses_the_other_kind_of_data(data_dir, tmp_path):
    config = small_config(data_dir)
    config.task = default_config().task
    with pytest.raises(ConfigError, match=r"several labels .*config.task.name='multilabel'"):
        train(config, tmp_path)
    config = small_config(data_dir)
    config.data.update({'name': 'digits', 'data_dir': None})
    with pytest.raises(ConfigError, match=r"one label .*config.task.name='classification'"):
        train(config, tmp_path)


def test_the_batch_is_that_of_classification_but_for_the_labels():
    other = Classification(3, (0.5,) * 3, (0.25,) * 3)
    assert TASK.batch_spec() == other.batch_spec()
    shapes = TASK.batch_shapes(4, 6, 5), other.batch_shapes(4, 6, 5)
    assert [shape['image'].shape for shape in shapes] == [(4, 6, 5, 3)] * 2
    assert [shape['label'].shape for shape in shapes] == [(4, 3), (4,)]
    images = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)
    batch = {'image': images, 'label': np.eye(3, dtype=np.int32)[[0, 1, 2, 0]]}
    prepared = TASK.prepare(batch, jax.random.key(0))
    np.testing.assert_allclose(prepared['image'], (images / 255 - 0.5) / 0.25, atol=1e-5)


def test_a_split_without_annotations_is_not_evaluated_on(data_dir):
    with pytest.raises(DataError, match="no image of data set 'bars' split 'test' has a label"):
        load_source('bars', 'test', data_dir)
    assert load_source('bars', None, data_dir).split == 'validation'
