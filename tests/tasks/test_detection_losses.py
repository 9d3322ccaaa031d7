"""The losses of detectors against sums in numpy, in float64."""

import jax
import numpy as np
import pytest

from gcnet_jax.tasks.detection_losses import (
    detection_losses,
    loss_sums,
    smooth_l1,
    total_loss,
)

CLASSES, BETAS = 4, {1: (0.0, 0.0), 3: (1 / 9, 1.0)}


def draw_outputs(stages, seed=0):
    """Outputs of two images, of which the second has no object."""
    rng = np.random.default_rng(seed)

    def places(prefix, count, positive, suffix=''):
        valid = np.arange(count) < np.array([[count - 3], [count]])
        is_positive = np.arange(count) < np.array([[positive], [0]])
        return {
            f'{prefix}_deltas{suffix}': rng.normal(size=(2, count, 4)),
            f'{prefix}_targets{suffix}': rng.normal(size=(2, count, 4)),
            f'{prefix}_positive{suffix}': is_positive,
            f'{prefix}_valid{suffix}': valid,
        }

    outputs = places('rpn', 10, 4) | {'rpn_logits': 3 * rng.normal(size=(2, 10))}
    for stage in range(stages):
        suffix = f'_{stage}'
        outputs |= places('box', 12, 3 + stage, suffix)
        positive = outputs[f'box_positive{suffix}']
        labels = np.where(positive, rng.integers(0, CLASSES, positive.shape), CLASSES)
        outputs |= {
            f'box_logits{suffix}': 3 * rng.normal(size=(2, 12, CLASSES + 1)),
            f'box_labels{suffix}': labels.astype(np.int32),
            f'mask_logits{suffix}': rng.normal(size=(2, 6, 5, 5)),
            f'mask_targets{suffix}': rng.random((2, 6, 5, 5)) < 0.5,
            f'mask_valid{suffix}': positive[:, :6],
        }
    return {
        name: values.astype(np.float32) if values.dtype == np.float64 else values
        for name, values in outputs.items()
    }


def binary(logits, targets):
    probability = 1 / (1 + np.exp(-np.float64(logits)))
    return -np.log(np.where(targets, probability, 1 - probability))


def l1(difference, beta):
    size = np.abs(np.float64(difference))
    return np.where(size < beta, size**2 / 2 / (beta or 1), size - beta / 2)


def reference(outputs, stages):
    rpn_beta, box_beta = BETAS[stages]
    positive, valid = outputs['rpn_positive'], outputs['rpn_valid']
    # Of the second image no anchor is positive; it counts as if one were.
    divisor = valid.sum() + 1
    difference = l1(outputs['rpn_deltas'] - outputs['rpn_targets'], rpn_beta)
    losses = {
        'rpn_class': binary(outputs['rpn_logits'], positive)[valid].sum() / divisor,
        'rpn_box': difference[positive].sum() / divisor,
    }
    for stage in range(stages):
        of = {
            name.removesuffix(f'_{stage}'): value
            for name, value in outputs.items()
            if name.endswith(f'_{stage}')
        }
        positive, valid = of['box_positive'], of['box_valid']
        powers = np.exp(np.float64(of['box_logits']))
        probability = np.take_along_axis(
            powers / powers.sum(-1, keepdims=True), of['box_labels'][..., None], -1
        )[..., 0]
        losses[f'class_{stage}'] = -np.log(probability[valid]).mean()
        difference = l1(of['box_deltas'] - of['box_targets'], box_beta)
        losses[f'box_{stage}'] = difference[positive].sum() / valid.sum()
        masks = binary(of['mask_logits'], of['mask_targets'])
        losses[f'mask_{stage}'] = masks[of['mask_valid']].mean()
    return losses


@pytest.mark.parametrize('stages', [1, 3])
def test_every_term(stages):
    outputs = draw_outputs(stages)
    losses = jax.jit(detection_losses)(outputs)
    expected = reference(outputs, stages)
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert losses[name] == pytest.approx(value, rel=1e-5), name
    total = sum(value for name, value in expected.items() if not name[-1].isdigit())
    for stage in range(stages):
        terms = (expected[f'{kind}_{stage}'] for kind in ('class', 'box', 'mask'))
        total += 0.5**stage * sum(terms)
    assert total_loss(losses) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize('stages', [1, 3])
def test_sums_are_means_times_images(stages):
    outputs = draw_outputs(stages)
    losses, sums = detection_losses(outputs), jax.jit(loss_sums)(outputs)
    assert sums['loss'] == pytest.approx(2 * float(total_loss(losses)), rel=1e-5)
    boxes = sum(0.5**stage * losses[f'box_{stage}'] for stage in range(stages))
    assert sums['box'] == pytest.approx(2 * float(boxes), rel=1e-5)
    terms = ('rpn_class', 'rpn_box', 'class', 'box', 'mask')
    assert sums['loss'] == pytest.approx(sum(float(sums[name]) for name in terms), rel=1e-5)
    assert (sums['positives'], sums['boxes']) == (3, 12 + 9)
    right = outputs['box_logits_0'].argmax(-1) == outputs['box_labels_0']
    assert sums['correct'] == (right & outputs['box_valid_0']).sum()


def test_places_that_are_left_over_have_no_part():
    outputs = draw_outputs(3)
    spoiled = dict(outputs)
    for name, values in outputs.items():
        if values.dtype == np.float32:
            prefix, _, suffix = name.partition('_')
            suffix = f'_{suffix[-1]}' if suffix[-1].isdigit() else ''
            valid = outputs[f'{prefix}_valid{suffix}']
            valid = valid.reshape(valid.shape + (1,) * (values.ndim - 2))
            spoiled[name] = np.where(valid, values, np.float32(1e9))
    gradient = jax.jit(jax.grad(lambda floats, rest: total_loss(detection_losses(floats | rest))))

    def of(values):
        floats = {name: value for name, value in values.items() if value.dtype == np.float32}
        return gradient(floats, {name: values[name] for name in values.keys() - floats.keys()})

    for name, value in of(spoiled).items():
        np.testing.assert_array_equal(value, of(outputs)[name])


def test_a_batch_without_objects_has_no_loss_of_boxes_and_masks():
    outputs = draw_outputs(1)
    for name in ('rpn_positive', 'box_positive_0', 'mask_valid_0'):
        outputs[name] = np.zeros_like(outputs[name])
    outputs['box_labels_0'] = np.full_like(outputs['box_labels_0'], CLASSES)
    losses = detection_losses(outputs)
    assert {name for name, value in losses.items() if value} == {'rpn_class', 'class_0'}


def test_the_smooth_loss_has_no_kink():
    values = np.array([-2, -1.001, -0.999, -0.5, 0, 0.2, 1, 3], np.float32)
    np.testing.assert_allclose(smooth_l1(values, 1.0), l1(values, 1.0), rtol=1e-6)
    np.testing.assert_allclose(smooth_l1(values, 0.0), np.abs(values))
