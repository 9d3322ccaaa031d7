"""Every published configuration against mmsegmentation's own network, with fresh weights every run.

GCNET_SEED repeats a run; pytest prints the seed of one that fails. Each part gets what the previous
one of mmsegmentation gave, and then all parts run one after the other, on whole images and in
windows of odd sizes.
"""

import os
import secrets

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcnet_jax.context import GlobalContext
from gcnet_jax.data import keep_ratio
from gcnet_jax.data.on_device import normalize
from gcnet_jax.data.preprocessing import KeepRatio
from gcnet_jax.data.segmentation_labels import LABEL_SETS
from gcnet_jax.inference.segmenter import Segmenter
from gcnet_jax.models.fcn_head import ConvNormReLU
from gcnet_jax.ops.resize import resize_bilinear
from gcnet_jax.porting import port, port_reverse
from gcnet_jax.porting.files import TorchFile
from gcnet_jax.porting.published_segmenters import check_told, choose_row, sources_of
from gcnet_jax.porting.tensors import LazyTensors
from gcnet_jax.stored import load_variables
from gcnet_jax.tasks.confusion import iou, summary
from gcnet_jax.tasks.segmentation import confusion_matrices
from tests.porting.detector_weights import detector_image, detector_weights
from tests.porting.segmenter_configs import CONFIGS

pytestmark = pytest.mark.mmsegmentation

SEED = int(os.environ.get('GCNET_SEED', secrets.randbelow(10**6)))
LIMITS = (97, 65)
WINDOWS = (47, 29)
# One that is smaller than what the network reads, and one that is larger.
SMALL, LARGE = (49, 73), (91, 137)
MAPS = {f'stage{k - 1}': f'c{k}' for k in range(2, 6)}
PLAIN = 'fcn/fcn_r50-d8_4xb2-40k_cityscapes-769x769'


class Pair:
    """mmsegmentation's network, and ours that its file was ported to."""

    def __init__(self, config, directory):
        import torch

        from tests.porting import mmsegmentation_peer as peer

        self.model, self.peer, self.directory = peer.build(config), peer, directory
        self.config = config
        shapes = {name: tuple(value.shape) for name, value in self.model.state_dict().items()}
        peer.load(self.model, detector_weights(shapes, SEED))
        path = directory / f'{config.rpartition("/")[2]}.pth'
        torch.save({'meta': {'epoch': 12}, 'state_dict': self.model.state_dict()}, path)
        self.description, self.report = port(path, directory / 'ours')
        path.unlink()
        self.network = self.description.build()
        self.variables = jax.tree.map(jnp.asarray, load_variables(directory / 'ours')[1])
        self._compiled = {}

    def compute(self, name, function, *arguments):
        """A function of the variables and arrays, compiled once for a short compilation."""
        key = name, *(np.shape(argument) for argument in arguments)
        if key not in self._compiled:
            lowered = jax.jit(function).lower(self.variables, *arguments)
            options = {'xla_backend_optimization_level': 0}
            self._compiled[key] = lowered.compile(compiler_options=options)
        return self._compiled[key](self.variables, *arguments)

    def theirs(self, size, windows):
        image = detector_image(*size, SEED)
        return image, self.peer.run(self.model, image, LIMITS, windows)

    def ours(self, windows):
        window, stride = windows or (None, None)
        return self.network.clone(window=window, window_stride=stride)


@pytest.fixture(scope='module', params=[*CONFIGS, PLAIN], ids=lambda name: name.rpartition('/')[2])
def pair(request, tmp_path_factory):
    print(f'GCNET_SEED={SEED}')
    pair = Pair(request.param, tmp_path_factory.mktemp('pair'))
    # Its name tells whether windows are used.
    expected = CONFIGS.get(request.param, 'fcn_resnet50_d8_cityscapes_769')
    assert (pair.description.name, pair.description.task) == (expected, 'segmentation')
    data_set = expected.removesuffix('_769').rpartition('_')[2]
    assert pair.description.label_names == LABEL_SETS[data_set].names
    assert not pair.report.initialised
    assert not pair.report.warnings
    return pair


def close(ours, theirs):
    """The largest difference over the largest value."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def check(differences):
    print({name: f'{value:.1e}' for name, value in differences.items()})
    assert max(differences.values()) < 1e-5, differences


def prepared(image):
    preprocessing = KeepRatio(short_side=LIMITS[1], long_side=LIMITS[0], multiple_of=1)
    size = keep_ratio.resized_shape(*image.shape[:2], preprocessing)
    resized = jnp.asarray(keep_ratio.resize(image, size))[None]
    return normalize(resized, preprocessing.mean, preprocessing.std)


def same_labels(logits, theirs):
    """Asserts that labels are the same wherever the two best logits differ by more than 1e-4."""
    best = np.sort(theirs['original_logits'], axis=-1)
    is_clear = best[..., -1] - best[..., -2] > 1e-4
    labels = np.asarray(logits).argmax(-1)
    np.testing.assert_array_equal(labels[is_clear], theirs['labels'][is_clear])
    print(f'{(labels != theirs["labels"]).sum()} of {labels.size} labels differ', end=', ')
    print(f'{(~is_clear).sum()} are nearly ties')
    assert is_clear.mean() > 0.99
    assert len(np.unique(labels)) > 5


def head_parts(pair):
    """The head of a module, with the outputs of its layers by their names."""

    def apply(variables, features):
        def head(module, features):
            return module.head(features, train=False)

        logits, state = pair.network.apply(
            variables,
            features,
            method=head,
            capture_intermediates=lambda module, _: isinstance(
                module, (GlobalContext, ConvNormReLU)
            ),
            mutable='intermediates',
        )
        inner = state['intermediates']['head']
        kept = {name: values['__call__'][0] for name, values in inner.items()}
        return kept | {'logits': logits}

    return apply


@pytest.mark.parametrize(('size', 'windows'), [(SMALL, None), (LARGE, WINDOWS)])
def test_each_part_given_what_the_one_before_gave_there(pair, size, windows):
    image, kept = pair.theirs(size, windows)
    differences = {'input': close(prepared(image), kept['input'])}

    def backbone(variables, images):
        outputs = pair.network.apply(
            variables, images, method=lambda m, x: m.backbone.outputs(x, train=False)
        )
        return {theirs: outputs[name] for name, theirs in MAPS.items()}

    for window in kept['windows']:
        found = dict(pair.compute('backbone', backbone, window['input']))
        inner = pair.compute('head', head_parts(pair), window['c5'])
        found['head_logits'] = inner['logits']
        if 'context' in window:
            found |= {'context': inner['conv1'], 'context_output': inner['context']}
        found['logits'] = resize_bilinear(
            jnp.asarray(window['head_logits']),
            window['input'].shape[1:3],
            align_corners=pair.network.align_corners,
        )
        for name, value in found.items():
            differences[name] = max(differences.get(name, 0), close(value, window[name]))
    original = resize_bilinear(
        jnp.asarray(kept['logits']), size, align_corners=pair.network.align_corners
    )
    differences['original_logits'] = close(original[0], kept['original_logits'])
    check(differences)
    same_labels(original[0], kept)


@pytest.mark.parametrize(('size', 'windows'), [(SMALL, None), (LARGE, None), (LARGE, WINDOWS)])
def test_the_same_from_the_image_to_the_labels(pair, size, windows):
    image, kept = pair.theirs(size, windows)
    assert (len(kept['windows']) > 1) == (windows is not None)
    model = pair.ours(windows)

    def apply(variables, images):
        logits = model.apply(variables, images, train=False)
        return logits, resize_bilinear(logits, size, align_corners=model.align_corners)

    logits, original = pair.compute(f'all {windows}', apply, prepared(image))
    names = ('logits', 'original_logits')
    check(
        dict(zip(names, map(close, (logits, original[0]), (kept[n] for n in names)), strict=True))
    )
    same_labels(original[0], kept)


def test_the_segmenter_labels_a_file_as_mmsegmentation_does(pair):
    """With the windows of the network itself, which are larger than the image."""
    windows = (769, 513) if pair.network.window else None
    image, kept = pair.theirs(LARGE, windows)
    segmenter = Segmenter.load(pair.directory / 'ours', size=LIMITS[::-1])
    found = segmenter(image, probabilities=True)
    assert found.label_names == pair.description.label_names
    powers = np.exp(kept['original_logits'] - kept['original_logits'].max(-1, keepdims=True))
    expected = powers / powers.sum(-1, keepdims=True)
    assert np.abs(found.probabilities - expected).max() < 1e-4
    same_labels(np.eye(pair.network.num_classes)[found.labels], kept)


def test_the_way_back(pair):
    import torch

    port_reverse(pair.directory / 'ours', 'mmsegmentation', pair.directory / 'back.pth')
    loaded = torch.load(pair.directory / 'back.pth', weights_only=True)
    names = loaded['meta']['CLASSES']
    label_set = next(each for each in LABEL_SETS.values() if each.names == names)
    assert tuple(map(tuple, loaded['meta']['PALETTE'])) == label_set.palette
    before = {name: value.clone() for name, value in pair.model.state_dict().items()}
    for value in pair.model.state_dict().values():
        value.zero_()
    pair.model.load_state_dict(loaded['state_dict'], strict=True)
    for name, value in pair.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    meta = pair.peer.dataset_meta(pair.model.cfg, pair.directory / 'back.pth')
    assert tuple(meta['classes']) == names
    assert np.array_equal(meta['palette'], label_set.palette)
    (pair.directory / 'back.pth').unlink()
    # The config in the file makes the same network.
    again = pair.peer.build_text(loaded['meta']['cfg'], pair.model.cfg.test_pipeline)
    assert again.test_cfg == pair.peer.build(pair.config).test_cfg
    again.load_state_dict(loaded['state_dict'], strict=True)
    image, kept = pair.theirs(SMALL, WINDOWS)
    found = pair.peer.run(again, image, LIMITS, WINDOWS)
    np.testing.assert_array_equal(found['original_logits'], kept['original_logits'])


def test_the_config_in_a_file_chooses_the_network(pair):
    """As mmengine saves it, under any name of the file."""
    config = pair.peer.build(pair.config).cfg.pretty_text
    path = pair.directory / 'iter_40000.pth'
    sources = sources_of(TorchFile(path, LazyTensors({}), metadata={'meta': {'cfg': config}}))
    name, options, notes = choose_row(sources, pair.description.name.removesuffix('_769'), {})
    check_told(path, sources, name, options)
    assert (name, options, notes) == (pair.description.name, {}, ())


@pytest.mark.parametrize('classes', [19, 5])
def test_mean_iou_is_that_of_its_metric(classes):
    from tests.porting import mmsegmentation_peer as peer

    draw = np.random.default_rng(SEED)
    labels, predictions, confusion = [], [], 0
    for size in ((33, 47), (64, 20), (1, 7)):
        label = draw.integers(0, classes, size)
        # The last class is in neither, the one before in the predictions alone.
        label[label >= classes - 2] = 255
        noise = draw.integers(0, classes - 1, size)
        prediction = np.where((label < 255) & (draw.random(size) < 0.6), label, noise)
        counted = confusion_matrices(label[None], prediction[None], classes)
        confusion = confusion + np.asarray(counted[0], np.int64)
        labels.append(label)
        predictions.append(prediction)
    expected = peer.mean_iou(labels, predictions, [f'class {n}' for n in range(classes)])
    each = 100 * iou(confusion)
    np.testing.assert_allclose(each, expected['IoU'] * 100, rtol=1e-6)
    assert np.isnan(each[-1])
    assert each[-2] == 0
    found = summary(confusion)
    for ours, theirs in (('miou', 'mIoU'), ('pixel_accuracy', 'aAcc'), ('mean_accuracy', 'mAcc')):
        assert 100 * found[ours] == pytest.approx(expected[theirs], abs=0.00501)
