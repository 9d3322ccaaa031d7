"""The 80 labels of COCO, in the order in which detectors number them.

It is the order of mmdetection's `CocoDataset` and of the category ids, which have gaps and go up to
90: label 11 is 'stop sign', whose id is 13.
"""

COCO_LABELS = (
    *('person', 'bicycle', 'car', 'motorcycle', 'airplane', 'bus', 'train', 'truck', 'boat'),
    *('traffic light', 'fire hydrant', 'stop sign', 'parking meter', 'bench', 'bird', 'cat', 'dog'),
    *('horse', 'sheep', 'cow', 'elephant', 'bear', 'zebra', 'giraffe', 'backpack', 'umbrella'),
    *('handbag', 'tie', 'suitcase', 'frisbee', 'skis', 'snowboard', 'sports ball', 'kite'),
    *('baseball bat', 'baseball glove', 'skateboard', 'surfboard', 'tennis racket', 'bottle'),
    *('wine glass', 'cup', 'fork', 'knife', 'spoon', 'bowl', 'banana', 'apple', 'sandwich'),
    *('orange', 'broccoli', 'carrot', 'hot dog', 'pizza', 'donut', 'cake', 'chair', 'couch'),
    *('potted plant', 'bed', 'dining table', 'toilet', 'tv', 'laptop', 'mouse', 'remote'),
    *('keyboard', 'cell phone', 'microwave', 'oven', 'toaster', 'sink', 'refrigerator', 'book'),
    *('clock', 'vase', 'scissors', 'teddy bear', 'hair drier', 'toothbrush'),
)
