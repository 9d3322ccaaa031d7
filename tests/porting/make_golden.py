"""Writes tests/porting/golden/: what the real libraries compute with the seeded weights.

    pip install -r requirements-torch.txt
    python -m tests.porting.make_golden

One file a network: the names and shapes of its state dict, and its logits at two input sizes.
"""

import json
from pathlib import Path

import numpy as np
import torch

from tests.porting import peers
from tests.porting.seeded import seeded_images, seeded_tensors

GOLDEN = Path(__file__).parent / 'golden'
NETWORKS = ('gccnn', 'gc_resnet50', *peers.TIMM, *peers.TORCHVISION)
SIZES = ((64, 64), (97, 71))
BLOCKS = {
    'add': {},
    'scale': {'fusion_types': ('channel_mul',)},
    'scale_add': {'fusion_types': ('channel_mul', 'channel_add')},
    'average': {'pooling_type': 'avg'},
}
BLOCK_CHANNELS = 32


def run(network: torch.nn.Module, inputs: np.ndarray) -> np.ndarray:
    """The output for `[batch, height, width, channel]`, in the same order."""
    with torch.no_grad():
        output = network(torch.tensor(np.ascontiguousarray(inputs.transpose(0, 3, 1, 2)))).numpy()
    return output.transpose(0, 2, 3, 1) if output.ndim == 4 else output


def write(name: str, network: torch.nn.Module, inputs: list[np.ndarray]) -> None:
    shapes = {key: list(value.shape) for key, value in network.state_dict().items()}
    weights = {key: torch.tensor(value) for key, value in seeded_tensors(shapes).items()}
    network.load_state_dict(weights, strict=True)
    outputs = {f'{x.shape[1]}x{x.shape[2]}': run(network.eval(), x) for x in inputs}
    names = np.frombuffer(json.dumps(shapes).encode(), np.uint8)
    np.savez_compressed(GOLDEN / f'{name}.npz', state_dict=names, **outputs)


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for name in NETWORKS:
        write(name, peers.build(name), [seeded_images(*size) for size in SIZES])
    for name, options in BLOCKS.items():
        block = peers.ContextBlock(BLOCK_CHANNELS, ratio=1 / 4, **options)
        inputs = [seeded_images(*size, channels=BLOCK_CHANNELS) for size in ((4, 4), (5, 3))]
        write(f'block_{name}', block, inputs)


if __name__ == '__main__':
    main()
