"""RandAugment and colour jitter against numpy, and against torchvision's own operations."""

import numpy as np
import pytest
from PIL import Image

from gcnet_jax.data.color import (
    RANDAUGMENT,
    ColorOptions,
    apply_operation,
    augment_color,
    strength,
    turn_hue,
)

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
# Neighbours are alike, as in a photograph, and the range is not full.
SMOOTH = np.add.outer(np.arange(40) * 3, np.arange(24) * 4)[..., None] + np.array([5, 20, 30])
SMOOTH = SMOOTH.astype(np.uint8)
GREY = np.array([299, 587, 114]) / 1000


def apply(name, amount, pixels=PIXELS):
    return np.asarray(apply_operation(Image.fromarray(pixels), name, amount))


def test_strengths_are_those_of_the_paper_and_torchvision():
    assert strength('identity', 30, 10, 20) == 0
    assert strength('shear_x', 30, 10, 20) == pytest.approx(0.3)
    assert strength('translate_x', 30, 331, 662) == pytest.approx(300)
    assert strength('translate_y', 15, 331, 662) == pytest.approx(75)
    assert strength('rotate', 10, 10, 20) == pytest.approx(10)
    assert strength('contrast', 10, 10, 20) == pytest.approx(0.3)
    assert [strength('posterize', m, 1, 1) for m in (0, 4, 11, 12, 30)] == [8, 7, 7, 6, 4]
    assert strength('solarize', 0, 1, 1) == 255
    assert strength('solarize', 30, 1, 1) == 0


def test_colours_follow_their_definitions():
    values = PIXELS.astype(float)
    for amount in (-0.4, 0.7):
        expected = np.clip(values * (1 + amount), 0, 255)
        assert np.abs(apply('brightness', amount) - expected).max() <= 1
        grey = (values @ GREY)[..., None]
        expected = np.clip(grey + (1 + amount) * (values - grey), 0, 255)
        assert np.abs(apply('saturation', amount) - expected).max() <= 2
        mean = grey.mean()
        expected = np.clip(mean + (1 + amount) * (values - mean), 0, 255)
        assert np.abs(apply('contrast', amount) - expected).max() <= 2
    np.testing.assert_array_equal(apply('posterize', 3), PIXELS & 0b11100000)
    expected = np.where(PIXELS < 100, PIXELS, 255 - PIXELS)
    np.testing.assert_array_equal(apply('solarize', 100), expected)
    for channel in range(3):
        stretched = apply('autocontrast', 0, SMOOTH)[..., channel]
        assert (stretched.min(), stretched.max()) == (0, 255)


def test_shifts_and_shears_move_pixels_and_fill_with_black():
    for amount in (4.7, -4.7):
        moved = np.roll(PIXELS, int(amount), axis=1)
        moved[:, slice(0, 4) if amount > 0 else slice(-4, None)] = 0
        np.testing.assert_array_equal(apply('translate_x', amount), moved)
        moved = np.roll(PIXELS, int(amount), axis=0)
        moved[slice(0, 4) if amount > 0 else slice(-4, None)] = 0
        np.testing.assert_array_equal(apply('translate_y', amount), moved)
    sheared = apply('shear_x', 0.2)
    for row in (0, 9, 19):
        columns = np.floor(np.arange(30) + 0.5 + 0.2 * (row + 0.5)).astype(int)
        inside = columns < 30
        np.testing.assert_array_equal(sheared[row, inside], PIXELS[row, columns[inside]])
        assert not sheared[row, ~inside].any()
    turned = apply('shear_y', 0.2, PIXELS.transpose(1, 0, 2))
    np.testing.assert_array_equal(turned, sheared.transpose(1, 0, 2))
    square = PIXELS[:, :20]
    np.testing.assert_array_equal(apply('rotate', 90, square), np.rot90(square))


def test_hue_turns_red_to_green_and_back():
    red = Image.new('RGB', (2, 2), (250, 0, 0))
    green = np.asarray(turn_hue(red, 1 / 3))[0, 0]
    assert green[1] > 240
    assert green[[0, 2]].max() < 15
    np.testing.assert_array_equal(np.asarray(turn_hue(red, 0.0)), np.asarray(red))
    assert np.asarray(turn_hue(red, -0.5))[0, 0, 1:].min() > 240  # Cyan.


@pytest.mark.parametrize(
    'options',
    [
        ColorOptions(randaugment_ops=2),
        ColorOptions(jitter=0.4),
        ColorOptions(hue_jitter=0.1),
        ColorOptions(randaugment_ops=1, randaugment_magnitude=30, jitter=2.0, hue_jitter=0.5),
    ],
)
def test_the_result_is_a_function_of_the_generator(options):
    results = [
        augment_color(SMOOTH, np.random.default_rng(seed), options) for seed in (1, 1, 2, 3, 4)
    ]
    np.testing.assert_array_equal(results[0], results[1])
    assert len({result.tobytes() for result in results}) >= 3
    for result in results:
        assert (result.shape, result.dtype) == (SMOOTH.shape, np.uint8)


def test_off_changes_neither_the_image_nor_the_generator():
    rng = np.random.default_rng(0)
    assert augment_color(PIXELS, rng, ColorOptions(randaugment_magnitude=30)) is PIXELS
    assert rng.random() == np.random.default_rng(0).random()


def test_jitter_is_even_within_its_bounds():
    grey = np.full((2, 2, 3), 100, np.uint8)
    options, rng = ColorOptions(jitter=0.5), np.random.default_rng(0)
    # A grey image of one colour has neither contrast nor saturation: brightness is left.
    values = [augment_color(grey, rng, options)[0, 0, 0] for _ in range(300)]
    assert min(values) >= 49
    assert max(values) <= 151
    assert np.std(values) == pytest.approx(100 / np.sqrt(12), rel=0.1)


def test_every_operation_and_both_signs_are_drawn():
    rng, seen = np.random.default_rng(0), set()
    options = ColorOptions(randaugment_ops=1)
    possible = {}
    for name in RANDAUGMENT:
        amount = strength(name, 9, *SMOOTH.shape[:2])
        for sign in (1, -1) if name in RANDAUGMENT[1:10] else (1,):
            possible[apply(name, sign * amount, SMOOTH).tobytes()] = name, sign
    for _ in range(400):
        seen.add(possible[augment_color(SMOOTH, rng, options).tobytes()])
    assert seen == set(possible.values())


@pytest.mark.torch
@pytest.mark.parametrize('pixels', [PIXELS, SMOOTH], ids=['noise', 'smooth'])
@pytest.mark.parametrize('magnitude', [1, 9, 17, 30])
def test_operations_are_torchvisions(pixels, magnitude):
    from torchvision.transforms import InterpolationMode, autoaugment, functional

    names = {
        'identity': 'Identity',
        'shear_x': 'ShearX',
        'shear_y': 'ShearY',
        'translate_x': 'TranslateX',
        'translate_y': 'TranslateY',
        'saturation': 'Color',
        'autocontrast': 'AutoContrast',
    }
    image = Image.fromarray(pixels)
    height, width = pixels.shape[:2]
    space = autoaugment.RandAugment()._augmentation_space(31, (height, width))
    assert {names.get(name, name.capitalize()) for name in RANDAUGMENT} == set(space)
    for name in RANDAUGMENT:
        theirs = names.get(name, name.capitalize())
        magnitudes, signed = space[theirs]
        wanted = float(magnitudes[magnitude]) if magnitudes.ndim else 0.0
        amount = strength(name, magnitude, height, width)
        assert amount == pytest.approx(wanted, rel=1e-6)
        assert signed == (name in RANDAUGMENT[1:10])
        for sign in (1, -1) if signed else (1,):
            expected = autoaugment._apply_op(
                image, theirs, sign * wanted, InterpolationMode.NEAREST, None
            )
            result = apply_operation(image, name, sign * amount)
            differ = np.any(np.asarray(result) != np.asarray(expected), axis=-1)
            # The sine of an angle and its slope differ in the last bit, at the edge of a pixel.
            assert differ.mean() <= (0.02 if name.startswith('shear') else 0), name
    for turn in (-0.5, -0.1, 0.0, 0.2, 0.5):
        np.testing.assert_array_equal(
            np.asarray(turn_hue(image, turn)), np.asarray(functional.adjust_hue(image, turn))
        )
