"""Sets of more than a gigabyte are sorted on the disk, in the order of small ones."""

import numpy as np
import pytest
from tensorflow_datasets.core import shuffle

from gcnet_jax.data import folder
from gcnet_jax.data.sorting import Bucket, sorted_in_files
from gcnet_jax.data.sources import load_source
from tests.data.segmentation_folders import image_of, png


def test_a_bucket_gives_back_what_it_was_given(tmp_path):
    bucket = Bucket(tmp_path / 'new' / 'bucket')
    assert list(bucket.read_values()) == []
    bucket.del_file()
    items = [(2**128 - 1, b'last'), (0, b''), (2**64, b'middle'), (7, bytes(1000))]
    for key, data in items:
        bucket.add(key, data)
    assert list(bucket.read_values()) == items
    assert (len(bucket), bucket.size) == (4, 1010)
    bucket.del_file()
    assert not list((tmp_path / 'new').iterdir())


def test_tfds_sorts_with_it_as_in_memory(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    items = [(f'key {number}', rng.bytes(50)) for number in range(300)]

    def shuffled():
        with sorted_in_files():
            shuffler = shuffle.Shuffler(tmp_path, 'salt')
        for key, data in items:
            shuffler.add(key, data)
        return list(shuffler)

    expected = shuffled()
    monkeypatch.setattr(shuffle, 'MAX_MEM_BUFFER_SIZE', 1000)
    assert shuffled() == expected
    assert not list(tmp_path.iterdir())


def test_a_large_folder_is_prepared_without_tensorflow(tmp_path, monkeypatch):
    monkeypatch.setattr(shuffle, 'MAX_MEM_BUFFER_SIZE', 1)
    for number in range(6):
        place = tmp_path / 'images' / 'train' / 'ab'[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        (place / f'{number}.png').write_bytes(png(image_of(number)))
    before = shuffle._Bucket
    folder.prepare_folder(tmp_path / 'images', 'large', str(tmp_path / 'sets'), test_fraction=0)
    assert shuffle._Bucket is before
    source = load_source('large', 'train', str(tmp_path / 'sets'))
    assert {source[index]['image'] for index in range(len(source))} == {
        png(image_of(number)) for number in range(6)
    }


def test_a_file_that_cannot_be_written_is_an_error(tmp_path):
    bucket = Bucket(tmp_path / 'bucket')
    (tmp_path / 'bucket').mkdir()
    with pytest.raises(OSError, match='directory'):
        bucket.add(1, b'data')
