"""What the batches of images with objects hold by default, and at most; light to import."""

# Places for objects, cells along each side of a mask, and how often left and right are exchanged.
MAX_BOXES, MASK_SIZE, FLIP = 100, 112, 0.5
MOST_BOXES, MOST_CELLS = 1000, 1024
# Least limit of an image's sides: the smallest anchors have this side, and one cell of the coarsest
# map that boxes are sampled from covers so many pixels.
LEAST_SIDE = 32
# Cells along each side of what a mask head predicts; a coarser mask cannot teach it.
LEAST_CELLS = 28
