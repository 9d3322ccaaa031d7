"""Attention read out of models that know nothing of it."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from gcnet_jax.analysis import attention_maps
from gcnet_jax.analysis.attention_maps import padding_share
from gcnet_jax.context import GlobalContext, NonLocal, SqueezeExcite, insert
from gcnet_jax.errors import UserError
from gcnet_jax.models import create_model


class Plain(nn.Module):
    @nn.compact
    def __call__(self, images):
        features = nn.relu(nn.Conv(6, (3, 3), name='first')(images))
        return nn.Conv(4, (3, 3), name='second')(features).mean((1, 2))


class Twice(nn.Module):
    @nn.compact
    def __call__(self, features):
        block = GlobalContext(hidden_channels=2, name='context')
        return block(block(features) + 1.0)


def images(batch=2, size=5):
    return np.random.default_rng(0).normal(size=(batch, size, size, 6)).astype(np.float32)


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def test_the_map_is_the_softmax_of_the_logits(random_variables):
    features = images()
    model = GlobalContext(hidden_channels=2)
    variables = random_variables(model, features)
    maps = attention_maps(model, variables, features)
    kernel = variables['params']['pool']['logits']['kernel'][:, 0]
    expected = softmax((features @ kernel).reshape(2, -1)).reshape(2, 5, 5)
    assert list(maps) == ['pool']
    np.testing.assert_allclose(maps['pool'], expected, rtol=1e-5)


def test_a_network_of_ours_gives_one_map_a_block(random_variables):
    model = create_model('gc_resnet18', stage_sizes=(1, 1, 1, 1), widths=(4, 4, 4, 4))
    pixels = images()[..., :3]
    maps = attention_maps(model, random_variables(model, pixels, train=False), pixels, train=False)
    assert set(maps) == {f'stage{stage}_0/context_after_conv2_0/pool' for stage in (2, 3, 4)}
    for attention in maps.values():
        np.testing.assert_allclose(np.asarray(attention).sum((1, 2)), 1.0, rtol=1e-5)


def test_an_inserted_block_gives_its_map(random_variables):
    model = insert(Plain(), 'first', NonLocal(ratio=1 / 2))
    maps = attention_maps(model, random_variables(model, images()), images())
    (attention,) = maps.values()
    assert attention.shape == (2, 5, 5, 5, 5)
    np.testing.assert_allclose(np.asarray(attention).sum((3, 4)), 1.0, rtol=1e-5)


def test_a_block_that_is_called_twice_gives_two_maps(random_variables):
    maps = attention_maps(Twice(), random_variables(Twice(), images()), images())
    assert set(maps) == {'context/pool:0', 'context/pool:1'}
    assert np.abs(maps['context/pool:0'] - maps['context/pool:1']).max() > 0


def test_maps_come_in_the_order_of_the_numbers_in_their_names(random_variables):
    model = create_model('gc_resnet18', stage_sizes=(1, 1, 11, 1), widths=(4, 4, 4, 4))
    pixels = images(batch=1, size=16)[..., :3]
    maps = attention_maps(model, random_variables(model, pixels, train=False), pixels, train=False)
    blocks = [path.partition('/')[0] for path in maps]
    assert blocks == ['stage2_0', *(f'stage3_{index}' for index in range(11)), 'stage4_0']


def test_a_model_without_attention_is_refused():
    model = insert(Plain(), 'first', SqueezeExcite())
    variables = model.init(jax.random.key(0), images())
    with pytest.raises(UserError, match=r'Inserted.* holds no block that attends'):
        attention_maps(model, variables, images())


def test_the_share_of_padding_counts_parts_of_positions():
    # 2 x 4 positions of 16 x 16 pixels; the image ends in the middle of the last column.
    attention = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.float32) / 36
    assert padding_share(attention, (32, 64), (32, 56)) == pytest.approx(0.5 * 12 / 36)
    assert padding_share(attention, (32, 64), (16, 64)) == pytest.approx(26 / 36)
    assert padding_share(attention, (32, 64), (32, 64)) == pytest.approx(0, abs=1e-7)


def test_the_share_of_padding_is_the_mean_of_the_queries_in_the_image():
    maps = np.zeros((2, 2, 2, 2), np.float32)
    maps[0, 0, 0, 0] = maps[1, 0, 1, 1] = 1  # Only the second of those in the image looks outside.
    maps[:, 1, 1, 1] = 1
    assert padding_share(maps, (64, 64), (64, 32)) == pytest.approx(0.5)
