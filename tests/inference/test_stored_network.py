"""A stored network: its outputs by name, batches, image sizes, devices, and how it fails."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from gcnet_jax.errors import CheckpointError, ConfigError, DataError
from gcnet_jax.inference import stored_network
from gcnet_jax.inference.batches import batch_buckets
from gcnet_jax.inference.stored_network import StoredNetwork
from gcnet_jax.stored import ModelDescription


@pytest.fixture(scope='module')
def network(stored):
    return StoredNetwork.load(stored.directory, batch_size=4, devices=stored.one_device)


def close(actual, expected, tolerance=1e-5):
    return np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def blank(count, height=12, width=12):
    return np.zeros((count, height, width, 3), np.uint8)


def test_every_bucket_is_compiled_once(stored, pictures, monkeypatch):
    traced = []
    original = stored_network.normalize

    def counted(images, *arguments):
        traced.append(images.shape[0])
        return original(images, *arguments)

    monkeypatch.setattr(stored_network, 'normalize', counted)
    network = StoredNetwork.load(stored.directory, batch_size=4, devices=stored.one_device)
    assert network.buckets == (1, 2, 4)
    assert traced == []
    for count in (1, 2, 3, 4, 7, 11, 1, 3):
        network.compute_all(pictures[:count], 'logits')
    assert sorted(traced) == [1, 2, 4]


def test_buckets():
    assert batch_buckets(32, 1) == (1, 2, 4, 8, 16, 32)
    assert batch_buckets(48, 1) == (1, 2, 4, 8, 16, 32, 48)
    assert batch_buckets(1, 1) == (1,)
    assert batch_buckets(32, 8) == (8, 16, 32)
    assert batch_buckets(10, 3) == (3, 6, 12)
    assert batch_buckets(2, 8) == (8,)


def test_several_devices_share_a_batch(stored, network, pictures):
    spread = StoredNetwork.load(stored.directory, batch_size=16)
    assert len(jax.devices()) == 8
    assert spread.buckets == (8, 16)
    size = stored.description.preprocessing.test_size
    output = spread.dispatch(np.zeros((9, size, size, 3), np.uint8), 'logits')
    assert [shard.data.shape for shard in output.addressable_shards] == [(2, 6)] * 8
    expected = network.compute_all(pictures, 'logits')
    np.testing.assert_allclose(
        spread.compute_all(pictures, 'logits'), expected, rtol=1e-5, atol=1e-5
    )


def test_folding_is_on_and_can_be_left_out(stored, plain, pictures):
    options = {'batch_size': 4, 'devices': stored.one_device}
    folded = StoredNetwork.load(stored.directory, **options)
    assert folded.variables['batch_stats'] == {}
    unfolded = StoredNetwork.load(stored.directory, fold=False, **options)
    assert jax.tree.structure(unfolded.variables) == jax.tree.structure(stored.variables)
    np.testing.assert_allclose(
        unfolded.compute_all(pictures, 'logits'), plain(pictures), rtol=1e-5, atol=1e-6
    )


def test_lower_precision_is_near_and_different(stored, plain, pictures):
    expected = plain(pictures)
    for options in ({'dtype': 'bfloat16'}, {'weights': 'int8'}):
        network = StoredNetwork.load(
            stored.directory, batch_size=16, devices=stored.one_device, **options
        )
        actual = np.stack(network.compute_all(pictures, 'logits'))
        assert actual.dtype == np.float32
        assert close(actual, expected, 0.05)
        assert not close(actual, expected, 1e-4)
    kernels = [leaf for leaf in jax.tree.leaves(network.variables) if leaf.dtype == np.int8]
    assert len(kernels) > 5


def test_the_best_checkpoint_is_taken_unless_the_newest_is_asked_for(
    stored, change_description, tmp_path
):
    for step, accuracy in [(1, 0.9), (2, 0.5)]:
        place = tmp_path / 'checkpoints' / str(step)
        shutil.copytree(stored.directory / 'checkpoints' / '0', place)
        names = [f'{name}{step}' for name in stored.description.label_names]
        change_description(place, label_names=names)
        (place / 'metrics').mkdir()
        (place / 'metrics' / 'metrics').write_text(json.dumps({'eval/accuracy': accuracy}))
    one = {'devices': stored.one_device}
    for choice, ending in [({}, '1'), ({'choose': 'newest'}, '2'), ({'choose': 'best'}, '1')]:
        loaded = StoredNetwork.load(tmp_path, **choice, **one)
        assert loaded.description.label_names[0] == 'ant' + ending
    with pytest.raises(ConfigError, match="unknown choice of a checkpoint 'last'"):
        StoredNetwork.load(tmp_path, choose='last')


def test_a_missing_checkpoint_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match='nowhere: no such directory'):
        StoredNetwork.load(tmp_path / 'nowhere')


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'weights': 'int4'}, "unknown choice of weights 'int4'; did you mean 'int8'"),
        ({'dtype': 'bfloat61'}, "unknown dtype 'bfloat61'; did you mean 'bfloat16'"),
        ({'batch_size': 0}, 'batch_size must be 1 or more, got 0'),
    ],
)
def test_options_that_cannot_be_are_refused(stored, options, message):
    with pytest.raises(ConfigError, match=message):
        StoredNetwork.load(stored.directory, **options)


def test_outputs_are_named_in_the_order_of_the_network(network, random_variables):
    assert list(network.output_shapes) == ['stage1', 'pooled', 'logits']
    assert network.output_shapes == {'stage1': (12, 12, 8), 'pooled': (8,), 'logits': (6,)}
    options = {'num_classes': 3, 'widths': [4] * 11, 'stage_sizes': [1] * 11, 'context': None}
    description = ModelDescription('resnet18', options)
    variables = random_variables(description.build(), blank(1, 32, 32) / 255, train=False)
    deep = StoredNetwork(description, variables, devices=jax.devices()[:1])
    stages = [f'stage{number}' for number in range(1, 12)]
    assert list(deep.output_shapes) == ['stem', *stages, 'pooled', 'logits']


def test_several_outputs_come_from_one_dispatch(network, pictures):
    images = np.stack([network.load_image(picture) for picture in pictures[:3]])
    outputs = network.dispatch(images, ['pooled', 'logits'])
    assert sorted(outputs) == ['logits', 'pooled']
    for name, values in outputs.items():
        assert values.shape[0] == 4  # The bucket.
        np.testing.assert_array_equal(values, network.dispatch(images, name))
    rows = network.compute_all(pictures, ['logits', 'pooled'])
    assert [sorted(row) for row in rows] == [['logits', 'pooled']] * len(pictures)
    for row, logits in zip(rows, network.compute_all(pictures, 'logits'), strict=True):
        np.testing.assert_array_equal(row['logits'], logits)


def test_the_order_of_names_does_not_compile_again(stored, monkeypatch):
    network = StoredNetwork.load(stored.directory, batch_size=1, devices=stored.one_device)
    traced = count_traces(monkeypatch)
    for names in (['logits', 'pooled'], ['pooled', 'logits'], ('pooled', 'logits', 'pooled')):
        network.dispatch(blank(1), names)
    assert len(traced) == 1


def test_unknown_outputs_and_too_large_batches_are_refused(network, pictures):
    for call in (network.compute_all, network.stream_outputs):
        with pytest.raises(ConfigError, match=r"output of gccnn 'logit'; did you mean 'logits'"):
            call([], ['pooled', 'logit'])
    with pytest.raises(ConfigError, match='at most batch_size=4 images, got 5'):
        network.dispatch(blank(5), 'logits')
    for images in (blank(1) / 255, blank(1)[0], blank(1)[..., :1]):
        with pytest.raises(ConfigError, match=r'must be uint8 \[batch, height, width, 3\], got '):
            network.dispatch(images, 'logits')


def count_traces(monkeypatch):
    shapes = []
    original = stored_network.normalize

    def counted(images, *arguments):
        shapes.append(images.shape[:3])
        return original(images, *arguments)

    monkeypatch.setattr(stored_network, 'normalize', counted)
    return shapes


def test_every_image_size_is_compiled_once_and_they_are_limited(stored, monkeypatch):
    shapes = count_traces(monkeypatch)
    network = StoredNetwork.load(stored.directory, batch_size=2, devices=stored.one_device)
    for _ in range(2):
        for height in range(5, 5 + StoredNetwork.max_image_sizes):
            assert network.dispatch(blank(1, height, 9), 'stage1').shape == (1, height, 9, 8)
    assert len(shapes) == StoredNetwork.max_image_sizes
    with pytest.raises(ConfigError, match=r'images of 9x5 pixels: .* at most 8 sizes, .* 5x9, 6x9'):
        network.dispatch(blank(1, 9, 5), 'stage1')
    network.dispatch(blank(2, 5, 9), 'stage1')  # Another batch size of a known one.
    assert shapes[-1] == (2, 5, 9)


class TwoSizes(StoredNetwork):
    """Makes wide images of wide files, as a detector does."""

    def load_image(self, image, name=None):
        size = (8, 12) if image.shape[1] > image.shape[0] else (12, 8)
        preprocessing = dataclasses.replace(self.description.preprocessing, test_size=size)
        return stored_network.load_image(image, preprocessing, name)


def test_images_of_several_sizes_come_back_in_order(stored, pictures):
    network = TwoSizes.load(stored.directory, batch_size=4, devices=stored.one_device)
    rows = network.compute_all(pictures, 'stage1')
    wide = [picture.shape[1] > picture.shape[0] for picture in pictures]
    assert len(set(wide)) == 2
    assert [row.shape[:2] for row in rows] == [(8, 12) if is_wide else (12, 8) for is_wide in wide]
    for picture, row in zip(pictures, rows, strict=True):
        assert close(network.compute_all([picture], 'stage1')[0], row, 1e-4)


def test_a_stream_names_the_bad_ones_among_the_others(network, pictures, folder):
    (folder / '03.png').write_bytes(b'no image')
    results = list(network.stream_outputs(folder, ['pooled', 'logits'], num_threads=2))
    assert [path.name for path, _ in results] == [f'{i:02}.png' for i in range(len(pictures))]
    assert isinstance(results[3][1], DataError)
    expected = network.compute_all(pictures, 'logits')
    for index, (_, row) in enumerate(results):
        if index != 3:
            assert close(row['logits'], expected[index])


def test_variables_of_another_network_are_refused(stored):
    description = dataclasses.replace(stored.description, name='resnet20')
    with pytest.raises(CheckpointError, match='its variables are not those of resnet20'):
        StoredNetwork(description, stored.variables)


def test_it_knows_no_labels(stored):
    """What a classifier refuses is nothing to the network itself."""
    description = dataclasses.replace(stored.description, label_names=('a', 'b'), task='multilabel')
    network = StoredNetwork(description, stored.variables, devices=stored.one_device)
    assert network.dispatch(blank(1), 'logits').shape == (1, 6)
