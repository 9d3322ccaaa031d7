"""The mesh of devices, and where each array lives on it.

Three axes: `data` splits the batch, `fsdp` splits the batch and the parameters, `spatial` splits
the height of the images. All axes are Auto: the partitioner places every collective, and nothing
else in the package knows about devices.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gcnet_jax.errors import ConfigError

AXES = ('data', 'fsdp', 'spatial')
_BATCH = ('data', 'fsdp')
# Splitting a leaf smaller than this saves less memory than its collective costs.
SMALLEST_SHARDED_SIZE = 2**14


def mesh_shape(data: int, fsdp: int, spatial: int, device_count: int) -> tuple[int, int, int]:
    """Returns the axes' sizes with the one -1, if there is one, filled in.

    Raises:
      ConfigError: The sizes do not multiply to the number of devices.
    """
    sizes = dict(zip(AXES, (data, fsdp, spatial), strict=True))
    for name, size in sizes.items():
        if size != -1 and size < 1:
            raise ConfigError(f'mesh.{name} is {size}; it is 1 or more, or -1 for the rest')
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ConfigError(f'mesh.{" and mesh.".join(free)} are -1; only one axis can take the rest')
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if free and device_count % fixed == 0:
        sizes[free[0]] = device_count // fixed
    shape = tuple(sizes.values())
    if (free and device_count % fixed) or int(np.prod(shape)) != device_count:
        raise ConfigError(
            f'mesh data={data}, fsdp={fsdp}, spatial={spatial} does not fit {device_count} '
            f'devices; the product must be {device_count}: set one of them to -1'
        )
    return shape


def make_mesh(data: int = -1, fsdp: int = 1, spatial: int = 1, devices: Any = None) -> Mesh:
    """Builds the mesh of all devices.

    Args:
      data: Number of parts of the batch; -1 takes the devices that are left.
      fsdp: Number of parts of the batch and of parameters, optimizer state and moving average.
      spatial: Number of parts of the images' height.
      devices: The devices; all of them when None.

    Raises:
      ConfigError: The sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(data, fsdp, spatial, len(devices))
    # jax.make_mesh raises for a shape such as 64x2 of a v6e slice of 8x16 chips, where an axis of
    # the mesh is part of one of the network.
    placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    # The default became Explicit axes in jax 0.9, under which permuting a sharded batch is an
    # error.
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_parts(mesh: Mesh) -> int:
    """Returns the number of parts that a batch is split into."""
    return mesh.shape['data'] * mesh.shape['fsdp']


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays that every device holds completely."""
    return NamedSharding(mesh, PartitionSpec())


def feature_sharding(mesh: Mesh, height: int) -> NamedSharding:
    """Returns where feature maps [batch, height, width, channel] live.

    The height is split as long as it divides evenly, and replicated after that.
    """
    rows = 'spatial' if height % mesh.shape['spatial'] == 0 else None
    return NamedSharding(mesh, PartitionSpec(_BATCH, rows))


def batch_shardings(
    mesh: Mesh, spec: Mapping[str, tuple[str, ...]], *, leading: int = 0
) -> dict[str, NamedSharding]:
    """Returns where the arrays of a batch live.

    Args:
      mesh: The devices.
      spec: The axes of each array, from the first on: 'batch' is split over `data` and `fsdp`,
        'height' over `spatial`. What is not named is replicated.
      leading: Number of axes before them, which are not split.
    """
    places = {'batch': _BATCH, 'height': 'spatial'}
    return {
        name: NamedSharding(
            mesh, PartitionSpec(*(None,) * leading, *(places[axis] for axis in axes))
        )
        for name, axes in spec.items()
    }


def leaf_spec(
    shape: tuple[int, ...], parts: int, smallest: int = SMALLEST_SHARDED_SIZE
) -> PartitionSpec:
    """Returns how one leaf of the state is split over `fsdp`.

    The largest dimension that `parts` divides is split; of equal ones the last, because a kernel's
    output channels come last. Leaves with fewer than `smallest` elements, or with no such
    dimension, are whole on every device. Optimizer state and moving averages have the shapes of
    their parameters, so one rule keeps them together.
    """
    if parts == 1 or int(np.prod(shape)) < smallest:
        return PartitionSpec()
    divisible = [axis for axis, size in enumerate(shape) if size % parts == 0]
    if not divisible:
        return PartitionSpec()
    chosen = max(divisible, key=lambda axis: (shape[axis], axis))
    return PartitionSpec(*(['fsdp' if axis == chosen else None for axis in range(len(shape))]))


def state_shardings(state: Any, mesh: Mesh, smallest: int = SMALLEST_SHARDED_SIZE) -> Any:
    """Returns the sharding of every leaf of a state (arrays or shapes)."""
    parts = mesh.shape['fsdp']
    return jax.tree.map(
        lambda leaf: NamedSharding(mesh, leaf_spec(leaf.shape, parts, smallest)), state
    )


def to_global(batch: dict, shardings: dict) -> dict:
    """Makes global arrays of the rows that this process read.

    Each process gives its own rows; rows of different processes must not overlap.
    """
    return {
        name: jax.make_array_from_process_local_data(shardings[name], np.asarray(value))
        for name, value in batch.items()
    }
