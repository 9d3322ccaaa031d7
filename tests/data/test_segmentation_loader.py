"""Batches of images with label maps: their order, their parts, and what happens to damaged ones."""

import numpy as np
import pytest

from gcnet_jax.data.preprocessing import KeepRatio
from gcnet_jax.data.segmentation_augment import SegmentationOptions, augment_pair, fit_pair
from gcnet_jax.data.segmentation_loader import evaluation_batches, train_batches
from gcnet_jax.data.segmentation_sources import SegmentationSource
from gcnet_jax.errors import ConfigError, DataError
from tests.data.compare_batches import assert_equal, take
from tests.data.segmentation_folders import image_of, labels_of, png

LIMITS = KeepRatio(short_side=12, long_side=18, multiple_of=1)
SHAPE = (12, 18)


class Maps(SegmentationSource):
    """Images of one colour, which tells their number; some are damaged."""

    name, split, reduce_zero_label = 'numbers', 'train', False

    def __init__(self, length, damaged=(), noisy=False, classes=3):
        self.label_names = tuple('abcdefgh'[:classes])
        self.length, self.damaged, self.noisy = length, damaged, noisy

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        image = image_of(index, *SHAPE)
        if self.noisy:
            image = np.random.default_rng(index).integers(0, 256, image.shape, dtype=np.uint8)
        label = png(labels_of(index, *SHAPE))
        return {'image': png(image), 'label': b'damaged' if index in self.damaged else label}

    def describe(self, index):
        return f'record {index} of numbers'


def train(source, **options):
    defaults = {'global_batch_size': 4, 'image_size': (8, 10), 'seed': 7, 'preprocessing': LIMITS}
    return train_batches(source, **(defaults | options))


def plain(source, **options):
    off = {'scale_range': (1, 1), 'category_max_ratio': 1, 'flip': False, 'photometric': False}
    return train(source, image_size=SHAPE, **(off | options))


def evaluate(source, **options):
    with evaluation_batches(source, **({'image_size': 16} | options)) as batches:
        return list(batches), batches.skipped


def numbers(batch):
    return batch['image'][:, 0, 0, 0].tolist()


def test_training_batches_are_as_promised():
    (batch,) = take(train(Maps(5)), 1)
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        'image': ((4, 8, 10, 3), np.uint8),
        'label': ((4, 8, 10), np.uint8),
    }


def test_every_image_comes_once_an_epoch_with_its_labels():
    batches = take(plain(Maps(6)), 6)
    order = [number for batch in batches for number in numbers(batch)]
    epochs = [tuple(order[start : start + 6]) for start in range(0, 24, 6)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len(set(epochs)) > 1
    for batch in batches:
        for number, labels in zip(numbers(batch), batch['label'], strict=True):
            np.testing.assert_array_equal(labels, labels_of(number, *SHAPE))


def test_threads_workers_and_the_first_step_change_nothing():
    source = Maps(7, noisy=True)
    expected = take(train(source, num_threads=0), 6)
    for num_threads in (1, 3, None):
        assert_equal(take(train(source, num_threads=num_threads), 6), expected)
    assert_equal(take(train(source, num_threads=2, start_step=4), 2), expected[4:])
    assert_equal(take(train(source, num_workers=1, start_step=2), 4), expected[2:])


@pytest.mark.parametrize('process_count', [2, 4])
def test_processes_share_every_batch(process_count):
    source = Maps(7, noisy=True)
    expected = take(train(source), 4)
    parts = [
        take(train(source, process_index=index, process_count=process_count), 4)
        for index in range(process_count)
    ]
    joined = [
        {key: np.concatenate([part[step][key] for part in parts]) for key in expected[step]}
        for step in range(4)
    ]
    assert_equal(joined, expected)


def test_every_option_reaches_the_augmentation():
    source = Maps(4, noisy=True)
    (default,) = take(train(source), 1)
    spelled_out = {'scale_range': (0.5, 2.0), 'category_max_ratio': 0.75, 'flip': True}
    assert_equal(take(train(source, **spelled_out, photometric=True), 1), [default])
    for change in (
        {'scale_range': (1.0, 1.0)},
        {'category_max_ratio': 0.3},
        {'flip': False},
        {'photometric': False},
        {'seed': 8},
        {'preprocessing': KeepRatio(short_side=24, long_side=36)},
    ):
        (other,) = take(train(source, **change), 1)
        assert (other['image'] != default['image']).any(), change
    with pytest.raises(ConfigError, match='scale_range'):
        train(source, scale_range=(2.0, 1.0))


def test_examples_are_what_the_augmentation_makes():
    source = Maps(1, noisy=True)
    (batch,) = take(train(source, global_batch_size=3, scale_range=(1, 1)), 1)
    options = SegmentationOptions((8, 10), LIMITS, scale_range=(1, 1))
    made = {
        augment_pair(source[0]['image'], source.label_map(0), np.random.default_rng(seed), options)[
            1
        ].tobytes()
        for seed in range(500)
    }
    assert all(labels.tobytes() in made for labels in batch['label'])


@pytest.mark.parametrize('length', [1, 7, 8, 9])
@pytest.mark.parametrize('process_count', [1, 2])
def test_evaluation_sees_every_image_once(length, process_count):
    parts = [
        evaluate(
            Maps(length),
            global_batch_size=4,
            process_index=index,
            process_count=process_count,
            image_size=SHAPE,
        )[0]
        for index in range(process_count)
    ]
    assert len({len(part) for part in parts}) == 1
    seen = []
    for batches in zip(*parts, strict=True):
        for batch in batches:
            seen += np.array(numbers(batch))[batch['mask']].tolist()
            assert (batch['label'][~batch['mask']] == 255).all()
            assert (batch['image'][~batch['mask']] == 0).all()
    assert seen == list(range(length))


def test_evaluation_batches_are_as_promised():
    source = Maps(2, noisy=True)
    (batch,), _ = evaluate(source, global_batch_size=4)
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        'image': ((4, 16, 16, 3), np.uint8),
        'label': ((4, 16, 16), np.uint8),
        'mask': ((4,), np.bool_),
        'size': ((4, 2), np.int32),
    }
    assert batch['mask'].tolist() == [True, True, False, False]
    assert batch['size'].tolist() == [[11, 16], [11, 16], [16, 16], [16, 16]]
    for index in range(2):
        image, labels, _ = fit_pair(source[index]['image'], source.label_map(index), 16)
        np.testing.assert_array_equal(batch['image'][index], image)
        np.testing.assert_array_equal(batch['label'][index], labels)


def test_damaged_records_are_errors_or_left_out_and_counted():
    source = Maps(6, damaged=[3, 4])
    with (
        train(source, global_batch_size=6) as batches,
        pytest.raises(
            DataError, match=r'^record [34] of numbers: label map: is no image.*skip_damaged'
        ),
    ):
        next(batches)
    with pytest.raises(DataError, match=r'^record 3 of numbers: label map'):
        evaluate(source, global_batch_size=6)
    with plain(source, global_batch_size=6, skip_damaged=True, num_threads=2) as batches:
        assert sorted(numbers(next(batches))) == [0, 1, 2, 5, 5, 5]
        assert batches.skipped == 3
    (batch,), skipped = evaluate(source, global_batch_size=6, skip_damaged=True)
    assert batch['mask'].tolist() == [True, True, True, False, False, True]
    assert skipped == 2


def test_labels_beyond_the_classes_are_errors():
    with pytest.raises(DataError, match=r'record 0 of numbers: label map: \d+ pixels have a label'):
        evaluate(Maps(1, classes=2), global_batch_size=1)


def test_arguments_that_cannot_work_are_refused():
    with pytest.raises(DataError, match='the source has no examples'):
        train(Maps(0))
    with pytest.raises(ConfigError, match='seed is -1'):
        train(Maps(1), seed=-1)
    with pytest.raises(ConfigError, match='must divide by the 3 processes'):
        evaluate(Maps(1), global_batch_size=4, process_count=3)
