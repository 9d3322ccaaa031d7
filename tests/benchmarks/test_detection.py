"""The table of detectors: a row for each part, and weights that both sides can draw."""

import numpy as np
import pytest

from benchmarks import detection, detection_sides, detection_steps


def answer(whole, parts, peak, detections=100):
    seconds = dict.fromkeys(detection.PARTS, (parts, parts / 2)) | {'whole': (whole, whole)}
    return {'seconds': seconds, 'peak_bytes': peak * 2**20, 'boxes': detections}


def test_medians_of_parts_and_of_the_whole_are_compared():
    answers = {
        'gcnet_jax, first run': [answer(20, 90, 300)],
        'gcnet_jax': [answer(2, 9, 100), answer(4, 9, 120), answer(3, 9, 110)],
        'gcnet_jax by part': [answer(9, 1, 500)],
        'mmdetection': [answer(6, 0.5, 200)],
    }
    *parts, whole = detection.rows(answers)
    assert [row['part'] for row in parts] == list(detection.PARTS)
    assert {row['speed ratio'] for row in parts} == {0.5}
    assert (whole['seconds'], whole['mmdetection'], whole['speed ratio']) == (3, 6, 2)
    peaks = (whole['peak MiB'], whole['first peak MiB'], whole['their peak MiB'])
    assert peaks == (120, 300, 200)
    assert whole['boxes'] == '100, 100, 100'
    assert whole['spread'] == pytest.approx(2 / 3)


def test_without_mmdetection_its_columns_are_empty():
    answers = {'gcnet_jax': [answer(2, 9, 100)], 'gcnet_jax by part': [answer(9, 1, 500)]}
    whole = detection.rows(answers)[-1]
    assert whole['seconds'] == 2
    assert whole['mmdetection'] is whole['speed ratio'] is whole['their peak MiB'] is None


def test_of_a_training_step_there_is_one_part():
    answers = {'gcnet_jax': [answer(2, 9, 100, 31)], 'mmdetection': [answer(3, 9, 50, 29)]}
    (row,) = detection.rows(answers)
    assert (row['part'], row['speed ratio'], row['boxes']) == ('whole', 1.5, '31, 29')


def test_objects_of_a_training_step_lie_in_the_image_and_have_a_mask():
    boxes, labels, masks = detection_steps.objects(400, 666)
    assert (boxes >= 0).all()
    assert (boxes[:, 2:] <= (666, 400)).all()
    assert labels.max() < 80
    assert masks.shape == (8, 400, 666)
    for box, mask in zip(boxes.astype(int), masks, strict=True):
        inside = mask[box[1] : box[3], box[0] : box[2]]
        assert inside.sum() == mask.sum()
        assert inside.mean() == pytest.approx(np.pi / 4, abs=0.05)


def test_weights_depend_on_the_name_alone_and_have_the_gain_of_their_layer():
    name, shape = 'neck.lateral_convs.0.conv.weight', (64, 32, 1, 1)
    kernel = detection_sides.draw(name, shape)
    np.testing.assert_array_equal(kernel, detection_sides.draw(name, shape))
    assert kernel.std() * np.sqrt(32) == pytest.approx(0.4, rel=0.1)
    assert (detection_sides.draw('a.running_var', (9,)) > 0).all()
    bias = detection_sides.draw('roi_head.bbox_head.fc_cls.bias', (81,))
    assert bias[-1] > 10 > np.abs(bias[:-1]).max()


def test_an_interpreter_alone_is_refused(capsys):
    with pytest.raises(SystemExit):
        detection.main(['--mmdetection-python', 'python'])
    assert 'go together' in capsys.readouterr().err


def test_another_network_is_refused_before_a_side_starts(capsys):
    with pytest.raises(SystemExit):
        detection.main(['--train', '--model', 'gc_mask_rcnn_resnet50'])
    assert "did you mean 'gc_mask_rcnn_resnet50_fpn'" in capsys.readouterr().err
