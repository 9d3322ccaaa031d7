"""Against the libraries themselves, with fresh weights every run.

GCNET_SEED repeats a run; pytest prints the seed of one that fails.
"""

import os
import secrets
from pathlib import Path

import flax.traverse_util
import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp
from PIL import Image
from safetensors.numpy import load_file

from gcnet_jax.models import create_model
from gcnet_jax.porting import load_torch, to_torch, write_safetensors
from gcnet_jax.porting.names import pair_names
from gcnet_jax.porting.recognise import family_of
from gcnet_jax.porting.torch_writer import write_torch
from tests.porting.seeded import seeded_images, seeded_tensors

pytestmark = pytest.mark.torch

SEED = int(os.environ.get('GCNET_SEED', secrets.randbelow(10**6)))
SIZES = ((64, 64), (97, 75))
LIBRARIES = {
    'gccnn': 'gccnn',
    'resnet20_a': 'pytorch_resnet_cifar10',
    'gc_resnet50': 'mmdetection',
    'gcresnext26ts': 'timm',
    'gcresnet33ts': 'timm',
    'gcresnet50t': 'timm',
    'gcresnext50ts': 'timm',
    'gc_efficientnetv2_rw_t': 'timm',
    'resnet18': 'torchvision',
    'resnet50': 'torchvision',
    'resnext50_32x4d': 'torchvision',
}
# Each peer is built once, and its file is read once.
NAMES = pytest.mark.parametrize('peer', LIBRARIES, indirect=True)


def quickly(function, *arguments):
    """Compiles for a short compilation: here each function runs once."""
    options = {'xla_backend_optimization_level': 0}
    return jax.jit(function).lower(*arguments).compile(compiler_options=options)(*arguments)


def as_torch(images):
    import torch

    return torch.tensor(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def difference(ours, theirs):
    """The largest difference over the largest value."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.fixture(scope='module')
def peer(request, tmp_path_factory):
    """(name, the library's network with fresh weights, ours with the same, through a file)."""
    import torch

    from tests.porting import peers

    print(f'GCNET_SEED={SEED}')
    name = request.param
    network = peers.build(name)
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    weights = seeded_tensors(shapes, SEED)
    network.load_state_dict({k: torch.tensor(v) for k, v in weights.items()}, strict=True)
    path = tmp_path_factory.mktemp(name) / 'model.pth'
    if LIBRARIES[name] == 'timm':
        from safetensors.torch import save_model

        path = path.with_suffix('.safetensors')
        save_model(network, str(path))
    elif LIBRARIES[name] == 'mmdetection':
        torch.save({'meta': {'epoch': 12}, 'state_dict': network.state_dict()}, path)
    elif LIBRARIES[name] == 'pytorch_resnet_cifar10':
        state = {f'module.{key}': value for key, value in network.state_dict().items()}
        torch.save({'state_dict': state, 'best_prec1': 91.7}, path)
    else:
        torch.save(network.state_dict(), path)
    model, variables, report = load_torch(path)
    path.unlink()
    assert not report.warnings
    assert not report.initialised
    return name, network, model, variables


def activations(network):
    """Hooks that keep the output of the stem and of every stage, by our names."""
    kept = {}

    def keep(name):
        return lambda _module, _inputs, output: kept.update({name: output})

    def keep_input(name):
        return lambda _module, inputs: kept.update({name: inputs[0]})

    modules = dict(network.named_modules())
    if 'stages.0' in modules:
        modules['stem.conv3'].register_forward_hook(keep('stem'))
        stages = [modules[f'stages.{index}'] for index in range(4)]
    elif 'blocks.0' in modules:
        modules['bn1'].register_forward_hook(keep('stem'))
        stages = [modules[f'blocks.{index}'] for index in range(6)]
    else:
        if 'maxpool' in modules:
            modules['maxpool'].register_forward_pre_hook(keep_input('stem'))
        elif 'conv1' in modules:
            modules['layer1'].register_forward_pre_hook(keep_input('stem'))
        stages = [modules[key] for key in modules if key.startswith('layer') and '.' not in key]
    for number, stage in enumerate(stages, start=1):
        stage.register_forward_hook(keep(f'stage{number}'))
    return kept


@NAMES
def test_every_stage_and_the_logits(peer):
    import torch

    _, network, model, variables = peer
    network.eval()
    kept = activations(network)
    for size in SIZES:
        images = seeded_images(*size, batch=2)
        with torch.no_grad():
            expected = network(as_torch(images)).numpy()

        def run(v, x):
            return model.apply(v, x, train=False, method='outputs')

        outputs = quickly(run, variables, jnp.asarray(images))
        assert set(outputs) == {*kept, 'pooled', 'logits'}
        differences = {'logits': difference(outputs['logits'], expected)}
        for name in kept:
            differences[name] = difference(outputs[name], kept[name].numpy().transpose(0, 2, 3, 1))
        print(size, {key: f'{value:.1e}' for key, value in differences.items()})
        assert max(differences.values()) < 1e-5, differences


class Float64:
    """jax.numpy, but what is said to be float32 is float64."""

    float32 = jnp.float64

    def __getattr__(self, name):
        return getattr(jnp, name)


@pytest.fixture
def in_float64(float64, monkeypatch):
    """Everything in float64, what is always float32 included.

    The gradient of a deep ReLU network cannot be compared in float32: torch's own is 1% away from
    its float64 one, because units near zero change sides.
    """
    for module in ('context.common', 'context.global_context', 'models.layers'):
        monkeypatch.setattr(f'gcnet_jax.{module}.jnp', Float64())


@NAMES
def test_training_mode_loss_in_float32(peer):
    import torch

    _, network, model, variables = peer
    images, labels = seeded_images(64, 64, batch=8), np.arange(8)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    network.train()
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(
            network(as_torch(images)), torch.tensor(labels)
        ).item()
    network.load_state_dict(before)
    loss, _ = quickly(lambda v, x: loss_of(model, v, x, labels), variables, jnp.asarray(images))
    print(f'loss {expected:.5f}, difference {abs(float(loss) - expected):.1e}')
    assert abs(float(loss) - expected) < 1e-4 * expected


def loss_of(model, variables, images, labels):
    logits, changed = model.apply(
        variables,
        images,
        train=True,
        mutable=['batch_stats'],
        rngs={'dropout': jax.random.key(0)},
    )
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), changed


@NAMES
def test_training_mode_gradients_and_statistics(peer, in_float64):
    import torch

    name, network, model, variables = peer
    images, labels = seeded_images(64, 64, batch=3), np.arange(3)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    network.double().train()
    loss = torch.nn.functional.cross_entropy(
        network(as_torch(images).double()), torch.tensor(labels)
    )
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    expected = dict(
        zip(dict(network.named_parameters()), (g.numpy() for g in gradients), strict=True)
    )
    statistics = {k: v.numpy().copy() for k, v in network.named_buffers() if 'running' in k}
    network.float().load_state_dict(before)

    def of_params(params, batch_stats, x):
        wide = model.clone(dtype=jnp.float64)
        return loss_of(wide, {'params': params, 'batch_stats': batch_stats}, x, labels)

    params, batch_stats, x = jax.tree.map(
        lambda leaf: jnp.asarray(leaf, jnp.float64),
        (variables['params'], variables['batch_stats'], images),
    )
    (ours, changed), ours_gradients = quickly(
        jax.value_and_grad(of_params, has_aux=True), params, batch_stats, x
    )
    tree = flax.traverse_util.flatten_dict({'params': ours_gradients, **changed}, sep='/')
    family = family_of(model, LIBRARIES[name])
    pairings, nameless = pair_names(family, tree)
    assert not nameless
    found = {p.theirs: p.leaf.to_theirs(np.asarray(tree[p.ours])) for p in pairings}
    assert set(found) == expected.keys() | statistics.keys()

    differences = {'loss': abs(float(ours) / loss.item() - 1)}
    # The gradient of a bias before a softmax is nothing but rounding.
    floor = 1e-6 * max(np.abs(value).max() for value in expected.values())
    for key, value in expected.items():
        scale = max(np.abs(value).max(), floor)
        differences[key] = np.abs(found[key] - value).max() / scale
    for key, value in statistics.items():
        if key.endswith('running_mean'):
            differences[key] = difference(found[key], value)
    worst = max(differences, key=differences.get)
    print(f'loss {loss.item():.4f}, worst {differences[worst]:.1e}: {worst}')
    assert differences[worst] < 1e-7, worst


@NAMES
def test_the_reverse_port_loads_strictly(peer, tmp_path):
    import torch

    from tests.porting import peers

    name, network, model, variables = peer
    path = tmp_path / 'back.safetensors'
    tensors = to_torch(model, variables, LIBRARIES[name])
    write_safetensors(path, tensors)
    state = {key: torch.tensor(value) for key, value in load_file(path).items()}
    path.unlink()
    for meta in (None, {'CLASSES': ('cat', 'Größe'), 'epoch': 2**40, 'rate': 0.1, 'none': []}):
        path = tmp_path / 'back.pth'
        write_torch(path, tensors, meta=meta)
        loaded = torch.load(path, weights_only=True, mmap=True)
        assert meta is None or loaded['meta'] == meta
        loaded = loaded if meta is None else loaded['state_dict']
        assert list(loaded) == list(tensors)
        assert all(torch.equal(loaded[key], state[key]) for key in state)
        path.unlink()
    fresh = peers.build(name)
    if LIBRARIES[name] == 'mmdetection':  # a backbone: the classifier is not a detector's
        state = {key.removeprefix('backbone.'): value for key, value in state.items()}
        missing, unexpected = fresh.load_state_dict(state, strict=False)
        assert (missing, unexpected) == (['fc.weight', 'fc.bias'], [])
        fresh.fc.load_state_dict(network.fc.state_dict())
    else:
        fresh.load_state_dict(state, strict=True)
    images = as_torch(seeded_images(64, 64))
    network.eval()
    with torch.no_grad():
        assert torch.equal(fresh(images), network(images))


def test_our_timm_networks_are_timm_s_row_for_row():
    """Names, shapes and preprocessing of the registry against timm's own."""
    import timm

    from gcnet_jax.models import model_entry
    from tests.porting import peers

    for name in peers.TIMM:
        theirs = timm.data.resolve_data_config(
            {}, model=timm.create_model(name), use_test_size=True
        )
        ours = model_entry(name).preprocessing
        assert theirs['input_size'] == (3, ours.test_size, ours.test_size)
        assert (theirs['mean'], theirs['std']) == (ours.mean, ours.std)
        assert (theirs['interpolation'], theirs['crop_pct']) == (
            ours.interpolation,
            ours.crop_fraction,
        )
        assert timm.create_model(name).default_cfg['input_size'][1] == ours.train_size
        assert create_model(name).num_classes == 1000


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    """50 JPEGs: of the directory GCNET_IMAGES, or smooth noise of many sizes, some grey."""
    if 'GCNET_IMAGES' in os.environ:
        files = sorted(Path(os.environ['GCNET_IMAGES']).rglob('*.JPEG'))
        files = files[:: max(1, len(files) // 50)][:50]
    else:
        files = []
        generator = np.random.default_rng(SEED)
        for index in range(50):
            width, height = generator.integers(180, 420, size=2).tolist()
            channels = () if index % 10 == 0 else (3,)
            coarse = generator.integers(0, 256, size=(9, 13, *channels), dtype=np.uint8)
            file = tmp_path_factory.getbasetemp() / f'photograph_{index}.JPEG'
            smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
            smooth.save(file, quality=90)
            files.append(file)
    assert len(files) == 50
    return files


@pytest.mark.parametrize('name', ['gcresnext26ts', 'gc_efficientnetv2_rw_t'])
@pytest.mark.parametrize('crop', ['test', 'train'])
def test_preprocessing_is_timm_s(name, crop, photographs):
    import timm
    import torch

    from gcnet_jax.data.decode import decode
    from gcnet_jax.data.preprocess import resize_and_crop
    from gcnet_jax.models import model_entry

    network = timm.create_model(name)
    settings = timm.data.resolve_data_config({}, model=network, use_test_size=crop == 'test')
    transform = timm.data.create_transform(**settings)
    theirs = torch.stack(
        [transform(Image.open(file).convert('RGB')) for file in photographs]
    ).numpy()
    preprocessing = model_entry(name).preprocessing
    size, fraction = preprocessing.test_size, preprocessing.crop_fraction
    if crop == 'train':
        size, fraction = preprocessing.train_size, settings['crop_pct']
    images = np.stack(
        [
            resize_and_crop(decode(f.read_bytes()), size, fraction, preprocessing.interpolation)
            for f in photographs
        ]
    )
    mean, std = np.array(preprocessing.mean), np.array(preprocessing.std)
    grey_levels = (theirs.transpose(0, 2, 3, 1) * std + mean) * 255
    away = np.abs(images - grey_levels)
    print(f'95th percentile {np.percentile(away, 95):.4f}, largest {away.max():.4f} grey levels')
    assert np.percentile(away, 95) <= 1
    if crop == 'train':
        return

    weights = seeded_tensors({k: tuple(v.shape) for k, v in network.state_dict().items()}, SEED)
    network.load_state_dict({k: torch.tensor(v) for k, v in weights.items()})
    normalised = ((images / 255.0 - mean) / std).astype(np.float32)
    with torch.no_grad():
        answers = [network.eval()(torch.tensor(x)).argmax(1).numpy() for x in split(theirs)]
        ours = [network(as_torch(x)).argmax(1).numpy() for x in split(normalised)]
    np.testing.assert_array_equal(np.concatenate(ours), np.concatenate(answers))


def split(batch):
    return np.array_split(batch, 5)


@pytest.mark.parametrize('wrapped', [False, True])
def test_the_command_line_there_and_back(tmp_path, capsys, wrapped):
    """A .pth that torch wrote, through `port` and `port --reverse`, into torchvision again."""
    import torch
    import torchvision

    from gcnet_jax.__main__ import main

    network = torchvision.models.resnet18(num_classes=7)
    state = network.state_dict()
    content = {
        'state_dict': {f'module.{key}': torch.zeros_like(value) for key, value in state.items()},
        'state_dict_ema': {f'module.{key}': value.bfloat16() for key, value in state.items()},
    }
    path, directory, back = tmp_path / 'a.pth', tmp_path / 'ours', tmp_path / 'back.safetensors'
    torch.save(content if wrapped else state, path)
    assert main(['port', str(path), '--out', str(directory)]) == 0
    assert ('state_dict_ema' in capsys.readouterr().out) == wrapped
    arguments = ['--family', 'torchvision', '--out', str(back)]
    assert main(['port', '--reverse', str(directory), *arguments]) == 0
    tensors = {key: torch.tensor(value) for key, value in load_file(back).items()}
    torchvision.models.resnet18(num_classes=7).load_state_dict(tensors, strict=True)
    for key, value in state.items():
        expected = value.bfloat16().float() if wrapped and value.is_floating_point() else value
        assert torch.equal(tensors[key], expected), key


def test_the_command_line_refuses_code_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    import torch

    from gcnet_jax.__main__ import main

    monkeypatch.setenv('GCNET_EXPLOIT', str(tmp_path / 'ran'))
    path = tmp_path / 'a.pth'
    torch.save({'state_dict': {'conv1.weight': torch.ones(1)}, 'meta': Exploit()}, path)
    assert main(['port', str(path), '--out', str(tmp_path / 'out')]) == 1
    error = capsys.readouterr().err
    assert 'mkdir, which could run code' in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [path]


class Exploit:
    def __reduce__(self):
        return os.mkdir, (os.environ['GCNET_EXPLOIT'],)
