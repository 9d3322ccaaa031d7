"""Parameters and multiply-adds, against sums done by hand and published figures."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from gcnet_jax.context import GlobalContext
from gcnet_jax.models import create_model
from gcnet_jax.models.summary import format_summary, summarize


class Small(nn.Module):
    @nn.compact
    def __call__(self, images):
        features = nn.Conv(8, (3, 3), feature_group_count=1, name='conv')(images)
        features = GlobalContext(hidden_channels=2, name='context')(features)
        return nn.Dense(5, name='classifier')(features.mean((1, 2)))


def test_a_small_network_by_hand():
    summary = summarize(Small(), jax.ShapeDtypeStruct((1, 6, 4, 3), jnp.float32))
    block_parameters = (8 + 1) + (8 * 2 + 2) + 2 * 2 + (2 * 8 + 8)
    block_multiply_adds = 24 * 8 + 24 * 8 + 8 * 2 + 2 * 8  # logits, weighted sum, transform
    assert list(summary.context) == ['context']
    assert summary.context_total.parameters == block_parameters
    assert summary.context_total.multiply_adds == block_multiply_adds
    assert summary.total.parameters == 27 * 8 + 8 + block_parameters + 8 * 5 + 5
    assert summary.total.multiply_adds == 24 * 8 * 27 + block_multiply_adds + 8 * 5


@pytest.mark.parametrize(
    ('name', 'giga'), [('resnet18', 1.814), ('resnet50', 4.089), ('resnext50_32x4d', 4.230)]
)
def test_multiply_adds_are_torchvisions(name, giga):
    """torchvision publishes these with its weights (the key `_ops`)."""
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    summary = summarize(create_model(name), images, train=False)
    assert summary.total.multiply_adds / 1e9 == pytest.approx(giga, abs=6e-4)
    assert summary.context == {}


def test_context_is_the_difference_to_the_plain_network():
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    summaries = {
        name: summarize(create_model(name), images, train=False)
        for name in ('resnet50', 'gc_resnet50')
    }
    plain, context = summaries['resnet50'].total, summaries['gc_resnet50']
    assert len(context.context) == 4 + 6 + 3
    assert context.context_total.parameters == context.total.parameters - plain.parameters
    assert context.context_total.multiply_adds == context.total.multiply_adds - plain.multiply_adds
    assert sum(context.parts.values()) == context.total.parameters
    text = format_summary('gc_resnet50', images.shape, context)
    assert '28,078,773' in text
    assert '13 context blocks' in text
