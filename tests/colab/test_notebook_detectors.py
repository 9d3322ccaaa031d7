"""What the notebook on detectors calls: a file fetched once, a detector, a small annotated set."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gcnet_jax.data.coco import load_coco
from gcnet_jax.inference.detector_evaluation import evaluate_detector
from gcnet_jax.tasks.instances import Instances

FILE = Path(__file__).parents[2] / 'colab' / 'notebook_detectors.py'


@pytest.fixture(scope='module')
def helpers():
    spec = importlib.util.spec_from_file_location('notebook_detectors', FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_file_is_fetched_once_and_only_whole(helpers, tmp_path, monkeypatch):
    asked = []

    def retrieve(address, place):
        asked.append(address)
        Path(place).write_bytes(b'weights')
        if len(asked) == 1:
            raise OSError('connection lost')

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('urllib.request.urlretrieve', retrieve)
    address = 'https://host/zoo/detector-12345678.pth'
    with pytest.raises(OSError, match='connection lost'):
        helpers.fetch(address)
    assert not Path('detector-12345678.pth').exists()
    for _ in range(2):
        assert helpers.fetch(address).read_bytes() == b'weights'
    assert asked == [address] * 2
    assert helpers.fetch('uploads/own.pth') == Path('uploads/own.pth')
    assert len(asked) == 2


class Finder:
    """Finds the same in every image, as a detector would."""

    label_names = ('person', 'boat')
    description = None

    def stream(self, images, **options):
        for path in images:
            yield path, self.found

    found = Instances(
        boxes=np.array([[2, 3, 30, 20], [5, 5, 25, 38], [0, 0, 9, 9]], np.float32),
        scores=np.array([0.9, 0.8, 0.2], np.float32),
        labels=('person', 'boat', 'boat'),
        classes=np.array([0, 1, 1]),
        size=(40, 50),
        mask_probabilities=np.ones((3, 28, 28), np.float32),
    )


def test_the_set_holds_the_best_of_what_was_found(helpers, tmp_path):
    photo = tmp_path / 'photo.jpg'
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(photo)
    finder = Finder()
    data = load_coco(helpers.write_coco(tmp_path / 'set', finder, [photo], most=2))
    assert (len(data), len(data.objects), data.notes) == (1, 2, ())
    assert data.categories == {1: 'person', 2: 'boat'}
    finder.description = type('Description', (), {'label_names': finder.label_names})
    metrics = evaluate_detector(finder, data).metrics
    assert metrics['box']['AP'] == pytest.approx(1)
    assert metrics['mask']['AP'] == pytest.approx(1)


@pytest.mark.slow
def test_the_random_detector_finds_something(helpers, tmp_path):
    from gcnet_jax.inference.detector import Detector

    detector = Detector.load(helpers.write_random_detector(tmp_path / 'detector'))
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    found = detector(noise, threshold=0.3)
    assert set(found.labels) <= {'person', 'boat', 'bench'}
    assert len(found)
