"""The families of names, one per file: all that is particular to a library's checkpoints."""

import re
from collections.abc import Collection

from gcnet_jax.porting.families import (
    cifar,
    gccnn,
    mmdetection,
    mmdetection_detector,
    mmsegmentation,
    mmsegmentation_backbone,
    mmsegmentation_segmenter,
    timm_byobnet,
    timm_efficientnet,
    torchvision,
)

# A file belongs to the first family that recognises its names, so the more particular one precedes.
FAMILIES = (
    gccnn.FAMILY,
    mmsegmentation_segmenter.FAMILY,
    mmsegmentation.FAMILY,
    mmdetection_detector.FAMILY,
    mmsegmentation_backbone.FAMILY,
    mmdetection.FAMILY,
    timm_byobnet.FAMILY,
    timm_efficientnet.FAMILY,
    cifar.FAMILY,
    torchvision.FAMILY,
)
LIBRARIES = tuple(sorted({family.library for family in FAMILIES}))

# Of any family: a file may be read with the names of one that it is not of.
_CLASSIFIER = '|'.join(family.classifier for family in FAMILIES)
_CONTEXT = '|'.join(family.context for family in FAMILIES)


def is_classifier(name: str) -> bool:
    """Whether a name in a file is the classifier's."""
    return re.fullmatch(rf'({_CLASSIFIER})\.(weight|bias)', name) is not None


def is_context(name: str) -> bool:
    """Whether a name in a file is that of a context block inside a network."""
    return re.search(rf'\.({_CONTEXT})\.', name) is not None


def why_unsupported(names: Collection[str]) -> str:
    """Why no network here can hold a file with these names; '' if nothing is known against it."""
    for family in FAMILIES:
        for pattern, explanation in family.unsupported.items():
            if any(re.search(pattern, name) for name in names):
                return explanation
    return ''
