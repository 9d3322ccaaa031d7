"""Which TPUs there are, and how to compile for one that is not here."""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from gcnet_jax.errors import UserError

GIB = 2**30
# libtpu reads these when it is loaded; without them it looks for the TPU of this machine, complains
# that there is none, and lets one process at a time have it.
ENVIRONMENT = {
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-8',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}


class PlanError(UserError, ValueError):
    """A topology that does not exist, or a compiler that is not there."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of TPU.

    Attributes:
      hbm_bytes: Main memory that the compiler allows a program.
      bandwidth: Of the main memory, in bytes per second.
      peak_flops: Operations a second in bfloat16, in which float32 convolutions run too.
      dimensions: Number of dimensions of the network between the chips.
      most_chips: In one slice.
      options: Further options that the compiler needs.
    """

    hbm_bytes: float
    bandwidth: float
    peak_flops: float
    dimensions: int
    most_chips: int
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


CHIPS = {
    # Sold as 32, 16, 95 and 32 GB. Both cores of a v4 chip run as one device.
    'v4': Chip(30.75 * GIB, 1.2e12, 275e12, 3, 4096, {'chip_config_name': 'megacore'}),
    'v5e': Chip(15.75 * GIB, 819e9, 197e12, 2, 256),
    'v5p': Chip(95.73 * GIB, 2765e9, 459e12, 3, 8960),
    'v6e': Chip(31.24 * GIB, 1638e9, 918e12, 2, 256),
}


def prepare_process() -> None:
    """Makes jax compute on the CPU, and libtpu look for no TPU; for a process that only plans."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    jax.config.update('jax_platforms', 'cpu')


def parse_topology(name: str) -> tuple[Chip, int]:
    """Returns the kind and the number of chips of a topology such as 'v5e:4x4'.

    Raises:
      PlanError: There is no such topology.
    """
    match = re.fullmatch(r'(\w+):(\d+(?:x\d+)*)', name)
    chip = CHIPS.get(match[1]) if match else None
    sizes = [int(size) for size in match[2].split('x')] if match else []
    chips = math.prod(sizes)
    if chip is None or len(sizes) != chip.dimensions or not 0 < chips <= chip.most_chips:
        known = ', '.join(
            f'{kind}:{"x".join("ABC"[: chip.dimensions])} up to {chip.most_chips:,} chips'
            for kind, chip in CHIPS.items()
        )
        raise PlanError(
            f'unknown topology {name!r}; there are {known}: such as v5e:1x1, v5e:16x16, v6e:4x4, '
            'v5p:2x2x4'
        )
    return chip, chips


def topology_devices(name: str) -> Sequence[Any]:
    """Returns devices of a TPU that is not there, to compile for.

    Raises:
      PlanError: There is no such topology, or libtpu is not installed.
    """
    chip, chips = parse_topology(name)
    if importlib.util.find_spec('libtpu') is None and 'TPU_LIBRARY_PATH' not in os.environ:
        raise PlanError(
            'the TPU compiler is not installed: pip install "jax[tpu]", in an environment of its '
            'own, because beside it jax looks for a TPU first'
        )
    from jax.experimental import topologies

    options = dict(chip.options)
    if chips == 1:  # A host has four chips unless configured to have one.
        options['chips_per_host_bounds'] = (1, 1, 1)
    try:
        found = topologies.get_topology_desc(name, 'tpu', **options).devices
    except Exception as error:  # Whatever libtpu's C++ status becomes.
        reason = ' '.join(str(error).split())
        raise PlanError(f'topology {name!r}: the TPU compiler refuses it: {reason}') from error
    if len(found) != chips:
        raise PlanError(
            f'topology {name!r}: {len(found)} devices for {chips} chips; choose another'
        )
    return found
