"""A training step against mmsegmentation's own: loss, statistics and the whole gradient.

Weights are fresh every run; GCNET_SEED repeats one, and pytest prints the seed of one that fails.
Both networks have the batch's statistics in their norms and drop nothing. The gradient comes
through the same table as the weights: it is ported like a file of them. Both compute in float64: a
few of millions of activations lie so near to 0 that float32 sends them to either side, and each
moves the gradient of a channel by per cent.
"""

import os
import secrets

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcnet_jax.data.on_device import normalize
from gcnet_jax.porting import port
from gcnet_jax.stored import load_variables
from gcnet_jax.tasks import Segmentation
from gcnet_jax.training.mesh import make_mesh
from gcnet_jax.training.steps import StepOptions, make_gradient
from tests.porting.detector_weights import detector_weights

pytestmark = pytest.mark.mmsegmentation

SEED = int(os.environ.get('GCNET_SEED', secrets.randbelow(10**6)))
IGNORED = 255
# (configuration, whether the loss is divided by the ignored pixels too, which is its default)
CASES = [
    ('gcnet/gcnet_r50-d8_4xb2-40k_cityscapes-512x1024', True),
    ('gcnet/gcnet_r50-d8_4xb2-40k_cityscapes-769x769', False),
    ('fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024', False),
]


def make_batch():
    rng = np.random.default_rng(SEED)
    labels = np.repeat(np.repeat(rng.integers(0, 19, (2, 7, 9)), 8, 1), 8, 2)
    labels = labels[:, :49, :65].copy()
    labels[rng.random(labels.shape) < 0.2] = IGNORED
    labels[0, :20] = IGNORED
    images = rng.integers(0, 256, (*labels.shape, 3))
    return {'image': images.astype(np.uint8), 'label': labels.astype(np.uint8)}


def their_step(model, images, labels, count_ignored):
    """Returns mmsegmentation's loss, gradients by name, and buffers behind the step."""
    import torch
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    model.double().train()
    for head in (model.decode_head, model.auxiliary_head):
        head.dropout = None
        head.loss_decode.avg_non_ignore = not count_ignored
    samples = []
    for label in labels:
        sample = SegDataSample()
        sample.gt_sem_seg = PixelData(data=torch.from_numpy(label.astype(np.int64))[None])
        samples.append(sample)
    inputs = torch.from_numpy(np.asarray(images, np.float64).transpose(0, 3, 1, 2).copy())
    losses = model.loss(inputs, samples)
    total = sum(value for name, value in losses.items() if name.endswith('loss_ce'))
    total.backward()
    gradients = {name: value.grad for name, value in model.named_parameters()}
    return float(total.detach()), gradients, dict(model.named_buffers())


@pytest.mark.parametrize(('config', 'count_ignored'), CASES, ids=['gc', 'gc_769', 'fcn'])
@pytest.mark.usefixtures('float64')
def test_loss_and_gradient_of_a_step(config, count_ignored, tmp_path):
    import torch

    from tests.porting import mmsegmentation_peer as peer

    print(f'GCNET_SEED={SEED}')
    theirs = peer.build(config)
    shapes = {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
    peer.load(theirs, detector_weights(shapes, SEED))

    def ported(tensors, name):
        path = tmp_path / f'{config.rpartition("/")[2]}.pth'
        torch.save({'state_dict': tensors}, path)
        description, _ = port(path, tmp_path / name)
        return description, load_variables(tmp_path / name)[1]

    description, variables = ported(theirs.state_dict(), 'before')
    batch, images = make_batch(), description.preprocessing
    normalised = normalize(batch['image'], images.mean, images.std)
    loss, gradients, buffers = their_step(theirs, normalised, batch['label'], count_ignored)
    _, expected = ported({**gradients, **buffers}, 'gradient')

    task = Segmentation(19, images.mean, images.std, count_ignored=count_ignored)
    model = description.build()
    wide = {'dtype': jnp.float64, 'backbone': model.backbone.clone(dtype=jnp.float64)}
    model = model.clone(dropout_rate=0.0, **wide)
    variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), variables)
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    gradient = make_gradient(model, task, StepOptions(), mesh)
    compiled = jax.jit(
        lambda variables, batch: gradient(
            variables['params'],
            {},
            variables['batch_stats'],
            task.prepare(batch, jax.random.key(0)),
            jax.random.key(1),
        )
    )
    ours, statistics, sums = compiled(variables, batch)
    assert float(sums['loss'] / sums['weight']) == pytest.approx(loss, rel=1e-5)
    differences = {
        jax.tree_util.keystr(path): float(np.abs(mine - value).max() / np.abs(value).max())
        for (path, value), mine in zip(
            jax.tree_util.tree_leaves_with_path(expected['params']),
            jax.tree.leaves(jax.device_get(ours)),
            strict=True,
        )
    }
    if 'context' in ours['head']:  # The bias below a softmax, whose gradient is rounding alone.
        differences.pop("['head']['context']['pool']['logits']['bias']")
        assert np.abs(ours['head']['context']['pool']['logits']['bias']).max() < 1e-7
    worst = max(differences, key=differences.get)
    print(f'{len(differences)} tensors; worst {worst}: {differences[worst]:.1e}')
    for name in ('head', 'auxiliary_head'):
        means = statistics[name]['conv1']['norm']['mean']
        np.testing.assert_allclose(
            means, expected['batch_stats'][name]['conv1']['norm']['mean'], rtol=1e-4, atol=1e-5
        )
    assert differences[worst] < 1e-4
