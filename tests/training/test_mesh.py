import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from gcnet_jax.errors import ConfigError
from gcnet_jax.training.mesh import (
    batch_shardings,
    leaf_spec,
    make_mesh,
    mesh_shape,
    state_shardings,
    to_global,
)


@pytest.mark.parametrize(
    ('given', 'shape'),
    [
        ((-1, 1, 1), (8, 1, 1)),
        ((2, -1, 2), (2, 2, 2)),
        ((1, 8, 1), (1, 8, 1)),
        ((4, 1, -1), (4, 1, 2)),
    ],
)
def test_one_axis_takes_the_rest(given, shape):
    assert mesh_shape(*given, 8) == shape
    assert tuple(make_mesh(*given).shape.values()) == shape


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        ((3, 1, 1), 'does not fit 8 devices'),
        ((-1, 3, 1), 'does not fit 8 devices'),
        ((-1, -1, 1), 'only one axis'),
        ((0, 1, 1), 'mesh.data is 0'),
        ((4, 1, 1), 'product must be 8'),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        make_mesh(*given)


class Chip:
    """A chip of a v6e slice, as far as placing a mesh on it needs to know."""

    platform, device_kind, slice_index, core_on_chip = 'tpu', 'TPU v6 lite', 0, 0

    def __init__(self, row, column):
        self.id, self.coords = 4 * row + column, (column, row, 0)
        self.process_index = row // 2 * 2 + column // 2


@pytest.mark.parametrize('sizes', [(16, 1, 1), (4, 4, 1), (8, 2, 1), (2, 8, 1), (4, 2, 2)])
def test_a_mesh_can_split_the_axes_of_a_slice(sizes):
    chips = [Chip(row, column) for row in range(4) for column in range(4)]
    mesh = make_mesh(*sizes, devices=chips)
    assert tuple(mesh.shape.values()) == sizes
    assert set(mesh.devices.flat) == set(chips)


@pytest.mark.parametrize(
    ('shape', 'spec'),
    [
        ((3, 3, 64, 128), PartitionSpec(None, None, None, 'fsdp')),
        ((1, 1, 256, 64), PartitionSpec(None, None, 'fsdp', None)),
        ((128, 128), PartitionSpec(None, 'fsdp')),
        ((2048, 1001), PartitionSpec('fsdp', None)),
        ((64,), PartitionSpec()),
        ((1001, 333), PartitionSpec()),
    ],
)
def test_the_largest_divisible_dimension_is_split(shape, spec):
    assert leaf_spec(shape, 4) == spec
    assert leaf_spec(shape, 1) == PartitionSpec()


def test_parameters_are_really_split_over_fsdp():
    mesh = make_mesh(2, 4, 1)
    kernel = np.zeros((3, 3, 64, 128), np.float32)
    placed = jax.device_put(kernel, state_shardings(kernel, mesh))
    assert {shard.data.shape for shard in placed.addressable_shards} == {(3, 3, 64, 32)}


def test_images_are_split_by_batch_and_height():
    mesh = make_mesh(2, 2, 2)
    spec = {'image': ('batch', 'height'), 'label': ('batch',)}
    batch = {'image': np.arange(8 * 4 * 4 * 3).reshape(8, 4, 4, 3), 'label': np.arange(8)}
    placed = to_global(batch, batch_shardings(mesh, spec))
    assert {shard.data.shape for shard in placed['image'].addressable_shards} == {(2, 2, 4, 3)}
    assert {shard.data.shape for shard in placed['label'].addressable_shards} == {(2,)}
    np.testing.assert_array_equal(placed['image'], batch['image'])
