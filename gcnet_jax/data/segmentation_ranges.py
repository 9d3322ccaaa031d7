"""Defaults and bounds of the augmentation of images with label maps; quick to import."""

# Those of mmsegmentation: factors on the limits of an image's sides, and the largest share of a
# crop that one class may fill.
SCALE_RANGE = (0.5, 2.0)
CATEGORY_MAX_RATIO = 0.75
MAX_SCALE = 10.0
