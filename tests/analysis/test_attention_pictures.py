"""From a checkpoint and image files to pictures, through the command line."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from gcnet_jax.__main__ import main
from gcnet_jax.analysis import attention_maps, attention_pictures, query_distances
from gcnet_jax.analysis.attention_pictures import write_pictures
from gcnet_jax.data.preprocessing import Preprocessing
from gcnet_jax.inference.detector import Detector
from gcnet_jax.stored import ModelDescription, write_ported

PREPROCESSING = Preprocessing(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25), test_size=16)


def place(block, stages):
    return {'block': block, 'stages': stages, 'position': 'after_conv2'}


def description(context, **options):
    return ModelDescription(
        'gccnn',
        {'num_classes': 3, 'widths': [8, 8], 'stage_sizes': [2, 1], 'context': context, **options},
        ('ant', 'bee', 'cat'),
        PREPROCESSING,
    )


@pytest.fixture(scope='module')
def store(tmp_path_factory, random_variables):
    """A function from a description to the directory of a checkpoint, and its variables."""

    def write(stored):
        directory = tmp_path_factory.mktemp('stored') / 'network'
        variables = random_variables(
            stored.build(), np.zeros((1, 16, 16, 3), np.float32), train=False
        )
        write_ported(directory, stored, variables)
        return directory, variables

    return write


@pytest.fixture(scope='module')
def both(store):
    """A network with a map an image in both stages and one non-local block."""
    stored = description([place('global_context', [1, 2]), place('non_local', [2])])
    return stored, *store(stored)


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / 'images'
    folder.mkdir()
    for index in range(2):
        pixels = np.random.default_rng(index).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f'{index}.png')
    return folder


def normalised(path, size=16):
    """The whole image, scaled and its middle taken; independent of the package."""
    with Image.open(path) as image:
        shorter = int(size / 0.875)
        width = int(shorter * image.width / image.height)
        image = image.resize((width, shorter), Image.Resampling.BILINEAR)
    top, left = round((shorter - size) / 2), round((width - size) / 2)
    pixels = np.asarray(image)[top : top + size, left : left + size] / 255
    return ((pixels - PREPROCESSING.mean) / PREPROCESSING.std).astype(np.float32)[None]


def test_the_command_draws_every_image_of_a_folder(both, images, tmp_path, capsys):
    stored, directory, variables = both
    out = tmp_path / 'out'
    arguments = ['attention', '--checkpoint', str(directory), str(images), '--out', str(out)]
    assert main([*arguments, '--all-blocks', '--query', '0.1,0.9']) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        *('0_attention.png', '0_queries.png', '1_attention.png', '1_queries.png')
    ]
    first, second, title, header, row = capsys.readouterr().out.splitlines()
    model = stored.build()
    logits = np.asarray(model.apply(variables, normalised(images / '0.png'), train=False))[0]
    probabilities = np.exp(logits) / np.exp(logits).sum()
    label = stored.label_names[logits.argmax()]
    assert first.startswith(f'{images / "0.png"}: {label} {probabilities.max():.1%}: {out}')
    assert second.endswith(f'{out / "1_attention.png"}: {out / "1_queries.png"}')
    pixels = np.concatenate([normalised(images / f'{index}.png') for index in range(2)])
    (expected,) = query_distances(model, variables, pixels, train=False).values()
    assert title.endswith('of all pairs of positions; images: 2')
    assert header.split() == ['block', 'input', 'output', 'attention', 'attention', '(JS)']
    values = (
        *(expected.input, expected.output, expected.attention),
        expected.attention_divergence,
    )
    assert row.split() == [
        'stage2_0/context_after_conv2_1',
        *(f'{value:.2g}' for value in values),
    ]


def test_what_is_drawn_are_the_maps_of_what_the_network_gets(both, images, monkeypatch):
    stored, directory, variables = both
    seen = []
    monkeypatch.setattr(
        'gcnet_jax.analysis.attention_pictures.draw_attention',
        lambda image, maps, **options: seen.append((image, maps, options)),
    )
    monkeypatch.setattr(
        'gcnet_jax.analysis.attention_pictures.draw_queries',
        lambda image, maps, **options: seen.append((image, maps, options)),
    )
    monkeypatch.setattr('gcnet_jax.analysis.attention_pictures.save_figure', lambda *_: None)
    list(write_pictures(directory, images / '1.png', images, size=12, queries=[(0.0, 1.0)]))
    inputs = normalised(images / '1.png', size=12)
    maps = attention_maps(stored.build(), variables, inputs, train=False)
    (image, single, _), (_, many, options) = seen
    assert image.shape == (12, 12, 3)
    pixels = (image / 255 - PREPROCESSING.mean) / PREPROCESSING.std
    np.testing.assert_allclose(pixels, inputs[0], atol=1e-5)
    assert sorted(single) == [
        f'stage{name}/context_after_conv2_0/pool' for name in ('1_0', '1_1', '2_0')
    ]
    assert list(many) == ['stage2_0/context_after_conv2_1']
    for path, attention in {**single, **many}.items():
        np.testing.assert_allclose(attention, maps[path][0], rtol=1e-3, atol=1e-6)
    assert options['queries'] == [(0.0, 1.0)]


def test_images_need_not_be_square(both, images, tmp_path, monkeypatch):
    stored, directory, variables = both
    seen = []
    draw = attention_pictures.draw_attention

    def watched(image, maps, **options):
        seen.append((image, maps))
        return draw(image, maps, **options)

    monkeypatch.setattr(attention_pictures, 'draw_attention', watched)
    arguments = ['--checkpoint', str(directory), str(images / '1.png'), '--out', str(tmp_path)]
    assert main(['attention', *arguments, '--size', '12x20']) == 0
    assert len(list(tmp_path.glob('1_*.png'))) == 2
    ((image, maps),) = seen
    assert image.shape == (12, 20, 3)
    inputs = ((image / 255 - PREPROCESSING.mean) / PREPROCESSING.std).astype(np.float32)
    expected = attention_maps(stored.build(), variables, inputs[None], train=False)
    for path, attention in maps.items():
        np.testing.assert_allclose(attention, expected[path][0], rtol=1e-3, atol=1e-6)


def test_a_bad_image_is_named_and_the_others_are_drawn(both, images, tmp_path, capsys):
    (images / '0b.png').write_bytes(b'nonsense')
    out = tmp_path / 'out'
    arguments = ['attention', '--checkpoint', str(both[1]), '--out', str(out)]
    assert main([*arguments, str(images), str(images / 'missing.png')]) == 3
    captured = capsys.readouterr()
    errors = captured.err.splitlines()
    assert len(errors) == 2
    assert errors[0].startswith(f'gcnet_jax attention: {images / "0b.png"}: not an image')
    assert 'missing.png' in errors[1]
    assert len(list(out.iterdir())) == 4
    assert main([*arguments, str(images / '0b.png')]) == 1


def test_images_of_one_name_get_pictures_of_their_own(both, images, tmp_path):
    other = tmp_path / 'other'
    other.mkdir()
    (other / '0.png').write_bytes((images / '0.png').read_bytes())
    drawn = list(write_pictures(both[1], [images / '0.png', other / '0.png'], tmp_path / 'out'))
    assert [result.files[0].name for _, result in drawn] == ['0_attention.png', '0_2_attention.png']


def test_pictures_never_replace_the_images(both, images):
    before = (images / '0.png').read_bytes()
    list(write_pictures(both[1], images / '0.png', images))
    assert (images / '0.png').read_bytes() == before


def test_a_backbone_is_drawn_without_a_prediction(store, images, tmp_path):
    directory, _ = store(description([place('global_context', [1])], num_classes=0))
    ((_, drawn),) = write_pictures(directory, images / '0.png', tmp_path)
    assert drawn.prediction == ''
    assert drawn.distances == {}
    assert [path.name for path in drawn.files] == ['0_attention.png']


def test_a_network_without_attention_is_refused(store, images, tmp_path, capsys):
    directory, _ = store(description(None))
    arguments = ['attention', '--checkpoint', str(directory), '--out', str(tmp_path / 'out')]
    assert main([*arguments, str(images)]) == 1
    assert 'ResNet holds no block that attends' in capsys.readouterr().err


@pytest.mark.slow
def test_a_detectors_maps_are_drawn_without_the_padding(
    stored_detector, make, tmp_path, monkeypatch, quick_compilation
):
    drawn = []
    draw = attention_pictures.draw_attention

    def watched(image, maps, **options):
        drawn.append((image, maps, options))
        return draw(image, maps, **options)

    monkeypatch.setattr(attention_pictures, 'draw_attention', watched)
    (tmp_path / 'a.png').write_bytes(make.encode(make.picture(3, 50, 60)))
    arguments = ['attention', '--checkpoint', str(stored_detector.directory)]
    assert main([*arguments, str(tmp_path / 'a.png'), '--out', str(tmp_path / 'out')]) == 0
    assert [path.name for path in (tmp_path / 'out').iterdir()] == ['a_attention.png']
    ((image, maps, options),) = drawn
    assert (image.shape, options['shown']) == ((64, 96, 3), (64, 77))

    detector = Detector.load(stored_detector.directory, devices=stored_detector.one_device)
    description = stored_detector.description
    settings = description.preprocessing
    inputs = detector.load_image(tmp_path / 'a.png')
    pixels = (inputs['image'] / 255 - settings.mean) / settings.std
    pixels[:, 77:] = 0
    expected = attention_maps(
        description.build().backbone,
        {name: tree['backbone'] for name, tree in stored_detector.variables.items()},
        pixels[None].astype(np.float32),
        train=False,
    )
    assert sorted(maps) == sorted(expected)
    assert all(path.startswith('stage') for path in maps)
    for path, attention in maps.items():
        np.testing.assert_allclose(attention, expected[path][0], rtol=1e-3, atol=1e-6)

    inside = [np.clip(77 / 96 * n - np.arange(n), 0, 1) for n in (12, 6, 3)]
    shares = [
        1 - attention[0].sum(0) @ inside[(12, 6, 3).index(attention.shape[2])]
        for attention in expected.values()
    ]
    found = detector(tmp_path / 'a.png')
    best = ', '.join(f'{found.labels[i]} {found.scores[i]:.2f}' for i in range(3))
    assert options['title'] == (
        f'a.png: {best}; padding, 20% of the input, gets up to {max(shares):.0%} of the attention'
    )


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--size', '0'], 'size must be 1 or more, got 0'),
        (['--query', '0.5,2'], 'from 0 to 1, such as 0.5,0.25; got 0.5,2'),
        (['--checkpoint', '/does/not/exist'], '/does/not/exist: no such directory'),
    ],
)
def test_options_that_cannot_be_are_one_line(both, images, tmp_path, capsys, flags, message):
    arguments = ['attention', '--checkpoint', str(both[1]), '--out', str(tmp_path / 'out')]
    assert main([*arguments, str(images), *flags]) == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count('\n') == 1


def test_an_output_that_is_a_file_is_one_line(both, images, tmp_path, capsys):
    (tmp_path / 'file').touch()
    arguments = ['attention', '--checkpoint', str(both[1]), '--out', str(tmp_path / 'file')]
    assert main([*arguments, str(images)]) == 1
    assert 'cannot make the directory' in capsys.readouterr().err


@pytest.mark.parametrize('window', [None, 24])
def test_a_segmenters_title_has_its_labels(stored_segmenter, make, tmp_path, window):
    stored = stored_segmenter.description
    options = {**stored.options, 'window': window, 'window_stride': window}
    write_ported(
        tmp_path / 'network',
        dataclasses.replace(stored, options=options),
        stored_segmenter.variables,
    )
    (tmp_path / 'a.png').write_bytes(make.encode(make.picture(0, 32, 48)))
    pictures = write_pictures(tmp_path / 'network', tmp_path / 'a.png', tmp_path / 'out')
    ((_, drawn),) = pictures
    assert any(f'{label} ' in drawn.prediction for label in ('ant', 'bee', 'cat'))
    assert ('from windows' in drawn.prediction) == (window is not None)
    assert [file.name for file in drawn.files] == ['a_attention.png']
