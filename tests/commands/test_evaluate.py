"""The command evaluate on a detector; `test_images` has it on classifiers."""

import json

import numpy as np
import pytest
from pycocotools import mask as coco_masks

from gcnet_jax.__main__ import main
from gcnet_jax.inference.detector import Detector


@pytest.fixture(scope='module')
def annotated(stored_detector, tmp_path_factory):
    """A picture, annotated with the best objects that the detector finds in it."""
    from PIL import Image

    folder = tmp_path_factory.mktemp('set')
    generator = np.random.default_rng(0)
    detector = Detector.load(stored_detector.directory, devices=stored_detector.one_device)
    images, annotations = [], []
    for number in (3,):
        pixels = generator.integers(0, 256, (48, 72, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f'{number}.png')
        images.append({'id': number, 'file_name': f'{number}.png', 'height': 48, 'width': 72})
        found = detector(pixels)
        for index, (box, mask) in enumerate(zip(found.boxes[:2], found.masks[:2], strict=True)):
            encoded = coco_masks.encode(np.asfortranarray(mask))
            left, top, right, bottom = map(float, box)
            annotations.append(
                {
                    'id': 10 * number + index,
                    'image_id': number,
                    'category_id': 7 + int(found.classes[index]),
                    'bbox': [left, top, right - left, bottom - top],
                    'area': float(coco_masks.area(encoded)),
                    'iscrowd': 0,
                    'segmentation': {'size': [48, 72], 'counts': encoded['counts'].decode()},
                }
            )
    categories = [
        {'id': 7 + index, 'name': name}
        for index, name in enumerate(stored_detector.description.label_names)
    ]
    contents = {'images': images, 'annotations': annotations, 'categories': categories}
    (folder / 'instances_test.json').write_text(json.dumps(contents))
    return folder


def run(checkpoint, *arguments):
    return main(['evaluate', '--checkpoint', str(checkpoint), *map(str, arguments)])


@pytest.mark.slow
def test_a_detector_is_judged_by_average_precision(stored_detector, annotated, tmp_path, capsys):
    out = tmp_path / 'report'
    assert run(stored_detector.directory, '--data', annotated, '--out', out) == 0
    printed = capsys.readouterr().out
    assert 'AP50' in printed
    assert f'wrote {out / "evaluation.json"} and {out}' in printed
    report = json.loads((out / 'evaluation.json').read_text())
    assert report['box']['AP'] == pytest.approx(1)
    assert (report['examples'], report['objects']) == (1, 2)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--split', 'train'], "'train'"),
        (['--data-dir', '/x'], '--data-dir has no meaning with a detector'),
    ],
)
def test_what_cannot_be_is_one_line(stored_detector, annotated, capsys, arguments, message):
    assert run(stored_detector.directory, '--data', annotated, *arguments) == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count('\n') == 1
