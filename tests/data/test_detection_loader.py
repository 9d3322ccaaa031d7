"""Batches of images with objects: one canvas each, their parts, and damaged images."""

import collections
import itertools

import numpy as np
import pytest

from gcnet_jax.data.detection_canvases import make_canvases
from gcnet_jax.data.detection_examples import DetectionOptions, training_example
from gcnet_jax.data.detection_folder import prepare_detection
from gcnet_jax.data.detection_loader import evaluation_batches, train_batches
from gcnet_jax.data.detection_set import SplitIndex, is_target
from gcnet_jax.data.detection_sources import DetectionSource, load_detection
from gcnet_jax.data.preprocessing import KeepRatio
from gcnet_jax.errors import ConfigError, DataError
from tests.data.compare_batches import assert_equal, take
from tests.data.detection_folders import contents, fill, picture, size_of

LIMITS = KeepRatio(short_side=20, long_side=32, multiple_of=32)
WIDE, TALL = (32, 64), (64, 32)
# At their own sizes, on one canvas for landscapes and one for portraits.
PLAIN = {
    'preprocessing': KeepRatio(short_side=24, long_side=32, multiple_of=8),
    'canvases': [(24, 32), (32, 24)],
}


class Objects(DetectionSource):
    """The images of `detection_folders`; some are damaged."""

    name, split, label_names = 'numbers', 'train', ('person', 'dog', 'toothbrush')

    def __init__(self, length, damaged=(), masks=True):
        self.length, self.damaged, self.masks = length, damaged, masks
        self.annotations = collections.defaultdict(list)
        for item in contents(range(length))['annotations']:
            label = {1: 0, 18: 1, 90: 2}[item['category_id']]
            self.annotations[item['image_id']].append(item | {'label': label})
        sizes = np.array([size_of(number) for number in range(length)], np.int32).reshape(-1, 2)
        counts = [
            sum(is_target(item, size_of(number)) for item in self.annotations[number])
            for number in range(length)
        ]
        self.index = SplitIndex(sizes, np.array(counts, np.int32), masks)

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        image = b'damaged' if index in self.damaged else picture(index)
        return {'image': image, 'size': size_of(index), 'objects': self.annotations[index]}

    def describe(self, index):
        return f'record {index} of numbers'


def train(source, **options):
    defaults = {'global_batch_size': 4, 'seed': 7, 'preprocessing': LIMITS, 'mask_size': 16}
    return train_batches(source, **(defaults | {'max_boxes': 3} | options))


def plain(source, **options):
    return train(source, **(PLAIN | {'flip': 0} | options))


def evaluate(source, **options):
    with evaluation_batches(source, **({'preprocessing': LIMITS} | options)) as batches:
        return list(batches), batches.skipped


def numbers(batch):
    """The images of a batch in which they have their own sizes."""
    return batch['image'][:, 0, 0, 0].tolist()


def test_training_batches_are_as_promised():
    (batch,) = take(train(Objects(5)), 1)
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        'image': ((4, 32, 32, 3), np.uint8),
        'size': ((4, 2), np.int32),
        'boxes': ((4, 3, 4), np.float32),
        'labels': ((4, 3), np.int32),
        'masks': ((4, 3, 16, 16), np.uint8),
        'mask_boxes': ((4, 3, 4), np.float32),
    }
    for options in ({'masks': False}, {'source': Objects(5, masks=False)}):
        (batch,) = take(train(options.pop('source', Objects(5)), **options), 1)
        assert batch.keys() == {'image', 'size', 'boxes', 'labels'}


def test_batches_are_of_one_canvas_and_every_image_takes_its_turn():
    # At their own sizes images 1, 5, ... are portraits.
    source = Objects(12)
    seen = []
    for batch in take(plain(source, global_batch_size=3), 4 * 5):
        found = numbers(batch)
        tall = {number % 4 == 1 for number in found}
        assert len(tall) == 1
        assert batch['image'].shape == (3, *((32, 24) if tall.pop() else (24, 32)), 3)
        seen += found
        for place, number in enumerate(found):
            targets = [o for o in source[number]['objects'] if not o['iscrowd']]
            labels = [item['label'] for item in targets]
            assert batch['labels'][place].tolist() == labels + [-1] * (3 - len(labels))
    counts = collections.Counter(seen)
    assert set(counts) == set(range(12))
    assert set(counts.values()) <= {4, 5, 6}


def test_examples_are_what_is_made_of_their_records():
    source = Objects(6)
    options = DetectionOptions(make_canvases(LIMITS), max_boxes=3, mask_size=16)
    made = collections.defaultdict(list)
    for number in range(6):
        for seed in range(20):
            example = training_example(source[number], np.random.default_rng(seed), options)
            made[example['image'].tobytes()].append(example)
    for batch in take(train(source), 5):
        for place in range(4):
            (example, *_) = made[batch['image'][place].tobytes()]
            for key, value in example.items():
                np.testing.assert_array_equal(batch[key][place], value)


def test_threads_workers_and_the_first_step_change_nothing():
    source = Objects(7)
    options = {'scales': [(20, 32), (16, 28), (24, 32)]}
    expected = take(train(source, num_threads=0, **options), 6)
    assert len({batch['size'].tobytes() for batch in expected}) == 6
    for num_threads in (1, 3, None):
        assert_equal(take(train(source, num_threads=num_threads, **options), 6), expected)
    assert_equal(take(train(source, num_threads=2, start_step=4, **options), 2), expected[4:])
    assert_equal(take(train(source, num_workers=1, start_step=2, **options), 4), expected[2:])


@pytest.mark.parametrize('process_count', [2, 4])
def test_processes_share_every_batch(process_count):
    source, options = Objects(9), PLAIN | {'flip': 0.5}
    expected = take(train(source, **options), 5)
    assert len({batch['image'].shape for batch in expected}) == 2
    parts = [
        take(train(source, process_index=index, process_count=process_count, **options), 5)
        for index in range(process_count)
    ]
    joined = [
        {key: np.concatenate([part[step][key] for part in parts]) for key in expected[step]}
        for step in range(5)
    ]
    assert_equal(joined, expected)


def test_every_option_reaches_the_examples():
    source = Objects(8)
    (default,) = take(train(source), 1)
    spelled_out = {'scales': [(20, 32)], 'canvases': [32], 'flip': 0.5, 'masks': True}
    assert_equal(take(train(source, **spelled_out), 1), [default])
    for change in (
        {'scales': [(12, 20)]},
        {'canvases': [64]},
        {'flip': 1.0},
        {'max_boxes': 2},
        {'mask_size': 8},
        {'seed': 8},
        {'preprocessing': KeepRatio(short_side=18, long_side=32)},
    ):
        (other,) = take(train(source, **change), 1)
        assert any(not np.array_equal(default[key], other[key]) for key in default), change


@pytest.mark.parametrize('length', [1, 7, 8, 9])
@pytest.mark.parametrize('process_count', [1, 2])
def test_evaluation_sees_every_image_once(length, process_count):
    source = Objects(length)
    parts = [
        evaluate(
            source, global_batch_size=4, process_index=index, process_count=process_count, **PLAIN
        )[0]
        for index in range(process_count)
    ]
    assert len({len(part) for part in parts}) == 1
    seen = []
    for batches in zip(*parts, strict=True):
        assert len({batch['image'].shape for batch in batches}) == 1
        for batch in batches:
            indices = batch['index'][batch['mask']].tolist()
            assert np.array(numbers(batch))[batch['mask']].tolist() == indices
            assert [tuple(size) for size in batch['original_size'][batch['mask']]] == [
                size_of(number) for number in indices
            ]
            assert (batch['index'][~batch['mask']] == -1).all()
            assert (batch['image'][~batch['mask']] == 0).all()
            seen += indices
    assert sorted(seen) == list(range(length))


def test_evaluation_batches_are_as_promised():
    limits = KeepRatio(short_side=24, long_side=48)
    options = {'global_batch_size': 2, 'canvases': [WIDE, TALL], 'preprocessing': limits}
    batches, skipped = evaluate(Objects(3), **options)
    assert skipped == 0
    assert [batch['index'].tolist() for batch in batches] == [[0, 2], [1, -1]]
    (first, second) = batches
    assert {key: (value.shape, value.dtype) for key, value in first.items()} == {
        'image': ((2, *WIDE, 3), np.uint8),
        'size': ((2, 2), np.int32),
        'original_size': ((2, 2), np.int32),
        'index': ((2,), np.int32),
        'mask': ((2,), np.bool_),
    }
    assert first['size'].tolist() == [[24, 36], [24, 24]]
    assert second['size'].tolist() == [[36, 24], [64, 32]]
    for num_workers in (0, 1):
        again, _ = evaluate(Objects(3), num_workers=num_workers, **options)
        assert_equal(again, batches)


def test_damaged_records_are_errors_or_left_out_and_counted():
    source = Objects(9, damaged=[1, 4])
    with pytest.raises(DataError, match=r'^record [14] of numbers: not an image.*skip_damaged'):
        take(plain(source), 6)
    with pytest.raises(DataError, match=r'^record [14] of numbers: not an image'):
        evaluate(source, global_batch_size=3)
    with plain(source, global_batch_size=3, skip_damaged=True, num_threads=2) as batches:
        seen = [numbers(next(batches)) for _ in range(12)]
        assert batches.skipped > 3
    for found in seen:  # Others of the same canvas stand in.
        assert {number % 4 == 1 for number in found} in ({True}, {False})
    assert set(itertools.chain(*seen)) == {0, 2, 3, 5, 6, 7, 8}
    found, skipped = evaluate(source, global_batch_size=3, skip_damaged=True, **PLAIN)
    assert skipped == 2
    kept = [batch['index'][batch['mask']].tolist() for batch in found]
    assert sorted(itertools.chain(*kept)) == [0, 2, 3, 5, 6, 7, 8]


def test_it_can_be_closed_at_any_time():
    batches = evaluation_batches(Objects(9), global_batch_size=2, preprocessing=LIMITS)
    batches.close()
    with evaluation_batches(Objects(9), global_batch_size=2, preprocessing=LIMITS) as batches:
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)


def test_arguments_that_cannot_work_are_refused():
    for make in (train, evaluate):
        with pytest.raises(DataError, match='the source has no examples'):
            make(Objects(0)) if make is train else make(Objects(0), global_batch_size=1)
        with pytest.raises(ConfigError, match='must divide by the 3 processes'):
            make(Objects(1), global_batch_size=4, process_count=3)
        with pytest.raises(ConfigError, match='global_batch_size is 0'):
            make(Objects(1), global_batch_size=0)
        with pytest.raises(ConfigError, match='a canvas is height and width in multiples of 32'):
            make(Objects(1), global_batch_size=1, canvases=[33])
        with pytest.raises(DataError, match='record 0 of numbers: an image of 30 x 20 pixels'):
            make(
                Objects(1),
                global_batch_size=1,
                canvases=[32],
                preprocessing=KeepRatio(short_side=40, long_side=64),
            )
    with pytest.raises(ConfigError, match='seed is -1'):
        train(Objects(1), seed=-1)
    with pytest.raises(ConfigError, match='scales holds'):
        train(Objects(1), scales=[(32, 20)])
    with pytest.raises(DataError, match=r"'numbers' split 'train' has no mask for some objects"):
        train(Objects(1, masks=False), masks=True)


def test_from_a_folder_to_batches(tmp_path):
    fill(tmp_path / 'coco', {'train2017': range(8), 'val2017': range(20, 24)})
    prepare_detection(tmp_path / 'coco', 'mine', str(tmp_path / 'sets'))
    source = load_detection('mine', 'train', str(tmp_path / 'sets'))
    expected = take(plain(source, num_threads=0), 4)
    assert_equal(take(plain(source, num_workers=1, start_step=1), 3), expected[1:])
    for batch in expected:
        for place, number in enumerate(numbers(batch)):
            count = int((batch['labels'][place] >= 0).sum())
            assert count == number % 3
            assert (batch['masks'][place].any(axis=(1, 2)) == (np.arange(3) < count)).all()
    held_out = load_detection('mine', None, str(tmp_path / 'sets'))
    batches, _ = evaluate(held_out, global_batch_size=3, **PLAIN)
    seen = [number for batch in batches for number in np.array(numbers(batch))[batch['mask']]]
    assert sorted(seen) == [20, 21, 22, 23]
