"""The benchmark of the input makes its large images and names what is not installed."""

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import input as input_benchmark


@pytest.fixture
def folder(tmp_path):
    """Four pictures of two classes."""
    rng = np.random.default_rng(0)
    for index in range(4):
        path = tmp_path / 'train' / 'ab'[index % 2] / f'{index}.JPEG'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
    return tmp_path


def test_ours_is_measured_and_what_is_missing_is_named(folder, capsys, monkeypatch):
    find = input_benchmark.importlib.util.find_spec
    monkeypatch.setattr(
        input_benchmark.importlib.util,
        'find_spec',
        lambda name: find(name) if name == 'grain' else None,
    )
    input_benchmark.main(['--images', str(folder), '--rounds', '2', '--batches', '1', '--json'])
    rows = json.loads(capsys.readouterr().out)['rows']
    assert [(row['images'], row['candidate']) for row in rows] == [
        (images, candidate)
        for images in ('as they are', '500 px')
        for candidate in (
            'gcnet_jax',
            'timm (not installed)',
            'tf.data (not installed)',
            'tf.data, antialiased (not installed)',
        )
    ]
    assert rows[0]['images/s/core'] > 0
    assert rows[0]['ours / this'] == 1
    assert rows[1]['images/s/core'] is None


def test_large_images_are_500_pixels_long(folder, tmp_path):
    input_benchmark._copy_images(folder, tmp_path / 'large', large=True)
    with Image.open(tmp_path / 'large' / 'a' / '0.JPEG') as image:
        assert image.size == (500, 375)


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r'has a \.jpg or \.jpeg file'):
        input_benchmark.main(['--images', str(tmp_path)])


@pytest.mark.torch
@pytest.mark.filterwarnings('ignore:unclosed file:ResourceWarning')  # timm leaves its files open.
def test_timms_batches_are_bytes_of_the_same_size(folder):
    input_benchmark._copy_images(folder, folder / 'plain', large=False)
    for index in range(32):
        source = folder / 'plain' / 'a' / '0.JPEG'
        (source.parent / f'{index}_copy.JPEG').write_bytes(source.read_bytes())
    images = next(input_benchmark.timm_batches(folder / 'plain'))
    assert tuple(images.shape) == (32, 3, 224, 224)
    assert str(images.dtype) == 'torch.uint8'
