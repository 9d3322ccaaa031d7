"""Evaluation against counting by hand, against the training loop, and its report."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from PIL import Image

from gcnet_jax.errors import CheckpointError, DataError
from gcnet_jax.inference.classifier import Classifier
from gcnet_jax.inference.evaluation import (
    Evaluation,
    check_labels,
    draw_confusion,
    evaluate,
    format_evaluation,
    write_evaluation,
)

LABELS = ('ant', 'bee', 'cat', 'dog', 'elk', 'fox')


@dataclasses.dataclass
class Pictures:
    """A labelled set in memory."""

    images: list
    label_names: tuple = LABELS
    name: str = 'pictures'
    split: str = 'test'
    no_label: int = 0
    is_multilabel: bool = False

    @property
    def num_classes(self):
        return len(self.label_names)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {'image': self.images[index], 'label': index % len(self.label_names)}

    def describe(self, index):
        return f'picture {index}'


@pytest.fixture
def source(make):
    return Pictures([make.encode(make.picture(seed)) for seed in range(22)])


@pytest.fixture(scope='module')
def classifier(stored):
    return Classifier.load(stored.directory, batch_size=8, devices=stored.one_device)


def test_the_figures_are_those_of_counting_by_hand(classifier, source):
    evaluation = evaluate(classifier, source)
    logits = classifier.features(source.images, 'logits').astype(np.float64)
    top1 = top5 = loss = 0
    confusion = np.zeros((6, 6), int)
    for index, row in enumerate(logits):
        label = index % 6
        order = sorted(range(6), key=lambda i: -row[i])
        top1 += order[0] == label
        top5 += label in order[:5]
        loss += np.log(np.exp(row).sum()) - row[label]
        confusion[label, order[0]] += 1
    assert evaluation.examples == 22
    assert evaluation.metrics['accuracy'] == top1 / 22
    assert evaluation.metrics['top5'] == top5 / 22 < 1
    assert evaluation.metrics['loss'] == pytest.approx(loss / 22, rel=1e-5)
    np.testing.assert_array_equal(evaluation.confusion, confusion)
    np.testing.assert_allclose(evaluation.class_accuracy, np.diag(confusion) / confusion.sum(1))
    assert evaluation.images_per_second > 0
    assert (evaluation.data, evaluation.split, evaluation.label_names) == (
        *('pictures', 'test'),
        LABELS,
    )


def test_damaged_images_stop_it_or_are_counted(classifier, source):
    source.images[3] = b'no image'
    with pytest.raises(DataError, match=r'picture 3: not an image .*skip_damaged'):
        evaluate(classifier, source)
    evaluation = evaluate(classifier, source, skip_damaged=True)
    assert (evaluation.examples, evaluation.skipped) == (21, 1)
    assert evaluation.confusion.sum() == 21
    with pytest.raises(DataError, match='every image of'):
        evaluate(classifier, Pictures([b'no image'] * 3), skip_damaged=True)


@pytest.mark.parametrize(
    ('names', 'message'),
    [
        (LABELS[:5], 'has 6 classes and data set .pictures. has 5'),
        ((*LABELS[:5], 'gnu'), "different labels: the data set is without 'fox', with 'gnu'; "),
        (LABELS[::-1], "in another order: class 0 is 'ant' .* 'fox' in the data"),
    ],
)
def test_other_labels_are_refused(classifier, source, names, message):
    source.label_names = names
    with pytest.raises(DataError, match=message):
        evaluate(classifier, source)


def test_a_checkpoint_without_names_needs_as_many_classes(stored, source):
    description = dataclasses.replace(stored.description, label_names=())
    nameless = Classifier(description, stored.variables, devices=stored.one_device)
    check_labels(nameless, source)
    source.label_names = LABELS[:5]
    with pytest.raises(DataError, match='6 classes'):
        check_labels(nameless, source)


def test_logits_that_are_not_finite_are_refused(stored, source):
    variables = jax.tree.map(np.copy, stored.variables)
    for leaf in variables['params']['classifier'].values():
        leaf[:] = 3e38  # Finite, but their sum is not.
    broken = Classifier(stored.description, variables, devices=stored.one_device)
    with pytest.raises(CheckpointError, match='logits that are not finite'):
        evaluate(broken, source)


@pytest.mark.parametrize('dtype', ['float32', pytest.param('bfloat16', marks=pytest.mark.slow)])
def test_it_is_the_accuracy_of_the_training_run(make, tmp_path, monkeypatch, dtype):
    from gcnet_jax.data import sources
    from gcnet_jax.training.config import default_config
    from gcnet_jax.training.loop import train

    images = {
        split: [make.encode(make.picture(seed + offset, 24, 24)) for seed in range(count)]
        for split, count, offset in (('train', 48, 0), ('test', 45, 100))
    }
    monkeypatch.setattr(
        sources,
        'load_source',
        lambda name, split, data_dir, **_: TrainingSource(
            images[split or 'test'], name=name, split=split or 'test'
        ),
    )
    config = default_config()
    config.model.stage_sizes, config.model.widths = (1,), (4,)
    config.model.context = {'stages': (1,), 'position': 'after_conv2', 'ratio': 0.5}
    config.model.dtype = dtype
    config.data.name, config.data.augmentation, config.data.image_size = 'pictures', 'none', 16
    config.data.crop_fraction = 0.8
    config.training.batch_size, config.training.total_epochs = 16, 3.0
    config.runtime.progress, config.runtime.tensorboard = 'none', False
    final = train(config, tmp_path)
    # The last step, on other devices, and another batch size than that of the run.
    classifier = Classifier.load(
        tmp_path, choose='newest', fold=False, batch_size=10, devices=jax.devices()[:1]
    )
    evaluation = evaluate(classifier, TrainingSource(images['test'], name='pictures'))
    assert 0 < evaluation.metrics['accuracy'] < 1
    assert evaluation.metrics['accuracy'] == final['eval/accuracy']
    assert evaluation.metrics['top5'] == final['eval/top5']
    assert evaluation.examples == final['eval/examples'] == 45
    tolerance = 1e-5 if dtype == 'float32' else 1e-2
    assert evaluation.metrics['loss'] == pytest.approx(final['eval/loss'], rel=tolerance)


class TrainingSource(Pictures):
    num_classes = len(LABELS)


def made(classes=3, name='class'):
    confusion = np.diag(np.arange(1, classes + 1))
    confusion[1, 0] += 2
    return Evaluation(
        data='set',
        split='test',
        label_names=tuple(f'{name} {index}' for index in range(classes)),
        examples=int(confusion.sum()),
        skipped=1,
        metrics={'accuracy': 0.75, 'top5': 1.0, 'loss': 0.5},
        percentages=frozenset({'accuracy', 'top5'}),
        images_per_second=1234.0,
        confusion=confusion,
    )


def test_the_report_is_whole_and_its_picture_opens(tmp_path):
    report, picture = write_evaluation(made(), tmp_path / 'new' / 'place')
    fields = json.loads(report.read_text())
    assert fields['accuracy'] == 0.75
    assert fields['confusion'] == [[1, 0, 0], [2, 2, 0], [0, 0, 3]]
    assert fields['classes'][1] == {'label': 'class 1', 'examples': 4, 'correct': 2}
    assert sorted(path.name for path in report.parent.iterdir()) == [
        *('confusion.png', 'evaluation.json')
    ]
    with Image.open(picture) as image:
        assert image.format == 'PNG'
        assert min(image.size) > 300
    write_evaluation(made(4), report.parent)
    assert len(json.loads(report.read_text())['classes']) == 4


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(DataError, match='cannot make the directory'):
        write_evaluation(made(), tmp_path / 'file')


def test_a_read_only_target_is_one_line(tmp_path, read_only):
    with pytest.raises(DataError, match=read_only):
        write_evaluation(made(), tmp_path)


def test_the_picture_shows_shares_and_names():
    figure = draw_confusion(made(name='cost $1 and $'))
    axes = figure.axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), [[1, 0, 0], [0.5, 0.5, 0], [0, 0, 1]])
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names == [f'cost $1 and $ {index}' for index in range(3)]
    assert [text.get_text() for text in axes.texts] == ['1', '2', '2', '3']
    figure.savefig(io.BytesIO())  # No dollar sign is taken for a formula.


def test_a_thousand_classes_make_a_picture_of_ordinary_size():
    figure = draw_confusion(made(1000))
    assert max(figure.get_size_inches()) < 25
    assert not figure.axes[0].texts


def test_the_text_lists_the_worst_classes_first():
    lines = format_evaluation(made(3)).splitlines()
    assert lines[0] == 'set test: 8 images, 1 damaged ones left out'
    assert lines[1].split() == ['accuracy', '75.00%']
    assert ' '.join(lines[-3].split()) == 'class 1 50.00% of 4 most often taken for class 0'
    assert ' '.join(lines[-1].split()) == 'class 2 100.00% of 3'
    assert format_evaluation(made(30)).splitlines()[-1].strip() == (
        '... and 10 classes better than these'
    )


def test_a_class_without_images_has_no_accuracy():
    evaluation = made()
    evaluation.confusion[2] = 0
    assert np.isnan(evaluation.class_accuracy[2])
    assert 'class 2' not in format_evaluation(evaluation)
    json.dumps(evaluation.to_json(), allow_nan=False)
