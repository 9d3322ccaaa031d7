"""What the batches of images with objects hold by default, and at most; light to import."""

# Places for objects, cells along each side of a mask, and how often left and right are exchanged.
MAX_BOXES, MASK_SIZE, FLIP = 100, 112, 0.5
MOST_BOXES, MOST_CELLS = 1000, 1024
