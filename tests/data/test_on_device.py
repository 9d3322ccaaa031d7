"""Augmentation on the device, against numpy and against its own definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gcnet_jax.data import on_device

BATCH, SIZE, CLASSES = 8, 12, 5


@pytest.fixture
def batch():
    """Images whose values tell where they come from, and one-hot labels."""
    images = np.arange(BATCH * SIZE * SIZE * 3, dtype=np.float32).reshape(BATCH, SIZE, SIZE, 3)
    targets = np.eye(CLASSES, dtype=np.float32)[np.arange(BATCH) % CLASSES]
    return images, targets


def keys(count):
    return jax.random.split(jax.random.key(0), count)


def test_normalize_is_the_definition():
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = (images.astype(np.float64) / 255 - mean) / std
    result = on_device.normalize(images, mean, std)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, expected, atol=1e-6)
    low = on_device.normalize(images, mean, std, jnp.bfloat16)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_array_equal(low, result.astype(jnp.bfloat16))  # Rounded once, at the end.


def mixup(key, images, targets, alpha):
    return on_device.mix(key, images, targets, alpha, 0.0)


def cutmix(key, images, targets, alpha):
    return on_device.mix(key, images, targets, 0.0, alpha)


def test_mixup_mixes_images_and_labels_by_the_same_share(batch):
    images, targets = batch
    mixed, labels = jax.jit(mixup, static_argnums=3)(keys(1)[0], images, targets, 0.8)
    # The share of the first image itself, read off the result.
    share = float(
        (mixed[0, 0, 0, 0] - images[-1, 0, 0, 0]) / (images[0, 0, 0, 0] - images[-1, 0, 0, 0])
    )
    assert 0 < share < 1
    np.testing.assert_allclose(mixed, share * images + (1 - share) * images[::-1], rtol=1e-5)
    np.testing.assert_allclose(labels, share * targets + (1 - share) * targets[::-1], atol=1e-6)


@pytest.mark.parametrize('alpha', [0.2, 1.0, 3.0])
def test_mixup_shares_follow_the_beta_distribution(alpha):
    images, targets = jnp.zeros((2, 1, 1, 1)), jnp.eye(2)
    draw = jax.jit(jax.vmap(lambda key: mixup(key, images, targets, alpha)[1][0, 0]))
    shares = draw(keys(4000))
    assert abs(shares.mean() - 0.5) < 0.03
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(shares.var() / variance - 1) < 0.1
    # Beyond the moments: the share of draws in each tenth.
    expected = np.diff(scipy.stats.beta(alpha, alpha).cdf(np.linspace(0, 1, 11)))
    np.testing.assert_allclose(np.histogram(shares, 10, (0, 1))[0] / 4000, expected, atol=0.03)


def test_cutmix_replaces_one_rectangle_and_labels_follow_its_pixels(batch):
    images, targets = batch
    cut = jax.jit(cutmix, static_argnums=3)
    areas = set()
    for key in keys(20):
        mixed, labels = (np.asarray(value) for value in cut(key, images, targets, 1.0))
        own, partner = mixed == images, mixed == images[::-1]
        assert (own | partner).all()
        replaced = ~own[0, :, :, 0]
        assert (own == ~replaced[None, :, :, None]).all()  # The same in all images and channels.
        rows, columns = np.flatnonzero(replaced.any(axis=1)), np.flatnonzero(replaced.any(axis=0))
        assert replaced.sum() == len(rows) * len(columns)
        if len(rows):
            assert np.ptp(rows) + 1 == len(rows)
            assert np.ptp(columns) + 1 == len(columns)
        share = 1 - replaced.mean()
        np.testing.assert_allclose(labels, share * targets + (1 - share) * targets[::-1], atol=1e-6)
        areas.add(int(replaced.sum()))
    assert len(areas) > 8


def test_cutmix_rectangles_follow_the_distribution():
    """Beta(1, 1) is even, so before clipping the replaced share is too."""
    height, width = 48, 80
    images = jnp.stack([jnp.zeros((height, width, 1)), jnp.ones((height, width, 1))])

    @jax.jit
    @jax.vmap
    def draw(key):
        return cutmix(key, images, jnp.eye(2), 1.0)[0][0, :, :, 0]

    replaced = np.asarray(draw(keys(3000)))
    rng = np.random.default_rng(0)
    expected = np.zeros((3000, height, width))
    for box in expected:  # timm's rand_bbox
        side = np.sqrt(1 - rng.beta(1, 1))
        rows, columns = int(height * side) // 2, int(width * side) // 2
        y, x = rng.integers(0, height), rng.integers(0, width)
        box[max(y - rows, 0) : y + rows, max(x - columns, 0) : x + columns] = 1
    quartiles = (np.quantile(x.mean(axis=(1, 2)), [0.25, 0.5, 0.75]) for x in (replaced, expected))
    np.testing.assert_allclose(*quartiles, atol=0.03)
    np.testing.assert_allclose(replaced.mean(axis=0), expected.mean(axis=0), atol=0.06)


def test_nothing_happens_at_zero(batch):
    images, targets = batch
    for function in (mixup, cutmix):
        same = function(keys(1)[0], images, targets, 0.0)
        assert same[0] is images
        assert same[1] is targets
    same = on_device.mix(keys(1)[0], images, targets, 0.0, 0.0)
    assert same[0] is images
    assert same[1] is targets


def test_mix_chooses_either_half_of_the_time(batch):
    images, targets = batch
    draw = jax.jit(jax.vmap(lambda key: on_device.mix(key, images, targets, 5.0, 5.0)))
    mixed, labels = draw(keys(400))
    copied = np.asarray((mixed == images) | (mixed == images[::-1])).all(axis=(1, 2, 3, 4))
    assert abs(copied.mean() - 0.5) < 0.08
    np.testing.assert_allclose(labels.sum(axis=-1), 1, atol=1e-6)


def test_bfloat16_images_stay_bfloat16(batch):
    images, targets = jnp.asarray(batch[0], jnp.bfloat16), batch[1]
    mix = jax.jit(on_device.mix, static_argnums=(3, 4))
    mixed, labels = mix(keys(1)[0], images, targets, 0.5, 0.5)
    assert (mixed.dtype, labels.dtype) == (jnp.bfloat16, jnp.float32)
    erase = jax.jit(on_device.random_erasing, static_argnums=2)
    assert erase(keys(1)[0], images, 0.5).dtype == jnp.bfloat16


def test_erasing_clears_one_rectangle_of_some_images():
    images = jnp.ones((2000, 32, 48, 3))
    erase = jax.jit(lambda key: on_device.random_erasing(key, images, 0.25, noise=False))
    result = np.asarray(erase(keys(1)[0]))
    erased = result[..., 0] == 0
    assert set(np.unique(result)) == {0, 1}
    assert (result == result[..., :1]).all()
    touched = erased.any(axis=(1, 2))
    assert abs(touched.mean() - 0.25) < 0.03
    rows, columns = erased.any(axis=2).sum(axis=1), erased.any(axis=1).sum(axis=1)
    assert (erased.sum(axis=(1, 2)) == rows * columns).all()
    shares = (rows * columns / (32 * 48))[touched]
    assert 0.015 < shares.min() < 0.04
    assert 0.3 < shares.max() < 0.35
    assert abs(shares.mean() - (0.02 + 1 / 3) / 2) < 0.02
    ratios = np.log((rows / np.maximum(columns, 1))[touched])
    assert np.abs(ratios).max() < np.log(1 / 0.3) + 0.35
    edges = erased[touched].mean(axis=0)
    assert edges[0].sum() > 0  # The rectangle may touch every edge.
    assert edges[-1].sum() > 0
    assert edges[:, 0].sum() > 0
    assert edges[:, -1].sum() > 0


def test_erased_rectangles_are_even_in_area_aspect_and_place():
    height, width = 60, 90
    images = jnp.ones((4000, height, width, 1))
    erase = jax.jit(
        lambda key: on_device.random_erasing(
            key, images, 1.0, area=(0.05, 0.15), aspect=(0.5, 2.0), noise=False
        )
    )
    erased = np.asarray(erase(keys(1)[0]))[..., 0] == 0
    in_rows, in_columns = erased.any(axis=2), erased.any(axis=1)
    rows, columns = in_rows.sum(axis=1), in_columns.sum(axis=1)
    for values, low, high in [
        (rows * columns / (height * width), 0.05, 0.15),
        (np.log(rows / columns), np.log(0.5), np.log(2.0)),
        (in_rows.argmax(axis=1) / (height - rows), 0, 1),
        (in_columns.argmax(axis=1) / (width - columns), 0, 1),
    ]:
        quantiles = np.quantile((values - low) / (high - low), [0.01, 0.25, 0.5, 0.75, 0.99])
        np.testing.assert_allclose(quantiles, [0.01, 0.25, 0.5, 0.75, 0.99], atol=0.04)
    # Every place that leaves the rectangle inside is equally likely, those at the edges too.
    for inside, places in [(in_rows, height - rows + 1), (in_columns, width - columns + 1)]:
        for edge in (0, -1):
            np.testing.assert_allclose(inside[:, edge].mean(), (1 / places).mean(), rtol=0.3)


def test_nothing_is_erased_where_no_rectangle_fits():
    images = jnp.ones((50, 6, 9, 1))
    same = on_device.random_erasing(keys(1)[0], images, 1.0, area=(2.0, 3.0), noise=False)
    np.testing.assert_array_equal(same, images)


def test_a_drawn_number_becomes_every_integer_below_the_count():
    uniform = jnp.asarray([0, 0.2, 0.5, 1 - 2**-23], jnp.float32)
    assert on_device._below(uniform, 5).tolist() == [0, 1, 2, 4]
    for count in (1, 3, 4096, 5000, 2**20 + 1):
        assert on_device._below(uniform, count)[-1] == count - 1


def test_erasing_with_noise_changes_nothing_else():
    images = jnp.full((64, 16, 16, 3), 7.0)
    erase = jax.jit(on_device.random_erasing, static_argnums=2)
    result = np.asarray(erase(keys(1)[0], images, 1.0))
    noise = result[result != 7]
    assert (result != 7).any(axis=(1, 2, 3)).all()
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05
    same = on_device.random_erasing(keys(1)[0], images, 0.0)
    assert same is images


def test_eight_devices_give_what_one_gives(batch):
    images, targets = batch
    mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec('data'))

    def step(key, images, targets):
        mix_key, erase_key = jax.random.split(key)
        images, targets = on_device.mix(mix_key, images, targets, 0.4, 1.0)
        return on_device.random_erasing(erase_key, images, 0.5), targets

    spread = jax.jit(step, out_shardings=sharding)
    plain = jax.jit(step)
    for key in keys(4):
        one = plain(key, images, targets)
        many = spread(key, jax.device_put(images, sharding), jax.device_put(targets, sharding))
        assert len(many[0].sharding.device_set) == 8
        for a, b in zip(one, many, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)
