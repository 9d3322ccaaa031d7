"""What one training step costs on a TPU v5e, from the TPU's own compiler; no TPU is needed.

    python -m benchmarks.tpu [--networks ...]
    python -m benchmarks.tpu --detectors gc_mask_rcnn_resnet50_fpn

The step is that of configs/imagenet.py without the moving average, for 224-pixel images in
bfloat16. The same step trains a ResNet-50 as Flax's ImageNet example writes it, our ResNet-50, our
GC-ResNet-50 r16, and the latter with its layers in the order written, which shows what
`gcnet_jax.models.reorder` is worth. These are figures of the compiler, not measurements.

With `--detectors`, what finding the objects in one image of 800 x 1344 pixels costs instead, in
bfloat16 and in float32 with exact products. The bodies of loops whose length depends on the image
are counted once.
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax.numpy as jnp

from benchmarks.common import argument_parser, report
from benchmarks.plain_flax import NETWORKS as PLAIN_NETWORKS
from gcnet_jax import planning
from gcnet_jax.commands.config_files import read_flags
from gcnet_jax.errors import UserError
from gcnet_jax.models import create_model, list_models
from gcnet_jax.models.resnet import ResNet
from gcnet_jax.planning.chips import topology_devices
from gcnet_jax.planning.inference import compile_inference
from gcnet_jax.planning.plan import compile_step, describe
from gcnet_jax.planning.program import Program

CONFIG = Path(__file__).parents[1] / 'configs' / 'imagenet.py'
DETECTORS, DETECTOR_SIZE = list_models(task='detection'), (800, 1344)
AS_WRITTEN = ' as written'
NETWORKS = ('flax example resnet50', 'resnet50', 'gc_resnet50', 'gc_resnet50' + AS_WRITTEN)


class AsWritten(ResNet):
    """A ResNet that the training step does not reorder, because it is another class."""


def compile_network(network: str, topology: str, batch_per_chip: int, size: int) -> Program:
    """Compiles the training step of one of NETWORKS."""
    config, _, _ = read_flags(['benchmarks.tpu', '--config', str(CONFIG)], '')
    config.training.ema_decay = 0.0
    config.model.num_classes = 1000
    config.data.image_size = size
    devices = topology_devices(topology)
    batch = batch_per_chip * len(devices)
    experiment = describe(config, devices, batch, with_context=network.startswith('gc_'))
    if network == NETWORKS[0]:
        plain = PLAIN_NETWORKS['resnet50'].clone(dtype=jnp.bfloat16)
        experiment = dataclasses.replace(experiment, model=plain)
    elif network.endswith(AS_WRITTEN):
        model = experiment.model
        fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
        experiment = dataclasses.replace(experiment, model=AsWritten(**fields))
    return compile_step(experiment)


def detector_programs(detectors: Sequence[str], topology: str) -> Iterator[tuple[str, Program]]:
    """Compiles inference of each, in both types."""
    device = topology_devices(topology)[0]
    for name in detectors:
        for dtype, precision in (('bfloat16', 'default'), ('float32', 'highest')):
            model = create_model(name, dtype=dtype)
            yield (
                f'{name} {dtype}',
                compile_inference(model, device, (1, *DETECTOR_SIZE), precision=precision),
            )


def main(arguments: list[str] | None = None) -> None:
    parser = argument_parser(__doc__)
    parser.add_argument('--topology', default='v5e:1x1')
    parser.add_argument('--batch-per-chip', type=int, default=256)
    parser.add_argument('--image-size', type=int, default=224)
    parser.add_argument('--networks', nargs='+', choices=NETWORKS, default=NETWORKS, metavar='NAME')
    parser.add_argument('--detectors', nargs='+', choices=DETECTORS, default=(), metavar='NAME')
    flags = parser.parse_args(arguments)
    planning.prepare_process()
    size = (flags.topology, flags.batch_per_chip, flags.image_size)
    programs = ((network, compile_network(network, *size)) for network in flags.networks)
    if flags.detectors:
        programs = detector_programs(flags.detectors, flags.topology)
    rows, first = [], None
    for network, program in programs:
        first = first or program
        rows.append(
            {
                'network': network,
                'FLOPs': f'{program.flops:.4g}',
                'FLOPs ratio': program.flops / first.flops,
                'bytes accessed': f'{program.bytes_accessed:.4g}',
                'accessed ratio': program.bytes_accessed / first.bytes_accessed,
                'HBM bytes': f'{program.traffic.hbm_bytes:.4g}',
                'HBM ratio': program.traffic.hbm_bytes / first.traffic.hbm_bytes,
                'memory GiB': program.memory / 2**30,
                'memory ratio': program.memory / first.memory,
                'compile s': round(program.compile_seconds),
            }
        )
    report(rows, as_json=flags.json)


if __name__ == '__main__':
    try:
        main()
    except UserError as error:
        sys.exit(f'benchmarks.tpu: {error}')
