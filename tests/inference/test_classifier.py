"""The classifier: its answers against the plain network, its batches, and how it fails."""

import dataclasses
import io
import itertools
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import gcnet_jax
from gcnet_jax.errors import CheckpointError, ConfigError, DataError
from gcnet_jax.inference.classifier import Classifier
from gcnet_jax.inference.images import LeftOut
from gcnet_jax.stored import write_ported
from gcnet_jax.tasks.prediction import Prediction

COUNT = 11


@pytest.fixture(scope='module')
def classifier(stored):
    return Classifier.load(stored.directory, batch_size=4, devices=stored.one_device)


def softmax(logits):
    exponentials = np.exp(logits.astype(np.float64))
    return exponentials / exponentials.sum(-1, keepdims=True)


def close(actual, expected, tolerance=1e-5):
    return np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def test_answers_are_those_of_the_plain_network(classifier, plain, pictures, stored):
    expected = plain(pictures)
    assert close(classifier.features(pictures, 'logits'), expected)
    probabilities = softmax(expected)
    for prediction, row in zip(classifier(pictures, top_k=3), probabilities, strict=True):
        order = np.argsort(-row)[:3]
        assert prediction.classes == tuple(order)
        assert prediction.labels == tuple(stored.description.label_names[i] for i in order)
        np.testing.assert_allclose(prediction.probabilities, row[order], rtol=1e-4)
        assert (prediction.label, prediction.probability) == (
            prediction.labels[0],
            prediction.probabilities[0],
        )
        assert str(prediction).startswith(f'{prediction.label} {prediction.probability:.1%}, ')


def agree(actual, expected):
    """Whether predictions are equal, but for the last bits of another batch size."""
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one.classes == other.classes
        assert one.probabilities == pytest.approx(other.probabilities, rel=1e-4)
    return True


def test_one_image_gives_one_prediction_and_several_a_list(classifier, pictures, make):
    whole = classifier(pictures)
    assert agree([classifier(pixels) for pixels in pictures], whole)
    mixed = [make.encode(pictures[0]), Image.fromarray(pictures[1]), pictures[2] / 255]
    assert agree(classifier(mixed), whole[:3])
    assert agree(classifier(np.stack([pictures[3]] * 2)), [whole[3]] * 2)
    assert classifier([]) == []
    grey = pictures[0][..., :1]
    assert classifier(grey) == classifier(np.repeat(grey, 3, axis=-1)) == classifier(grey[..., 0])


def test_probabilities_of_all_classes_sum_to_one(classifier, pictures):
    prediction = classifier(pictures[0], top_k=1000)
    assert len(prediction.labels) == 6
    assert sum(prediction.probabilities) == pytest.approx(1)
    for top_k in (0, -1, 1.5, True):
        with pytest.raises(ConfigError, match='top_k must be 1 or more'):
            classifier(pictures[0], top_k=top_k)


def test_more_than_a_batch_is_refused_at_the_lowest_level(classifier):
    with pytest.raises(ConfigError, match='at most batch_size=4 images, got 5'):
        classifier.dispatch(np.zeros((5, 12, 12, 3), np.uint8))
    with pytest.raises(ConfigError, match="unknown layer of gccnn 'logit'"):
        classifier.dispatch(np.zeros((1, 12, 12, 3), np.uint8), 'logit')


def test_features_are_those_of_the_network(stored, classifier, pictures):
    assert list(classifier.layers) == ['stage1', 'pooled', 'logits']
    assert classifier.layers == {'stage1': (12, 12, 8), 'pooled': (8,), 'logits': (6,)}
    pooled, maps = classifier.features(pictures), classifier.features(pictures, 'stage1')
    assert (pooled.shape, maps.shape) == ((COUNT, 8), (COUNT, 12, 12, 8))
    np.testing.assert_allclose(pooled, maps.mean((1, 2)), rtol=1e-5, atol=1e-6)
    last = stored.variables['params']['classifier']
    expected = pooled @ last['kernel'] + last['bias']
    np.testing.assert_allclose(
        classifier.features(pictures, 'logits'), expected, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(classifier.features(pictures[0]), pooled[0], rtol=1e-5, atol=1e-6)
    assert classifier.features([], 'stage1').shape == (0, 12, 12, 8)
    with pytest.raises(
        ConfigError, match=r"unknown layer of gccnn 'stage2'; did you mean 'stage1'"
    ):
        classifier.features(pictures[0], 'stage2')


def test_a_stream_gives_every_path_in_order_and_names_the_bad_ones(classifier, pictures, folder):
    (folder / '03.png').write_bytes(b'no image')
    (folder / '05.png').write_bytes((folder / '05.png').read_bytes()[:100])
    results = list(classifier.stream(folder, top_k=2, num_threads=3))
    assert [path.name for path, _ in results] == [f'{index:02}.png' for index in range(COUNT)]
    expected = classifier(pictures, top_k=2)
    for index, (path, result) in enumerate(results):
        if index in (3, 5):
            assert isinstance(result, DataError)
            assert str(result).startswith(f'{path}: ')
            assert '\n' not in str(result)
        else:
            assert result == expected[index]


def test_a_stream_takes_paths_without_an_end(classifier, folder):
    taken = []

    def endless():
        while True:
            taken.append(folder / f'{len(taken) % COUNT:02}.png')
            yield taken[-1]

    stream = classifier.stream(endless())
    assert taken == []
    for index in range(20):
        assert next(stream)[0] == taken[index]
    assert len(taken) <= 20 + 4 * classifier.batch_size
    stream.close()


def test_closing_a_stream_ends_its_threads(classifier, folder):
    before = threading.active_count()
    for problem in (GeneratorExit, KeyboardInterrupt):
        stream = classifier.stream(itertools.cycle(sorted(folder.iterdir())), num_threads=3)
        next(stream)
        with pytest.raises(problem):
            stream.throw(problem)
        assert threading.active_count() == before
    stream = classifier.stream(itertools.cycle(sorted(folder.iterdir())), num_threads=3)
    next(stream)
    stream.close()
    assert threading.active_count() == before


def test_an_open_file_is_an_image_and_a_folder_is_not(classifier, pictures, folder):
    path = folder / '00.png'
    with path.open('rb') as file:
        assert classifier(file) == classifier(path)
    assert classifier([io.BytesIO(path.read_bytes())]) == [classifier(path)]
    with pytest.raises(DataError, match=r'a folder, not an image; stream\(\) goes through'):
        classifier(folder)
    left_out = LeftOut()
    (folder / 'notes').write_text('about')
    assert len(list(classifier.stream(folder, left_out=left_out))) == COUNT
    assert left_out.count == 1


def test_labels_are_printed_on_one_line():
    prediction = Prediction(('a\nb', 'x' * 1_000), (0.75, 0.25), (0, 1))
    assert str(prediction).isprintable()
    assert str(prediction).startswith(r'a\nb 75.0%, xxx')
    assert len(str(prediction)) < 150
    assert prediction.label == 'a\nb'


def test_a_stream_of_nothing_but_bad_files_computes_nothing(classifier, tmp_path):
    for index in range(9):
        (tmp_path / f'{index}.png').write_bytes(b'no image')
    results = list(classifier.stream(tmp_path))
    assert len(results) == 9
    assert all(isinstance(result, DataError) for _, result in results)


def test_a_call_names_the_first_bad_image(classifier, pictures, tmp_path):
    with pytest.raises(DataError, match=r'^image 1: not an image'):
        classifier([pictures[0], b'no image', b''])
    with pytest.raises(DataError, match=r'nowhere.png: no such file'):
        classifier(tmp_path / 'nowhere.png')
    with pytest.raises(ConfigError, match='images must be paths'):
        classifier(7)


def test_a_network_without_a_classifier_gives_features_only(stored, classifier, pictures, tmp_path):
    description = dataclasses.replace(
        stored.description, options=stored.description.options | {'num_classes': 0}, label_names=()
    )
    params = {k: v for k, v in stored.variables['params'].items() if k != 'classifier'}
    write_ported(tmp_path / 'backbone', description, stored.variables | {'params': params})
    backbone = Classifier.load(tmp_path / 'backbone', batch_size=4, devices=stored.one_device)
    np.testing.assert_allclose(
        backbone.features(pictures[:3]), classifier.features(pictures[:3]), rtol=1e-5
    )
    for call in (backbone, backbone.stream):
        with pytest.raises(ConfigError, match=r'without a classifier: .*features \(stage1, pooled'):
            call(pictures[0])


def test_several_labels_per_image_have_probabilities_of_their_own(stored, classifier, pictures):
    description = dataclasses.replace(stored.description, task='multilabel')
    other = Classifier(description, stored.variables, batch_size=4, devices=stored.one_device)
    logits = classifier.features(pictures[0], 'logits').astype(np.float64)
    prediction, order = other(pictures[0], top_k=3), np.argsort(-logits)[:3]
    assert prediction.classes == tuple(order)
    np.testing.assert_allclose(prediction.probabilities, 1 / (1 + np.exp(-logits[order])))
    assert prediction.labels == classifier(pictures[0], top_k=3).labels
    far = other.task.probabilities(np.array([-1000.0, 0.0, 1000.0]), np)
    np.testing.assert_array_equal(far, [0, 0.5, 1])


def test_images_get_the_size_that_was_asked_for(stored, pictures):
    options = {'batch_size': 4, 'devices': stored.one_device}
    wide = Classifier.load(stored.directory, size=(8, 14), **options)
    assert wide.features(pictures, 'stage1').shape == (COUNT, 8, 14, 8)
    assert wide.layers['stage1'] == (8, 14, 8)
    preprocessing = dataclasses.replace(stored.description.preprocessing, test_size=(8, 14))
    description = dataclasses.replace(stored.description, preprocessing=preprocessing)
    same = Classifier(description, stored.variables, **options)
    assert same(pictures) == wide(pictures)
    for size, message in [(0, 'size must be 1 or more'), ((8, 0), r'test_size must be .*\(8, 0\)')]:
        with pytest.raises(ConfigError, match=message):
            Classifier.load(stored.directory, size=size)


def test_labels_without_names_are_numbers(stored, pictures):
    description = dataclasses.replace(stored.description, label_names=())
    classifier = Classifier(description, stored.variables, devices=stored.one_device)
    prediction = classifier(pictures[0])
    assert prediction.label == f'class {prediction.classes[0]}'


def test_logits_that_overflow_are_not_answered_from(stored, pictures):
    """Finite weights: only the answer shows that they are of no use."""
    variables = jax.tree.map(np.copy, stored.variables)
    for leaf in variables['params']['classifier'].values():
        leaf[:] = 3e38
    classifier = Classifier(stored.description, variables, devices=stored.one_device)
    with pytest.raises(CheckpointError, match='logits that are not finite'):
        classifier(pictures[0])


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'format_version': 3}, 'format version 3; this package reads 1 and 2'),
        ({'label_names': ['a', 'b']}, r'checkpoints.*: it has 2 label names and 6 classes'),
        ({'name': 'resnet20'}, 'its variables are not those of resnet20'),
        ({'name': 'gccn'}, "unknown model 'gccn'; did you mean 'gccnn'"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_one_line(
    stored, change_description, tmp_path, changes, message
):
    shutil.copytree(stored.directory, tmp_path / 'changed')
    change_description(tmp_path / 'changed' / 'checkpoints' / '0', **changes)
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
        Classifier.load(tmp_path / 'changed')
    assert '\n' not in str(caught.value)


def run(program, *arguments):
    environment = os.environ | {'PYTHONPATH': str(Path(__file__).parents[2])}
    return subprocess.run(
        [sys.executable, '-c', program, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
    )


def test_the_package_stays_light_until_a_classifier_is_wanted():
    assert gcnet_jax.Classifier is Classifier
    assert 'Classifier' in gcnet_jax.__all__
    with pytest.raises(AttributeError, match="no attribute 'Clasifier'"):
        _ = gcnet_jax.Clasifier
    result = run(
        'import sys, gcnet_jax; '
        'heavy = ("gcnet_jax.inference", "gcnet_jax.data", "gcnet_jax.stored", "PIL"); '
        'print([name for name in heavy if name in sys.modules]); '
        'from gcnet_jax import Classifier; '
        'heavy = ("gcnet_jax.training", "optax", "grain", "tensorflow_datasets", "matplotlib"); '
        'print([name for name in heavy if name in sys.modules])'
    )
    assert result.stdout == '[]\n[]\n', result.stderr


def mutated(data, rng):
    """Cuts, flips, repeats or drops bytes; every other time near the header."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 6)):
        kind = rng.integers(5)
        place = int(rng.integers(min(len(data), 64) if rng.random() < 0.5 else len(data)))
        if kind == 0:
            data = data[: max(place, 1)]
        elif kind == 1:
            data[place] ^= 1 << rng.integers(8)
        elif kind == 2:
            data[place : place + 4] = rng.bytes(4)
        elif kind == 3:
            data[place:place] = data[place : place + int(rng.integers(1, 300))]
        else:
            data[place : place + 4] = b'\xff\xff\xff\xff'
    return bytes(data)


def sized(data, rng):
    """Writes another size into the header of a PNG (with its checksum) or a JPEG."""
    import struct
    import zlib

    size = [int(rng.choice([0, 1, 7, 300, 65_535, 2**31 - 1, 2**32 - 1])) for _ in range(2)]
    if data[:4] == b'\x89PNG':
        header = b'IHDR' + struct.pack('>II', *size) + data[24:29]
        return data[:12] + header + struct.pack('>I', zlib.crc32(header)) + data[33:]
    place = data.index(b'\xff\xc0') + 5
    return data[:place] + struct.pack('>HH', *(side & 0xFFFF for side in size)) + data[place + 4 :]


def test_a_thousand_mutated_images_give_a_thousand_answers_or_clear_lines(
    stored, classifier, make, tmp_path
):
    rng = np.random.default_rng(0)
    pixels = make.picture(3, 40, 50)
    whole = [
        make.encode(pixels, 'PNG'),
        make.encode(pixels, 'JPEG'),
        make.encode(pixels, 'JPEG', progressive=True),
        make.encode(Image.fromarray(pixels).convert('P'), 'PNG'),
        make.encode(Image.fromarray(pixels).convert('CMYK'), 'JPEG'),
    ]
    for index in range(1000):
        data = whole[index % len(whole)]
        change = sized if index % 7 == 0 and b'\xff\xc2' not in data[:1000] else mutated
        (tmp_path / f'{index:04}.img').write_bytes(change(data, rng))
    answers, errors = 0, set()
    paths = sorted(tmp_path.iterdir())
    for path, result in classifier.stream(paths):
        if isinstance(result, DataError):
            assert str(result).startswith(f'{path}: ')
            assert '\n' not in str(result)
            errors.add(str(result).partition(': ')[2].split(':')[0])
        else:
            answers += 1
            assert np.isfinite(result.probabilities).all()
    assert answers > 100
    assert len(errors) > 3


@pytest.mark.slow
def test_memory_stays_flat_over_ten_thousand_images(stored, make, tmp_path):
    for index in range(10):
        data = make.encode(make.picture(index, 300, 400), 'JPEG')
        (tmp_path / f'{index}.jpg').write_bytes(data if index else data[:2000])
    result = run(
        """
import itertools, pathlib, re, sys
from gcnet_jax import Classifier

def resident():
    status = pathlib.Path('/proc/self/status').read_text()
    return int(re.search(r'RssAnon:\\s+(\\d+) kB', status).group(1)) / 1024

classifier = Classifier.load(sys.argv[1], batch_size=16)
files = sorted(pathlib.Path(sys.argv[2]).iterdir())
paths = itertools.islice(itertools.cycle(files), 12_000)
bad = 0
for count, (path, result) in enumerate(classifier.stream(paths), start=1):
    bad += isinstance(result, Exception)
    if count == 2000:
        before = resident()
print(count, bad, round(before), resident() - before)
""",
        stored.directory,
        tmp_path,
    )
    assert result.returncode == 0, result.stderr
    count, bad, _, growth = result.stdout.split()
    assert (count, bad) == ('12000', '1200')
    # MiB. The pools of the allocator wander by some; four kilobytes lost an image would be 40, a
    # picture an image 3,000.
    assert float(growth) < 32, result.stdout
