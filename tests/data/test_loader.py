"""The order of the batches, their parts, and what happens to damaged images."""

import gc
import threading
import time

import numpy as np
import pytest
from PIL import Image

from gcnet_jax.data import batches as machinery
from gcnet_jax.data import preprocess
from gcnet_jax.data.color import ColorOptions
from gcnet_jax.data.loader import evaluation_batches, train_batches
from gcnet_jax.errors import ConfigError, DataError
from tests.data.compare_batches import assert_equal, take

PLAIN = {'augmentation': 'none', 'flip': False, 'image_size': 8}


def test_every_example_comes_once_an_epoch_in_another_order_each_time(make):
    source = make.numbered_source(10)
    batches = take(train_batches(source, global_batch_size=4, seed=3, num_threads=0, **PLAIN), 10)
    order = [number for batch in batches for number in make.number_of(batch['image'])]
    epochs = [order[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    labels = np.concatenate([batch['label'] for batch in batches])
    assert labels.tolist() == [number % 3 for number in order]


def test_batches_have_the_types_and_shapes_promised(make):
    source = make.numbered_source(5)
    options = PLAIN | {'image_size': 6}
    (batch,) = take(train_batches(source, global_batch_size=4, seed=0, **options), 1)
    assert batch.keys() == {'image', 'label'}
    assert batch['image'].shape == (4, 6, 6, 3)
    assert (batch['image'].dtype, batch['label'].dtype) == (np.uint8, np.int32)
    assert batch['label'].shape == (4,)


@pytest.mark.parametrize('length', [1, 2, 3])
def test_sets_smaller_than_a_batch_are_repeated(make, length):
    source = make.numbered_source(length)
    (batch,) = take(train_batches(source, global_batch_size=6, seed=0, **PLAIN), 1)
    counts = np.bincount(make.number_of(batch['image']))
    assert counts.tolist() == [6 // length] * length


def augmented(source, **options):
    defaults = {'global_batch_size': 4, 'image_size': 6, 'seed': 7, 'crop_scale': (0.2, 0.8)}
    return train_batches(source, **(defaults | options))


@pytest.fixture
def pictures(make, noise):
    """A source of seven different images, which look different wherever they are cut."""
    source = make.numbered_source(7)
    source._records = [
        make.serialize(make.encode(np.roll(noise, index * 5, axis=1)), index % 3)
        for index in range(7)
    ]
    return source


def test_threads_and_the_first_step_change_nothing(pictures):
    expected = take(augmented(pictures, num_threads=0), 9)
    for num_threads in (1, 3, 8, None):
        assert_equal(take(augmented(pictures, num_threads=num_threads), 9), expected)
    for start_step in (1, 5, 8):
        result = take(augmented(pictures, num_threads=2, start_step=start_step), 9 - start_step)
        assert_equal(result, expected[start_step:])


def test_worker_processes_change_nothing(pictures, make):
    expected = take(augmented(pictures, num_threads=0), 7)
    result = take(augmented(pictures, num_workers=2, start_step=2), 5)
    assert_equal(result, expected[2:])


def test_a_damaged_image_in_a_worker_process_is_the_same_error(make):
    source = make.numbered_source(4, damaged=range(4))
    with (
        train_batches(source, global_batch_size=4, seed=0, num_workers=1, **PLAIN) as batches,
        pytest.raises(DataError, match=r'record \d of .*file-\d.png'),
    ):
        next(batches)


@pytest.mark.parametrize('process_count', [2, 4])
def test_processes_share_every_batch(pictures, process_count):
    expected = take(augmented(pictures), 6)
    parts = [
        take(augmented(pictures, process_index=index, process_count=process_count), 6)
        for index in range(process_count)
    ]
    joined = [
        {key: np.concatenate([part[step][key] for part in parts]) for key in ('image', 'label')}
        for step in range(6)
    ]
    assert_equal(joined, expected)


def test_any_number_of_processes_can_go_on(pictures):
    expected = take(augmented(pictures), 6)
    part = take(augmented(pictures, process_index=1, process_count=2, start_step=4), 2)
    np.testing.assert_array_equal(part[0]['image'], expected[4]['image'][2:])


def test_the_augmentation_changes_with_epoch_and_seed_and_the_order_with_the_seed(make, noise):
    source = make.numbered_source(1)
    source._records = [make.serialize(make.encode(noise), 0)]
    images = [batch['image'][0] for batch in take(augmented(source, global_batch_size=1), 20)]
    assert len({image.tobytes() for image in images}) == 20
    (other,) = take(augmented(source, global_batch_size=1, seed=8), 1)
    assert (other['image'][0] != images[0]).any()
    numbers = make.numbered_source(50)
    orders = []
    for seed in (0, 1, 2**32 - 1):
        batches = train_batches(numbers, global_batch_size=50, seed=seed, **PLAIN)
        orders.append(make.number_of(take(batches, 1)[0]['image']))
    assert len(set(map(tuple, orders))) == 3


def test_neighbouring_seeds_do_not_repeat_each_others_epochs(make):
    source = make.numbered_source(30)
    epochs = [
        tuple(make.number_of(batch['image']))
        for seed in range(5)
        for batch in take(train_batches(source, global_batch_size=30, seed=seed, **PLAIN), 5)
    ]
    assert len(set(epochs)) == 25


def test_images_are_what_preprocess_makes(make, noise):
    source = make.numbered_source(1)
    source._records = [make.serialize(make.encode(noise), 2)]
    (batch,) = take(train_batches(source, global_batch_size=1, seed=0, **PLAIN), 1)
    expected = preprocess.resize_and_crop(noise, 8, 1.0, 'bilinear')
    np.testing.assert_array_equal(batch['image'][0], expected)
    assert batch['label'].tolist() == [2]


def test_defaults_are_imagenets(pictures, noise):
    options = {'global_batch_size': 7, 'image_size': 12, 'seed': 0}
    spelled_out = {
        'augmentation': 'resized_crop',
        'flip': True,
        'interpolation': 'bilinear',
        'crop_scale': (0.08, 1.0),
        'start_step': 0,
    }
    expected = take(train_batches(pictures, **options, **spelled_out), 2)
    assert_equal(take(train_batches(pictures, **options), 2), expected)
    for other in ({'flip': False}, {'interpolation': 'nearest'}, {'crop_scale': (0.5, 1.0)}):
        (batch,) = take(train_batches(pictures, **options, **other), 1)
        assert (batch['image'] != expected[0]['image']).any()
    (batch,), _ = evaluate(pictures, global_batch_size=7, image_size=12)
    middle = preprocess.resize_and_crop(noise, 12, 0.875, 'bicubic')
    np.testing.assert_array_equal(batch['image'][0], middle)


@pytest.mark.parametrize(
    ('processors', 'workers', 'threads'), [(3, 0, 3), (64, 0, 16), (None, 0, 1), (64, 2, 1)]
)
def test_as_many_threads_as_processors_but_one_in_a_worker(
    make, monkeypatch, processors, workers, threads
):
    class Started(Exception):
        pass

    def options(**given):
        assert given == {'num_threads': threads, 'prefetch_buffer_size': threads}
        raise Started

    monkeypatch.setattr(machinery.os, 'cpu_count', lambda: processors)
    monkeypatch.setattr(machinery.grain, 'ReadOptions', options)
    with pytest.raises(Started):
        evaluate(make.numbered_source(4), global_batch_size=4, num_workers=workers)


def test_flip_can_be_switched_off(make):
    source = make.numbered_source(1)
    half = np.zeros((8, 8, 3), np.uint8)
    half[:, :4] = 255
    source._records = [make.serialize(make.encode(half), 0)]
    for flip, expected in ((False, {255}), (True, {0, 255})):
        options = {**PLAIN, 'flip': flip}
        batches = train_batches(source, global_batch_size=40, seed=0, **options)
        (batch,) = take(batches, 1)
        assert set(batch['image'][:, 4, 0, 0].tolist()) == expected


def test_a_damaged_image_is_an_error_that_names_the_record(make):
    source = make.numbered_source(6, damaged=[4])
    for num_threads in (0, 2):
        batches = train_batches(
            source, global_batch_size=6, seed=0, num_threads=num_threads, **PLAIN
        )
        with batches, pytest.raises(DataError) as caught:
            next(batches)
        assert "record 4 of 'numbers' split 'train' (file-4.png)" in str(caught.value)
        assert 'skip_damaged' in str(caught.value)
        assert '\n' not in str(caught.value)


def test_a_damaged_image_is_replaced_by_the_next_and_counted(make):
    source = make.numbered_source(6, damaged=[3, 4])
    batches = train_batches(
        source, global_batch_size=6, seed=0, skip_damaged=True, num_threads=2, **PLAIN
    )
    whole = make.numbered_source(6)
    with batches:
        assert batches.skipped == 0
        for step in range(3):
            numbers = make.number_of(next(batches)['image'])
            (plain,) = take(
                train_batches(whole, global_batch_size=6, seed=0, start_step=step, **PLAIN), 1
            )
            expected = [{3: 5, 4: 5}.get(n, n) for n in make.number_of(plain['image'])]
            assert numbers == expected
            # Record 3 is passed over, then 4 twice: on its own behalf and for 3.
            assert batches.skipped == 3 * (step + 1)


def test_damaged_images_at_the_end_are_replaced_from_the_start(make):
    source = make.numbered_source(3, damaged=[2])
    batches = train_batches(source, global_batch_size=3, seed=0, skip_damaged=True, **PLAIN)
    assert sorted(make.number_of(take(batches, 1)[0]['image'])) == [0, 0, 1]


def test_nothing_but_damaged_images_is_an_error(make):
    source = make.numbered_source(3, damaged=range(3))
    batches = train_batches(source, global_batch_size=3, seed=0, skip_damaged=True, **PLAIN)
    with batches, pytest.raises(DataError, match='all others are damaged'):
        next(batches)


def evaluate(source, **options):
    with evaluation_batches(source, **({'image_size': 8} | options)) as batches:
        return list(batches), batches.skipped


@pytest.mark.parametrize('length', [1, 7, 8, 9])
@pytest.mark.parametrize('process_count', [1, 2, 4])
@pytest.mark.parametrize('global_batch_size', [4, 16])
def test_evaluation_sees_every_example_once(make, length, process_count, global_batch_size):
    source = make.numbered_source(length)
    results = [
        evaluate(
            source,
            global_batch_size=global_batch_size,
            process_index=index,
            process_count=process_count,
        )[0]
        for index in range(process_count)
    ]
    assert {len(batches) for batches in results} == {-(-length // global_batch_size)}
    numbers = []
    for step in range(len(results[0])):
        for batches in results:
            batch = batches[step]
            assert batch['image'].shape == (global_batch_size // process_count, 8, 8, 3)
            assert (batch['mask'].dtype, batch['label'].dtype) == (bool, np.int32)
            mask = batch['mask']
            numbers += make.number_of(batch['image'][mask])
            assert batch['label'][mask].tolist() == [
                n % 3 for n in numbers[len(numbers) - mask.sum() :]
            ]
            assert not batch['image'][~mask].any()
            assert not batch['label'][~mask].any()
    assert numbers == list(range(length))  # In order, too.


def test_evaluation_prepares_images_like_timm(make, noise):
    source = make.numbered_source(1)
    source._records = [make.serialize(make.encode(noise), 0)]
    ((batch,), _) = evaluate(
        source, global_batch_size=1, image_size=24, crop_fraction=0.8, interpolation='bilinear'
    )
    resized = Image.fromarray(noise).resize((45, 30), Image.Resampling.BILINEAR)
    # The shorter side to 30, then 24 of 45 x 30 from the middle; a margin of 10.5 to even.
    np.testing.assert_array_equal(batch['image'][0], np.asarray(resized)[3:27, 10:34])


def test_evaluation_is_the_same_with_threads_and_workers(pictures):
    expected, _ = evaluate(pictures, global_batch_size=2, num_threads=0)
    for options in ({'num_threads': 3}, {'num_workers': 1}):
        assert_equal(evaluate(pictures, global_batch_size=2, **options)[0], expected)


def test_evaluation_masks_damaged_images_and_counts_them(make):
    source = make.numbered_source(7, damaged=[2, 6])
    batches, skipped = evaluate(source, global_batch_size=4, skip_damaged=True)
    masks = np.concatenate([batch['mask'] for batch in batches])
    assert masks.tolist() == [True, True, False, True, True, True, False, False]
    for key in ('image', 'label'):  # Damaged images are like those that fill up the last batch.
        assert not np.concatenate([batch[key] for batch in batches])[~masks].any()
    assert skipped == 2
    with pytest.raises(DataError, match=r'record 2 .*file-2.png'):
        evaluate(source, global_batch_size=4)


def test_an_image_that_cannot_be_resized_is_a_damaged_one(make):
    source = make.numbered_source(2)
    source._records[1] = make.serialize(make.encode(np.zeros((1, 200_000, 3), np.uint8)), 0, 'x')
    options = {'global_batch_size': 2, 'image_size': 32}
    batches, skipped = evaluate(source, skip_damaged=True, **options)
    assert (batches[0]['mask'].tolist(), skipped) == ([True, False], 1)
    with pytest.raises(DataError, match=r'record 1 .*too elongated'):
        evaluate(source, **options)


def test_an_absent_label_is_never_skipped(make):
    source = make.numbered_source(2)
    source._records[1] = make.serialize(make.encode(np.zeros((4, 4), np.uint8)), -1)
    with pytest.raises(DataError, match='stands for no label'):
        evaluate(source, global_batch_size=2, skip_damaged=True)
    with (
        train_batches(source, global_batch_size=2, seed=0, skip_damaged=True, **PLAIN) as batches,
        pytest.raises(DataError, match='stands for no label'),
    ):
        next(batches)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'global_batch_size': 6, 'process_count': 4}, 'divide by the 4 processes: 4 or 8'),
        ({'global_batch_size': 2, 'process_count': 4}, 'divide by the 4 processes: 4 or 4'),
        ({'global_batch_size': 0}, 'global_batch_size is 0'),
        ({'image_size': 0}, 'image_size 0'),
        ({'process_index': 2, 'process_count': 2}, 'process_index is 2'),
        ({'process_index': -1, 'process_count': 2}, 'process_index is -1; it is 0 to .* = 1'),
        ({'augmentation': 'resized-crop'}, "'resized-crop'.*'resized_crop'"),
        ({'interpolation': 'cubic'}, "'cubic'.*'bicubic'"),
        ({'crop_scale': (0.5, 0.1)}, 'crop_scale'),
        ({'crop_scale': (0.0, 1.0)}, 'crop_scale'),
        ({'crop_scale': (0.5, 1.1)}, 'crop_scale'),
        ({'seed': -1}, 'seed is -1'),
        ({'seed': 2**32}, 'seed is 4294967296'),
        ({'start_step': -1}, 'start_step is -1'),
        ({'num_threads': -1}, 'num_threads is -1'),
        ({'num_workers': -2}, 'num_workers -2'),
    ],
)
def test_wrong_options_are_refused_at_once(make, options, message):
    defaults = {'global_batch_size': 4, 'image_size': 8, 'seed': 0}
    with pytest.raises(ConfigError, match=message):
        train_batches(make.numbered_source(4), **(defaults | options))


@pytest.mark.parametrize('crop_fraction', [0.0, 1.1, float('nan')])
def test_wrong_crop_fractions_are_refused(make, crop_fraction):
    with pytest.raises(ConfigError, match='crop_fraction'):
        evaluation_batches(
            make.numbered_source(4), global_batch_size=4, image_size=8, crop_fraction=crop_fraction
        )


def test_an_empty_source_is_refused(make):
    with pytest.raises(DataError, match='no examples'):
        train_batches(make.numbered_source(0), global_batch_size=4, seed=0, **PLAIN)


def grain_threads():
    return [thread for thread in threading.enumerate() if 'grain-prefetch' in thread.name]


@pytest.mark.parametrize('end', ['close', 'drop'])
def test_threads_end_with_the_iterator(make, end):
    batches = train_batches(
        make.numbered_source(4), global_batch_size=4, seed=0, num_threads=3, **PLAIN
    )
    next(batches)
    assert grain_threads()
    if end == 'close':
        batches.close()
        batches.close()
    else:
        del batches
        gc.collect()
    deadline = time.monotonic() + 5
    while grain_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not grain_threads()


def test_only_so_many_batches_are_made_ahead(make):
    source = make.numbered_source(4)
    reads = []
    read = source._read
    source._read = lambda index: reads.append(index) or read(index)
    with train_batches(source, global_batch_size=4, seed=0, num_threads=2, **PLAIN) as batches:
        next(batches)
        time.sleep(0.3)
        assert 4 <= len(reads) <= 3 * 4


def test_colours_are_a_function_of_seed_and_step_for_any_number_of_readers(make):
    source = make.numbered_source(10)
    options = PLAIN | {'global_batch_size': 4, 'color': ColorOptions(2, 20, 0.4, 0.1)}
    whole = take(train_batches(source, seed=3, num_threads=0, **options), 4)
    threads = take(train_batches(source, seed=3, num_threads=3, **options), 4)
    assert_equal(whole, threads)
    assert_equal(whole[2:], take(train_batches(source, seed=3, start_step=2, **options), 2))
    plain = take(train_batches(source, seed=3, **options | {'color': None}), 4)
    other = take(train_batches(source, seed=4, **options), 4)
    for batches in (plain, other):
        assert not np.array_equal(batches[0]['image'], whole[0]['image'])
    np.testing.assert_array_equal(plain[0]['label'], whole[0]['label'])
